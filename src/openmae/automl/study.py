"""The memory of a search: Optuna's study in a file or in PostgreSQL, which any number of workers share.

A recommendation is an Optuna trial, and says who trains it. Workers take turns (a lock of a file, or of the database)
at whatever changes one, and look first whether it is theirs: so a trial is made once, taken by one worker, and ended by
the one that has it. A trial whose worker is gone is taken over as it is, with its values, reports and folder; there its
training is found, still running or at its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from openmae.automl.algorithms import STOPS_EARLY, Algorithm, Member, next_member
from openmae.automl.database import STORAGE_ERRORS, open_storage, storage_url, turns, unusable
from openmae.automl.objective import Objective
from openmae.automl.space import Space
from openmae.errors import SpecError
from openmae.jobs.processes import alive, identify
from openmae.results.trials import Trial as Shown
from openmae.spec.describe import fields
from openmae.spec.load import to_dict
from openmae.spec.schema import ExperimentSpec

TRIALS = "trials"
BEAT = 15.0  # seconds between signs of life
LOST = 90.0  # seconds without one after which a worker of another machine counts as gone

# What a trial carries, besides its values.
NUMBER, FOLDER, SOURCES = "recommendation", "folder", "sources"
EPOCHS, SECONDS, CAUSE, TRIES = "epochs", "seconds", "cause", "tries"
_WORKER = "worker"
_NAME = ".study"  # in the folder: which study its trainings are of
# Says where and how a training runs, not what comes out.
_HARMLESS = frozenset(
    {
        "dataset.test_data_sources",
        "dataset.num_workers_per_gpu",
        *(f"train.{name}" for name in ("num_epochs", "num_gpus", "gpu_ids", "num_nodes", "distributed_strategy")),
        *(f"train.{name}" for name in ("checkpoint_interval", "checkpoint_interval_unit", "keep_checkpoints")),
        *(f"train.{name}" for name in ("results_dir", "resume_training_checkpoint_path", "stop_after_epoch")),
    }
)

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class Recommendation:
    """A training that was recommended.

    Attributes:
        trial: of Optuna.
        number: as people count them, from 0: the spec's own values.
        params: dotted key -> value.
        folder: of its training, as a name.
        sources: folders whose newest checkpoint it begins with, the first that has one; none: the spec's weights.
    """

    trial: Trial
    number: int
    params: Mapping[str, Any]
    folder: str
    sources: tuple[str, ...] = ()


class Study:
    """The study of a spec, opened or made.

    Args:
        spec: of the search.
        folder: local, of the results; the default storage is a file in it.
        algorithm, space, objective: of the search.

    Raises:
        SpecError: the folder holds another search, or the storage cannot be used.
    """

    def __init__(
        self, spec: ExperimentSpec, folder: Path, algorithm: Algorithm, space: Space, objective: Objective
    ) -> None:
        self.algorithm, self.space, self.objective = algorithm, space, objective
        self.url, shown = storage_url(spec, folder)
        process = identify(os.getpid()) or {}
        host = f"{socket.gethostname()} {process.get('boot', '')}"  # machines may share a name
        self.me = {"host": host, "process": process, "token": uuid.uuid4().hex}
        self._watched: dict[int, tuple[float, float]] = {}  # by trial: its worker's last sign of life, and when seen
        facts = json.loads(json.dumps(_facts(spec, algorithm, objective)))
        name = _name(spec, facts)
        try:
            turn = turns(self.url, folder)
            with turn("open"):  # two that make the same tables stumble over one another
                self.study = self._open(open_storage(self.url), folder, name, facts)
        except (*STORAGE_ERRORS, ImportError) as error:
            raise unusable(shown, error) from error
        self._turn = lambda: turn(name)

    def _open(self, storage: RDBStorage, folder: Path, name: str, facts: Mapping[str, Any]) -> optuna.Study:
        options: dict[str, Any] = {"storage": storage, "study_name": name, "pruner": self.algorithm.pruner()}
        known = name in optuna.get_all_study_names(storage)
        if known:
            study = optuna.load_study(**options)
            before = study.user_attrs.get("facts", facts)
            # an option that is newer than the search had its default then
            before = {key: value for key, value in facts.items() if _is_default(key, value)} | before
            if before != facts and study.get_trials(deepcopy=False):
                raise _another(folder, _changes(before, facts))
            if before != facts:  # nothing of it was begun
                optuna.delete_study(study_name=name, storage=storage)
        _check_folder(folder, name, known=known)
        study = optuna.create_study(**options, direction=self.objective.direction, load_if_exists=True)
        study.set_user_attr("facts", dict(facts))
        return study

    # ---------------------------------------------------------------------------------------- what there is

    def trials(self) -> list[FrozenTrial]:
        """The recommendations that were begun, in their order."""
        return [t for t in self.study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]

    def count(self) -> int:
        """How many recommendations have been made."""
        return len(self.trials())

    def why_deleted(self, trial: FrozenTrial) -> str:
        """Why no job can take a model of a recommendation that has ended."""
        how = "was trained to its end, but another one is better"
        if trial.state == TrialState.PRUNED:
            done = f"after epoch {trial.user_attrs.get(EPOCHS)} of {self.algorithm.epochs}"
            how = f"was pruned {done}, as others were better"
        if trial.state == TrialState.FAIL:
            how = f"failed ({trial.user_attrs.get(CAUSE)})"
        return f"Trial {trial.user_attrs[NUMBER]} of the search {how}, so its checkpoints were deleted."

    def unfinished(self) -> list[FrozenTrial]:
        """Those that have not ended, whoever is at them."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))

    def best(self) -> FrozenTrial | None:
        """The best of those that were trained to their end."""
        done = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE and trial.value is not None]
        sign = -1 if self.objective.maximize else 1
        return min(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number), default=None)

    def shown(self) -> list[Shown]:
        """All recommendations, as pictures and tables take them."""
        return [shown_trial(trial) for trial in self.trials()]

    def mine(self) -> list[FrozenTrial]:
        """Those that this object has taken."""
        return [trial for trial in self.unfinished() if self._is_mine(trial)]

    # ---------------------------------------------------------------------------------------- what is next

    def next(self) -> Recommendation | None:
        """Take over a recommendation whose worker is gone, or make a new one; None: there is nothing to begin now."""
        with self._turn():
            trials = self.study.get_trials(deepcopy=False)
            number = next((trial.number for trial in trials if self._is_lost(trial)), len(trials))
            if number == len(trials):
                if number >= self.algorithm.recommendations or not self._ready(trials, number):
                    return None
                self._add(trials, number)
                trials = self.study.get_trials(deepcopy=False)
            found = trials[number]
            self.study.sampler = self.algorithm.sampler(number)
            waits = found.state == TrialState.WAITING
            trial = self.study.ask() if waits else Trial(self.study, found._trial_id)
            attrs = found.user_attrs
            folder, sources, before = attrs[FOLDER], attrs[SOURCES], attrs[_WORKER]
            if before is not None and before["host"] != self.me["host"]:
                # its processes may still live where nobody here can see them
                folder, sources = f"{number:03d}-{uuid.uuid4().hex[:6]}", [folder, *sources]
            for name, value in ((FOLDER, folder), (SOURCES, sources), (_WORKER, self._sign())):
                trial.set_user_attr(name, value)
            return Recommendation(trial, number, self.space.draw(trial), folder, tuple(sources))

    def _add(self, trials: list[FrozenTrial], number: int) -> None:
        """Put a recommendation into the study, to be taken at once."""
        params, sources = (self.space.own, []) if number == 0 else ({}, [])
        if self._generation(number):
            params, source = self._inherit(trials, number)
            sources = [source]
        attrs = {NUMBER: number, FOLDER: f"{number:03d}", SOURCES: sources, _WORKER: None}
        if params:
            self.study.enqueue_trial(params, attrs)
        else:
            self.study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attrs))

    def _is_lost(self, trial: FrozenTrial) -> bool:
        """Whether nobody is at a recommendation that has not ended; asked by whose turn it is."""
        if trial.state != TrialState.RUNNING:
            return trial.state == TrialState.WAITING  # who added it did not come to take it
        worker = trial.user_attrs[_WORKER]
        if worker is None:
            return True
        if worker["host"] == self.me["host"]:
            return not alive(worker["process"])
        now = time.monotonic()  # of this machine alone: clocks differ
        at, since = self._watched.get(trial.number, (None, now))
        self._watched[trial.number] = (worker["at"], now if at != worker["at"] else since)
        return at == worker["at"] and now - since > LOST

    # ---------------------------------------------------------------------------------------- what is told

    def beat(self, one: Recommendation) -> bool:
        """A sign of life; False: another worker has taken the recommendation over."""
        return self.note(one, _WORKER, self._sign())

    def note(self, one: Recommendation, name: str, value: Any) -> bool:
        """Write something down about a recommendation; False: another worker has taken it over."""
        with self._holding(one) as mine:
            if mine:
                one.trial.set_user_attr(name, value)
        return mine

    def report(self, one: Recommendation, value: float, epoch: int) -> bool:
        """Note the value after an epoch; False: another worker has taken the recommendation over."""
        with self._holding(one) as mine:
            if mine:
                one.trial.set_user_attr(EPOCHS, epoch)
                if epoch not in self.study._storage.get_trial(one.trial._trial_id).intermediate_values:
                    one.trial.report(value, epoch)
        return mine

    def leave(self, number: int) -> None:
        """Stop working at a recommendation: whoever goes on with the study continues it."""
        with self._turn():
            trial = self.study.get_trials(deepcopy=False)[number]
            if self._is_mine(trial):
                self.study._storage.set_trial_user_attr(trial._trial_id, _WORKER, None)

    def end(self, one: Recommendation, state: TrialState, value: float | None = None, cause: str = "") -> bool:
        """Tell how a recommendation ended; False: another worker has taken it over meanwhile."""
        with self._holding(one) as mine:
            if mine:
                if cause:
                    one.trial.set_user_attr(CAUSE, cause)
                self.study.sampler = optuna.samplers.RandomSampler()  # a grid's would stop a loop that is not Optuna's
                self.study.tell(one.number, value, state)
        return mine

    @contextmanager
    def _holding(self, one: Recommendation) -> Iterator[bool]:
        with self._turn():
            yield self._is_mine(self.study._storage.get_trial(one.trial._trial_id))

    def _is_mine(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs[_WORKER]
        return not trial.state.is_finished() and worker is not None and worker["token"] == self.me["token"]

    def _sign(self) -> dict[str, Any]:
        return {**self.me, "at": time.time()}

    # ---------------------------------------------------------------------------------------- populations

    def _generation(self, number: int) -> int:
        return number // self.algorithm.settings.population_size if self.algorithm.generations > 1 else 0

    def _members(self, trials: list[FrozenTrial], generation: int) -> list[FrozenTrial]:
        return [trial for trial in trials if self._generation(trial.number) == generation]

    def _ready(self, trials: list[FrozenTrial], number: int) -> bool:
        """Whether the generation before has ended, so that a recommendation knows what to go on with."""
        generation = self._generation(number)
        return not generation or all(trial.state.is_finished() for trial in self._members(trials, generation - 1))

    def _inherit(self, trials: list[FrozenTrial], number: int) -> tuple[dict[str, Any], str]:
        """The values of a training of a later generation, and the folder whose weights it goes on with."""
        size = self.algorithm.settings.population_size
        before = {t.number % size: t for t in self._members(trials, self._generation(number) - 1)}
        members = [Member(slot, trial.value, trial.params) for slot, trial in before.items()]
        slot, params = next_member(self.algorithm, members, number % size, number, maximize=self.objective.maximize)
        return params, before[slot].user_attrs[FOLDER]


def shown_trial(trial: FrozenTrial) -> Shown:
    """An Optuna trial as pictures and tables take it."""
    attrs = trial.user_attrs
    states: dict[TrialState, Any] = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "stopped early",
        TrialState.FAIL: "failed",
    }
    value = trial.value
    if trial.state == TrialState.PRUNED and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    return Shown(
        number=trial.number,
        value=value,
        state=states.get(trial.state, "running"),
        epochs=int(attrs.get(EPOCHS) or 0),
        params=dict(trial.params),
        seconds=float(attrs.get(SECONDS) or 0.0),
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key, 'unset')} and is {now.get(key, 'unset')}" for key in changed)


def _another(folder: Path, why: str) -> SpecError:
    return SpecError(
        f"automl: {folder} holds another search: {why}.",
        "Set another results_dir for this search, or restore the old settings to go on with that one.",
    )


def _check_folder(folder: Path, name: str, *, known: bool) -> None:
    """Refuse a folder with the trainings of another study: their checkpoints would be taken for those of this one."""
    mark, held = folder / _NAME, (folder / TRIALS).is_dir() and any((folder / TRIALS).iterdir())
    if held and not known:
        raise SpecError(
            f"automl: {folder / TRIALS} holds trainings of a search, but its study is gone, or is another one.",
            "Set another results_dir for this search, restore the study or the settings that it was made with, or "
            f"remove {folder}.",
        )
    if held and mark.is_file() and mark.read_text(encoding="utf-8") != name:
        raise _another(folder, "its trainings are of another study")
    mark.write_text(name, encoding="utf-8")


def _facts(spec: ExperimentSpec, algorithm: Algorithm, objective: Objective) -> dict[str, Any]:
    """What makes a search this search: the number of recommendations may grow where nothing follows from it."""
    settings, name = algorithm.settings, algorithm.name
    searched = {item.key: item.range_words for item in algorithm.space.parameters}
    facts = {
        "automl.algorithm": name,
        "automl.metric": objective.metric,
        "automl.max_epochs": algorithm.epochs,
        "automl.seed": settings.seed,
        **{f"automl.ranges.{key}": words for key, words in searched.items()},
    }
    if name in STOPS_EARLY:
        facts["automl.reduction_factor"] = settings.reduction_factor
    if name == "pbt":
        facts["automl.population_size"] = settings.population_size
    if name in ("pbt", "grid"):  # the lengths of generations, and the points, follow from it
        facts["automl.max_recommendations"] = settings.max_recommendations
    fixed = {"model", "dataset", "train"}
    tree = to_dict(spec)
    for key in fields():
        value = _at(tree, key)
        if key.split(".")[0] in fixed and key not in _HARMLESS and key not in searched and value is not None:
            facts[key] = value
    return facts


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _is_default(key: str, value: Any) -> bool:
    known = fields()
    return key in known and value == json.loads(json.dumps(known[key].default, default=str))


def _name(spec: ExperimentSpec, facts: Mapping[str, Any]) -> str:
    """Of the study: in a shared database it must tell searches apart, and be the same for all workers of one."""
    if not spec.automl.storage:
        return "automl"
    told = {key: value for key, value in facts.items() if not _is_default(key, value)}
    text = json.dumps([spec.results_dir, told], sort_keys=True)
    return f"openmae-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
