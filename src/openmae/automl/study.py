"""The trials of a search in an Optuna study that any number of workers share.

Each trial records which worker holds it. For every change, a worker locks the study and checks that it still holds the
trial. Thus a trial is created once, held by one worker at a time, and ended by that worker. If a worker is gone,
another one takes over its trials with their parameters, reports and folders, and finds their jobs there, either running
or stopped at a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
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

from openmae.automl.algorithms import STOPS_EARLY, Algorithm, next_member
from openmae.automl.database import STORAGE_ERRORS, make_lock, open_storage, storage_url, unusable
from openmae.automl.objective import make_objective
from openmae.automl.space import make_space
from openmae.errors import SpecError
from openmae.machine import boot_id, identify, is_running
from openmae.results.trials import State, TrialSummary
from openmae.spec.describe import fields, traits
from openmae.spec.load import to_dict
from openmae.spec.resolved import with_actual_monitor
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import get

TRIALS = "trials"
BEAT = 15.0  # seconds between two heartbeats of a worker
LOST = 90.0  # seconds without a heartbeat after which a worker on another machine is considered gone

FOLDER, SOURCES, EPOCHS, SECONDS, CAUSE, TRIES = "folder", "sources", "epochs", "seconds", "cause", "tries"
_WORKER = "worker"
_STUDY_NAME = ".study"  # file in the results folder with the name of the study that its trials belong to
_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
}

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class HeldTrial:
    """A trial that this worker holds.

    Attributes:
        trial: Optuna's trial.
        params: dotted key -> value.
        folder: name of its folder in ``trials``.
        sources: names of folders to continue from, at the newest checkpoint of the first folder that has one.
    """

    trial: Trial
    params: Mapping[str, Any]
    folder: str
    sources: tuple[str, ...] = ()

    @property
    def number(self) -> int:
        """Number of the trial; trial 0 uses the values in the spec."""
        return self.trial.number


class Study:
    """The study of a spec, which is created if it does not exist, in the local results folder by default.

    Raises:
        SpecError: the spec cannot be searched, the folder holds another search, or the storage cannot be used.
    """

    def __init__(self, spec: ExperimentSpec, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self.space, self.objective = make_space(spec), make_objective(spec)
        self.algorithm = Algorithm(spec.automl, self.space, spec.trial_epochs)
        self.algorithm.check()
        host = f"{socket.gethostname()} {boot_id()}"  # two machines may have the same name
        self.me = {"host": host, "process": identify(os.getpid()), "token": uuid.uuid4().hex}
        self._heartbeats: dict[int, tuple[float, float]] = {}  # last heartbeat of a trial, and when it was first read
        facts = json.loads(json.dumps(self._facts()))
        name = _name(spec, facts)
        url, shown = storage_url(spec, folder)
        try:
            lock = make_lock(url, folder)
            with lock("open"):  # two processes cannot create the same tables at the same time
                self.study = self._open(open_storage(url), name, facts)
        except (*STORAGE_ERRORS, ImportError) as error:
            raise unusable(shown, error) from error
        self._lock = lambda: lock(name)

    def _open(self, storage: RDBStorage, name: str, facts: Mapping[str, Any]) -> optuna.Study:
        options: dict[str, Any] = {"storage": storage, "study_name": name, "pruner": self.algorithm.pruner()}
        known = name in optuna.get_all_study_names(storage)
        if known:
            study = optuna.load_study(**options)
            before = study.user_attrs.get("facts", facts)
            # An option that did not exist when the search was started had its default value.
            before = {key: value for key, value in facts.items() if _is_default(key, value)} | before
            before = with_actual_monitor(before, facts)
            if before != facts and study.get_trials(deepcopy=False):
                raise _other_search(self.folder, _changes(before, facts))
            if before != facts:  # no trial was started
                optuna.delete_study(study_name=name, storage=storage)
        _check_folder(self.folder, name, known=known)
        study = optuna.create_study(**options, direction=self.objective.direction, load_if_exists=True)
        study.set_user_attr("facts", dict(facts))
        return study

    # ------------------------------------------------------------------------------------------ reading

    def trials(self) -> list[FrozenTrial]:
        """Return the trials that have been started, by number."""
        return [trial for trial in self._all() if trial.state != TrialState.WAITING]

    def unfinished(self) -> list[FrozenTrial]:
        """Return the trials that have not ended, in any worker."""
        return [trial for trial in self._all() if not trial.state.is_finished()]

    def mine(self) -> list[FrozenTrial]:
        """Return the trials that this object holds."""
        return [trial for trial in self._all() if self._is_mine(trial)]

    def best(self) -> FrozenTrial | None:
        """Return the best complete trial, the first one in case of a tie."""
        done = [trial for trial in self._all() if trial.state == TrialState.COMPLETE and trial.value is not None]
        sign = -1 if self.objective.maximize else 1
        return min(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number), default=None)

    def summaries(self) -> list[TrialSummary]:
        """Return the trials for figures and tables."""
        return [summarize(trial) for trial in self.trials()]

    def why_deleted(self, trial: FrozenTrial) -> str:
        """Return why the checkpoints of an ended trial were deleted."""
        how = "is complete, but another trial is better"
        if trial.state == TrialState.PRUNED:
            done = f"after epoch {trial.user_attrs.get(EPOCHS)} of {self.algorithm.epochs}"
            how = f"was pruned {done}, as others were better"
        if trial.state == TrialState.FAIL:
            how = f"failed ({trial.user_attrs.get(CAUSE)})"
        return f"Trial {trial.number} of the search {how}, so its checkpoints were deleted."

    def _all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    # ------------------------------------------------------------------------------------------ holding

    def next(self) -> HeldTrial | None:
        """Take over a lost trial or create the next one; return None if there is nothing to start now."""
        with self._lock():
            trials = self._all()
            number = next((trial.number for trial in trials if self._is_lost(trial)), len(trials))
            if number == len(trials):
                previous = self._previous_generation(trials)
                if number >= self.algorithm.trials or not all(trial.state.is_finished() for trial in previous):
                    return None
                self._add(number, previous)
                trials = self._all()
            found = trials[number]
            self.study.sampler = self.algorithm.sampler(number)
            trial = self.study.ask() if found.state == TrialState.WAITING else resume_trial(self.study, found)
            attrs = found.user_attrs
            folder, sources, before = attrs[FOLDER], attrs[SOURCES], attrs[_WORKER]
            if before is not None and before["host"] != self.me["host"]:
                # Its processes may still run on the other machine, where this one cannot check them.
                folder, sources = f"{number:03d}-{uuid.uuid4().hex[:6]}", [folder, *sources]
            for name, value in ((FOLDER, folder), (SOURCES, sources), (_WORKER, self._heartbeat())):
                trial.set_user_attr(name, value)
            return HeldTrial(trial, self.space.suggest(trial), folder, tuple(sources))

    def beat(self, held: HeldTrial) -> bool:
        """Record a heartbeat; return whether the trial is still held."""
        return self.note(held, _WORKER, self._heartbeat())

    def note(self, held: HeldTrial, name: str, value: Any) -> bool:
        """Set an attribute of a trial; return whether the trial is still held."""
        with self._holding(held.number) as found:
            if found:
                held.trial.set_user_attr(name, value)
        return found is not None

    def report(self, held: HeldTrial, value: float, epoch: int) -> bool:
        """Report the value after an epoch; return whether the trial is still held."""
        with self._holding(held.number) as found:
            if found:
                held.trial.set_user_attr(EPOCHS, epoch)
                if epoch not in found.intermediate_values:
                    held.trial.report(value, epoch)
        return found is not None

    def end(self, held: HeldTrial, state: TrialState, value: float | None = None, cause: str = "") -> bool:
        """End a trial; return whether it was still held."""
        with self._holding(held.number) as found:
            if found:
                if cause:
                    held.trial.set_user_attr(CAUSE, cause)
                self.study.sampler = optuna.samplers.RandomSampler()  # GridSampler would call study.stop() at its end
                self.study.tell(held.number, value, state)
        return found is not None

    def release(self, number: int) -> None:
        """Release a trial, so that any worker can continue it."""
        with self._holding(number) as found:
            if found:
                self.study.sampler = optuna.samplers.RandomSampler()  # GridSampler would assign a point to the trial
                resume_trial(self.study, found).set_user_attr(_WORKER, None)

    @contextmanager
    def _holding(self, number: int) -> Iterator[FrozenTrial | None]:
        """Lock the study and yield a trial, or None if this object does not hold it."""
        with self._lock():
            found = self._all()[number]
            yield found if self._is_mine(found) else None

    def _is_mine(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs[_WORKER]
        return not trial.state.is_finished() and worker is not None and worker["token"] == self.me["token"]

    def _is_lost(self, trial: FrozenTrial) -> bool:
        """Return whether an unfinished trial has no running worker; the study must be locked."""
        if trial.state.is_finished():
            return False
        worker = trial.user_attrs[_WORKER]
        if worker is None or trial.state == TrialState.WAITING:  # released, or the worker that created it ended
            return True
        if worker["host"] == self.me["host"]:
            return not is_running(worker["process"])
        # Clocks of two machines differ, so measure with this machine's clock how long the heartbeat has not changed.
        now = time.monotonic()
        beat, since = self._heartbeats.get(trial.number, (None, now))
        self._heartbeats[trial.number] = (worker["at"], now if beat != worker["at"] else since)
        return beat == worker["at"] and now - since > LOST

    def _heartbeat(self) -> dict[str, Any]:
        return {**self.me, "at": time.time()}

    # ------------------------------------------------------------------------------------------ creating

    def _add(self, number: int, previous: list[FrozenTrial]) -> None:
        """Queue a trial with all its attributes at once, so that it is complete if this process is killed."""
        params, sources = self.space.own if number == 0 else {}, []
        if previous:
            source, params = next_member(self.algorithm, previous, number, maximize=self.objective.maximize)
            sources = [previous[source].user_attrs[FOLDER]]
        attrs = {FOLDER: f"{number:03d}", SOURCES: sources, _WORKER: None}
        if params:
            self.study.enqueue_trial(params, attrs)
        else:
            self.study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attrs))

    def _previous_generation(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Return the generation before that of the next trial; empty for the first one, and if there is only one."""
        size = self.algorithm.settings.population_size
        start = len(trials) // size * size
        return trials[max(start - size, 0) : start] if self.algorithm.generations > 1 else []

    def _facts(self) -> dict[str, Any]:
        """Return the values that identify the search: with other values, it is a different search."""
        settings, name = self.algorithm.settings, self.algorithm.name
        searched = {item.key: item.range_words for item in self.space.parameters}
        facts = {
            "automl.algorithm": name,
            "automl.metric": self.objective.metric,
            "automl.max_epochs": self.algorithm.epochs,
            "automl.seed": settings.seed,
            **{f"automl.ranges.{key}": words for key, words in searched.items()},
        }
        if name in STOPS_EARLY:
            facts["automl.reduction_factor"] = settings.reduction_factor
        if name == "pbt":
            facts["automl.population_size"] = settings.population_size
        if name in ("pbt", "grid"):  # other algorithms may get more trials later
            facts["automl.max_recommendations"] = settings.max_recommendations
        values = to_dict(self.spec)
        for key in fields():
            value = get(values, key)
            trained = key.startswith(("model.", "dataset.", "train.")) and traits(key).in_search
            if trained and key not in searched and value is not None:
                facts[key] = value
        return facts


def resume_trial(study: optuna.Study, trial: FrozenTrial) -> Trial:
    """Return a trial that another process started, so that it can be continued; this uses a private name of Optuna.

    Optuna's public API for this, ``heartbeat_interval`` with ``RetryFailedTrialCallback``, fails the trial and queues a
    copy. Its results would count twice, since successive halving also compares with the rungs of failed trials, and the
    copy could be in another bracket of Hyperband. It also waits for a grace period, even if the process is known to be
    dead.
    """
    return Trial(study, trial._trial_id)


def summarize(trial: FrozenTrial) -> TrialSummary:
    """Convert an Optuna trial for figures and tables; the value of a pruned trial is the last one that it reported."""
    return TrialSummary(
        number=trial.number,
        value=math.nan if trial.value is None else trial.value,
        state=_STATES.get(trial.state, "running"),
        epochs=int(trial.user_attrs.get(EPOCHS) or 0),
        params=dict(trial.params),
        seconds=float(trial.user_attrs.get(SECONDS) or 0.0),
        cause=str(trial.user_attrs.get(CAUSE) or ""),
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key, 'unset')} and is {now.get(key, 'unset')}" for key in changed)


def _other_search(folder: Path, why: str) -> SpecError:
    return SpecError(
        f"automl: {folder} holds another search: {why}.",
        "Set another results_dir for this search, or restore the old settings to continue that one.",
    )


def _check_folder(folder: Path, name: str, *, known: bool) -> None:
    """Reject a folder with trials of another study, since their checkpoints would be taken for those of this one."""
    mark, used = folder / _STUDY_NAME, (folder / TRIALS).is_dir() and any((folder / TRIALS).iterdir())
    if used and not known:
        raise SpecError(
            f"automl: {folder / TRIALS} holds trials of a search whose study is missing or is another one.",
            "Set another results_dir for this search, restore the study or the settings that it was created with, or "
            f"remove {folder}.",
        )
    if used and mark.is_file() and mark.read_text(encoding="utf-8") != name:
        raise _other_search(folder, "its trials belong to another study")
    mark.write_text(name, encoding="utf-8")


def _is_default(key: str, value: Any) -> bool:
    known = fields()
    return key in known and value == json.loads(json.dumps(known[key].default, default=str))


def _name(spec: ExperimentSpec, facts: Mapping[str, Any]) -> str:
    """Return the name of the study, which is unique in a shared database and the same for all its workers."""
    if not spec.automl.storage:
        return "automl"
    set_values = {key: value for key, value in facts.items() if not _is_default(key, value)}
    text = json.dumps([spec.results_dir, set_values], sort_keys=True)
    return f"openmae-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
