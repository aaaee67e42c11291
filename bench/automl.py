"""The gain of a search: the best accuracy of 20 trials, compared with the values of the spec, and the epochs used.

Study and worker are those of ``mae automl``, but the jobs run in this process in sequence. A trial gives the
same values bit for bit in every search, and whether or not it was paused, so a search looks up what an earlier one has
trained. The table of values is kept, so that an interrupted benchmark continues.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from openmae import quickstart
from openmae.actions import run_report, train
from openmae.automl import worker
from openmae.automl.algorithms import Algorithm
from openmae.automl.study import HeldTrial, Study
from openmae.automl.trial_jobs import TrialJobs
from openmae.errors import RunError
from openmae.jobs.job import Job, State, Transition, now
from openmae.results.status import StatusLog
from openmae.spec.load import load_spec
from openmae.storage.atomic import write_atomically

from .report import RESULTS, Report

FOLDER = RESULTS / "automl"
SEEDS = (0, 1, 2, 3, 4)
METRIC = "ACC_all"
POINTS, SHARE = 2.0, 1 / 3  # targets: bayesian over the spec's own values; epochs of asha over those of random


# asha goes first: random then trains on what asha has paused, and nothing is trained twice.
ALGORITHMS = ("asha", "hyperband", "random", "bayesian", "bohb")


@dataclass(frozen=True)
class Budget:
    """The size of the benchmark.

    Attributes:
        epochs: of a full training.
        trials: of a search.
        seeds: one search each.
        pretraining: epochs of the backbone.
    """

    epochs: int = 9
    trials: int = 20
    seeds: tuple[int, ...] = SEEDS
    pretraining: int = quickstart.PRETRAIN_EPOCHS


@dataclass(frozen=True)
class Step:
    """A trial was trained to an epoch; None: it failed."""

    number: int
    epoch: int
    value: float | None


@dataclass(frozen=True)
class Search:
    """The steps and the cost of a search.

    Attributes:
        steps: in order.
        epochs: total, as counted by the study.
        full: epochs of a complete trial.
    """

    steps: tuple[Step, ...]
    epochs: int
    full: int

    @property
    def best(self) -> float:
        """Return the best accuracy of the complete trials, in [0, 1]."""
        return max(step.value for step in self._ended() if step.value is not None)

    @property
    def own(self) -> float:
        """Return the accuracy with the values of the spec, which every search starts with."""
        return next(step.value for step in self._ended() if step.number == 0 and step.value is not None)

    def epochs_until(self, value: float) -> int | None:
        """Return the epochs until a trial completed with at least this value; None if none did."""
        done: dict[int, int] = {}
        for step in self.steps:
            done[step.number] = step.epoch
            if step.epoch == self.full and step.value is not None and step.value >= value:
                return sum(done.values())
        return None

    def _ended(self) -> list[Step]:
        return [step for step in self.steps if step.epoch == self.full]


class Table:
    """Accuracies by values and epoch; what is not in it yet is trained.

    Args:
        folder: gets ``table.json``, and what is being trained.
        tree: of the spec that the values change.
        epochs: of a full training.
    """

    def __init__(self, folder: Path, tree: Mapping[str, Any], epochs: int) -> None:
        self.folder, self.tree, self.epochs = folder, tree, epochs
        self._path = folder / "table.json"
        self._facts = {"epochs": epochs, "torch": torch.__version__, "spec": _digest(_without_paths(tree))}
        kept = json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}
        self.values: dict[str, dict[str, float | None]] = kept["values"] if kept.get("facts") == self._facts else {}

    def value(self, params: Mapping[str, Any], epoch: int) -> float | None:
        """The accuracy after an epoch, a share in [0, 1]; None: the training fails before it."""
        key = json.dumps(dict(params), sort_keys=True)
        known = self.values.setdefault(key, {})
        if str(epoch) not in known:
            folder = self._trained / _digest(key)
            if any(int(other) > epoch for other in known):
                shutil.rmtree(folder, ignore_errors=True)  # it has gone past
            known[str(epoch)] = self._train(params, epoch, folder)
            write_atomically(self._path, json.dumps({"facts": self._facts, "values": self.values}, indent=1) + "\n")
            if epoch == self.epochs:
                shutil.rmtree(folder, ignore_errors=True)
        return known[str(epoch)]

    def tidy(self) -> None:
        """Delete checkpoints that no trial continues."""
        shutil.rmtree(self._trained, ignore_errors=True)

    @property
    def _trained(self) -> Path:
        return self.folder / "trainings"

    def _train(self, params: Mapping[str, Any], epoch: int, folder: Path) -> float | None:
        """As a job trains: from its newest checkpoint to the end of an epoch, where it is validated."""
        changes = {
            **params,
            "train.results_dir": str(folder),
            "train.num_epochs": self.epochs,
            "train.validation_interval": self.epochs,
            "train.checkpoint_interval": self.epochs,
            **({"train.stop_after_epoch": epoch} if epoch < self.epochs else {}),
        }
        spec = load_spec(dict(self.tree), [f"{key}={value}" for key, value in changes.items()], action="train")
        with patch.object(run_report, "train_report"), patch.object(train, "show_table"):
            try:
                return train.run(spec)[METRIC]
            except RunError:
                return None


class InProcess(TrialJobs):
    """Trains as ``TrialJobs`` does, in this process instead of jobs; it is its own client.

    Args:
        folder: of the search.
        algorithm: decides how many epochs a job trains.
        table: that knows or trains.
    """

    def __init__(self, folder: Path, algorithm: Algorithm, table: Table) -> None:
        self.folder, self.algorithm, self.table = folder, algorithm, table
        self.client: Any = self
        self.steps: list[Step] = []
        self._jobs: dict[str, Job] = {}

    def train(self, held: HeldTrial, until: int) -> Job:
        """Return a finished job; its status has only the last epoch, the only one that was validated."""
        value = self.table.value(held.params, until)
        self.steps.append(Step(held.number, until, value))
        folder = self.folder_of(held.folder)
        if value is not None:
            StatusLog(folder, append=False).write("RUNNING", f"Epoch {until}", kpi={METRIC: value})
        state: State = "COMPLETE" if value is not None else "ERROR"
        job = Job(
            id=str(len(self._jobs)), action="train", status=state, results_dir=str(self.folder), parent_job_id=None,
            created_at=now(), name=held.folder, platform="local", message="the training failed", exit_code=None,
            results_folder=str(folder), notices=(), transitions=(Transition(now(), state, ""),),
        )  # fmt: skip
        self._jobs[job.id] = job
        return job

    def get_job_status(self, job: str) -> Job:
        """See ``Client``."""
        return self._jobs[job]

    cancel_job = wait = get_job_status

    def get_failure_analysis(self, job: str) -> None:
        """Return None: only the failure itself is known."""


def run(quick: bool) -> Report:
    """Search with every algorithm and seed.

    Raises:
        UserError: a search cannot be made.
        RunError: trainings fail.
    """
    budget = Budget(epochs=3, trials=4, seeds=(0,), pretraining=1) if quick else Budget()
    folder = FOLDER.with_name("automl-quick") if quick else FOLDER
    start = time.perf_counter()
    table = Table(folder, finetuning(folder, budget), budget.epochs)
    return report(measure(table, budget), budget, time.perf_counter() - start)


def finetuning(folder: Path, budget: Budget) -> dict[str, Any]:
    """The quickstart's fine-tuning, shorter, as a tree; the digits and the backbone are made where they are missing."""
    digits = folder / "digits"
    backbone = digits / "pretrain" / "train" / "backbone.safetensors"
    if not backbone.is_file():
        quickstart.write_digits(digits / "images")
        pretraining = quickstart._pretrain_spec(digits, seed=0)
        pretraining["train"]["num_epochs"] = budget.pretraining
        pretraining["train"]["optim"]["warmup_epochs"] = min(2, budget.pretraining - 1)
        with patch.object(run_report, "train_report"), patch.object(train, "show_table"):
            train.run(load_spec(pretraining, action="train"))
    tree = quickstart._finetune_spec(digits, "finetune", 0, backbone)
    optim = tree["train"]["optim"]
    optim["warmup_epochs"] = round(optim["warmup_epochs"] * budget.epochs / tree["train"]["num_epochs"])
    tree["train"]["num_epochs"] = budget.epochs
    return tree


def measure(table: Table, budget: Budget, names: Sequence[str] = ALGORITHMS) -> dict[str, dict[int, Search]]:
    """Every search, by the name of the algorithm and the seed."""
    found: dict[str, dict[int, Search]] = {name: {} for name in names}
    for seed in budget.seeds:
        for name in names:
            begin = time.perf_counter()
            search = found[name][seed] = search_with(name, seed, table, budget)
            took = time.perf_counter() - begin
            told = f"best {search.best:.1%} (own values {search.own:.1%}) in {search.epochs} epochs, {took:.0f} s"
            print(f"seed {seed}, {name}: {told}", file=sys.stderr, flush=True)
        table.tidy()
    return found


def search_with(name: str, seed: int, table: Table, budget: Budget) -> Search:
    """One search, with the code of ``mae automl``."""
    settings = {
        "automl.algorithm": name,
        "automl.max_recommendations": budget.trials,
        "automl.seed": seed,
    }
    with (
        tempfile.TemporaryDirectory() as where,
        patch.object(worker, "_POLL", 0.0),  # nothing runs meanwhile
    ):
        folder = Path(where)
        spec = load_spec(dict(table.tree), [f"{key}={value}" for key, value in settings.items()], action="automl")
        study = Study(spec, folder)
        jobs = InProcess(folder, study.algorithm, table)
        worker.Worker(study, jobs).run()
        return Search(tuple(jobs.steps), sum(trial.epochs for trial in study.summaries()), table.epochs)


def report(found: Mapping[str, Mapping[int, Search]], budget: Budget, seconds: float) -> Report:
    """The table: accuracies in per cent, differences in points, epochs as a share of those that random spent."""
    random = found["random"]
    own = statistics.mean(search.own for search in random.values())
    names = ["random", "bayesian", *(name for name in found if name not in ("random", "bayesian"))]
    rows = [("own values", f"{own:.1%}", "", "", "", str(budget.epochs), "", "", "")]
    data: dict[str, Any] = {"budget": asdict(budget), "own": own, "seconds": seconds, "searches": {}}
    for name in names:
        searches = found[name]
        bests = [search.best for search in searches.values()]
        over_own = [100 * (search.best - search.own) for search in searches.values()]
        over_random = [100 * (search.best - random[seed].best) for seed, search in searches.items()]
        until = {seed: search.epochs_until(random[seed].best) for seed, search in searches.items()}
        shares = [epochs / random[seed].epochs for seed, epochs in until.items() if epochs is not None]
        spent = [search.epochs for search in searches.values()]
        met = {
            "bayesian": statistics.mean(over_own) >= POINTS,
            "asha": len(shares) == len(searches) and statistics.mean(shares) <= SHARE,
        }.get(name)
        rows.append(
            (
                name,
                f"{statistics.mean(bests):.1%}",
                f"{min(bests):.1%} to {max(bests):.1%}, {100 * _deviation(bests):.1f}",
                _mean_and_spread(over_own, ""),
                "" if name == "random" else _mean_and_spread(over_random, ""),
                f"{statistics.mean(spent):.0f}",
                f"{len(shares)} of {len(searches)}",
                _mean_and_spread(shares, "never"),
                "" if met is None else f"{_TARGETS[name]}: {'met' if met else 'MISSED'}",
            )
        )
        data["searches"][name] = {
            "best": bests, "over_own": over_own, "over_random": over_random, "epochs": spent,
            "epochs_until_randoms_best": list(until.values()), "share_of_randoms_epochs": shares, "met": met,
            "steps": [[(step.number, step.epoch, step.value) for step in s.steps] for s in searches.values()],
        }  # fmt: skip
    return Report("What a search is worth", _COLUMNS, rows, data, _notes(budget, seconds))


_TARGETS = {"bayesian": f"{POINTS:g} points over own", "asha": "1/3 of random's epochs"}
_COLUMNS = (
    "search", "best", "min to max, sd", "over own values [points]", "over random [points]", "epochs",
    "reached random's best", "epochs until then / random's", "target",
)  # fmt: skip


def _notes(budget: Budget, seconds: float) -> list[str]:
    return [
        f"Fine-tuning of mae quickstart's pretrained ViT-tiny (32 px) on 10 labelled images per digit, {METRIC} on the "
        f"500 held-out digits; {budget.trials} trials, {len(budget.seeds)} seeds of the search. Over the "
        "seeds: mean, smallest to largest, and standard deviation (sd).",
        f"A trial takes {budget.epochs} epochs instead of {quickstart.FINETUNE_EPOCHS}, with the warmup shortened in "
        "proportion, and is validated only where it is compared. The accuracy is measured on the digits that the "
        "search optimized for: it is optimistic for every search, but not for the values of the spec.",
        "'epochs' are those of a complete search. 'reached' counts the seeds in which a trial ended at least as well "
        "as the best of random with the same seed; 'epochs until then' are a share of all epochs that random used, "
        "over those seeds. With one seed, random and asha draw the same values.",
        f"{torch.get_num_threads()} thread(s); {seconds / 60:.0f} minutes, without what an earlier run had trained.",
    ]


def _mean_and_spread(values: Sequence[float], empty: str) -> str:
    if not values:
        return empty
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f}, sd {_deviation(values):.2f})"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_paths(tree: Mapping[str, Any]) -> str:
    """The tree as text, the same wherever its files lie."""
    return json.dumps(tree, sort_keys=True).replace(str(Path(tree["results_dir"]).parent), "")
