"""The loop of a search: takes recommendations, has them trained as jobs, judges them, and stops what cannot win."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from openmae.automl.algorithms import Algorithm
from openmae.automl.database import STORAGE_ERRORS, reason
from openmae.automl.study import BEAT, EPOCHS, FOLDER, SECONDS, SOURCES, TRIALS, TRIES, Recommendation, Study
from openmae.distributed.topology import gpus_per_node
from openmae.errors import OpenMAEError, Preempted, RunError
from openmae.jobs.artifacts import DELETED, list_folder, newest_checkpoint
from openmae.jobs.client import TRAININGS, Client
from openmae.jobs.job import Job, moment
from openmae.jobs.platforms.local.queue import SLOTS
from openmae.jobs.processes import identify
from openmae.machine import usable_cores
from openmae.spec.describe import fields
from openmae.spec.from_environment import environment_of
from openmae.spec.rules import value_of
from openmae.spec.schema import ExperimentSpec

EQUAL_FAILURES = 3  # in a row, with one cause, that end a search: the next would fail as well
_POLL = 0.5  # seconds
_MODELS = (".pth", ".safetensors")
_WANDB = {"wandb.group": "automl", "wandb.name": "recommendation {}"}
_OF_DATA = ("val_data_sources", "batch_size", "num_workers_per_gpu", "max_corrupt_fraction", "max_megapixels")
_OF_EVALUATION = ("encryption_key", "results_dir", *(f"dataset.{name}" for name in _OF_DATA))
_TAKEN_ALONG = ("status.json", "metrics.csv", "model_best.pth")  # with a training that goes on in another folder

log = logging.getLogger("openmae")


class Trainings:
    """Trains recommendations as jobs, in folders of their own.

    Args:
        spec: that the recommendations change.
        folder: local, of the search.
        algorithm: says how far a recommendation is trained at a time.
        platform: of the jobs.
    """

    def __init__(self, spec: ExperimentSpec, folder: Path, algorithm: Algorithm, platform: str) -> None:
        self.folder = folder
        self.algorithm = algorithm
        # machines that share the folder must not take one another's processes for dead ones
        self.client = Client(platform, root=folder / TRAININGS / (this_machine() if platform == "local" else platform))
        left_out = ("automl.", "wandb.run_id")  # one run of Weights & Biases cannot be all of them
        typed = {key: value_of(spec, key) for key in fields() if spec.typed(key) and not key.startswith(left_out)}
        kept = {key: text for key, text in spec.shown.items() if key in typed and key != "encryption_key"}
        self._specs = {**typed, **kept, "results_dir": str(folder)}  # a job takes care of a key itself
        self._wandb = {key: value for key, value in _WANDB.items() if not spec.typed(key)}
        at_once = spec.automl.max_concurrent
        self._environment = {SLOTS: "1000", **environment_of(kept.values())}  # a worker counts its own jobs
        if platform == "local" and "OMP_NUM_THREADS" not in os.environ and at_once > 1:
            self._environment["OMP_NUM_THREADS"] = str(max(1, usable_cores() // at_once))

    def folder_of(self, name: str) -> Path:
        """Where a recommendation is trained."""
        return self.folder / TRIALS / name

    def start(self, action: str, name: str, overrides: Mapping[str, Any]) -> Job:
        """Start a job, or find the one of this name that was started before.

        Raises:
            UserError: the values are wrong.
            RunError: it could not be started.
        """
        if running := self.running(name):
            return running[-1]
        specs = self._specs if action == "train" else {k: v for k, v in self._specs.items() if k in _OF_EVALUATION}
        with _without_notices():
            return self.client.create_job(
                action, specs, overrides, automl_policy="off" if action == "train" else None,
                gpu_count=gpus_per_node(), env_vars=self._environment, name=name,
            )  # fmt: skip

    def running(self, name: str) -> list[Job]:
        """The jobs of a name that have not ended, and can be seen from here."""
        jobs = [job for job in self.client.list_jobs() if job.name == name]
        return [job for job in jobs if not job.finished and job.status != "UNKNOWN"]

    def train(self, one: Recommendation, until: int) -> Job:
        """Train a recommendation to the end of an epoch, from its newest checkpoint, or the one it goes on from.

        Raises:
            UserError: the values are wrong.
            RunError: it could not be started.
        """
        folder = self.folder_of(one.folder)
        overrides = {
            **one.params,
            "train.num_epochs": self.algorithm.epochs,
            "train.results_dir": str(folder),
            **{key: value.format(one.number) for key, value in self._wandb.items()},
        }
        if until < self.algorithm.epochs:
            overrides["train.stop_after_epoch"] = until
        if newest_checkpoint(list_folder(str(folder))) is None:
            overrides.update(self._beginning(one))
        return self.start("train", _job_name(one.folder, until), overrides)

    def _beginning(self, one: Recommendation) -> dict[str, str]:
        """What a training that another folder holds a part of goes on with."""
        for source in map(self.folder_of, one.sources):
            checkpoint = newest_checkpoint(list_folder(str(source)))
            if checkpoint is None:
                continue
            if self.algorithm.generations == 1:  # the same training, and not one that branches off
                folder = self.folder_of(one.folder)
                folder.mkdir(parents=True, exist_ok=True)
                for name in _TAKEN_ALONG:
                    if (source / name).is_file():
                        shutil.copyfile(source / name, folder / name)
            return {"train.resume_training_checkpoint_path": checkpoint.path}
        return {}

    def running_in(self, name: str) -> list[Job]:
        """The jobs that train a recommendation now."""
        return [job for job in self.client.list_jobs() if job.name.startswith(_job_name(name)) and not job.finished]

    def delete_models(self, name: str, why: str = "") -> None:
        """Delete the checkpoints of a training that cannot win, and note why; its status, metrics and spec stay."""
        for path in self.folder_of(name).glob("*"):
            if path.suffix in _MODELS:
                path.unlink(missing_ok=True)
        if why:
            with suppress(OSError):  # the disk may be full, or the folder was never made
                (self.folder_of(name) / DELETED).write_text(f"{why}\n", encoding="utf-8")


@dataclass
class Running:
    """A recommendation whose training runs.

    Attributes:
        one: the recommendation.
        job: that trains it now.
        until: the epoch after which that job ends.
        seconds: that earlier jobs of it took.
        timed_out: whether it was stopped since it took too long.
    """

    one: Recommendation
    job: Job
    until: int
    seconds: float = 0.0
    timed_out: bool = False

    @property
    def elapsed(self) -> float:
        """Seconds that it has been trained."""
        return self.seconds + _seconds(self.job)


@dataclass
class Worker:
    """Trains recommendations until there are no more.

    Attributes:
        study: shared with other workers.
        trainings: start and find the jobs.
        changed: called after each turn with what runs.
        running: what this worker is at.
    """

    study: Study
    trainings: Trainings
    changed: Callable[[list[Running]], None] = lambda running: None
    running: list[Running] = field(default_factory=list)
    _failures: list[str] = field(default_factory=list)
    _beaten: float = 0.0

    def run(self) -> None:
        """Return when every recommendation of the study has ended, here or with another worker.

        Raises:
            RunError: several recommendations in a row failed for the same reason, or the study cannot be written.
            KeyboardInterrupt: the trainings wrote checkpoints, and the same command goes on with them.
        """
        try:
            while self._turn():
                time.sleep(_POLL)
        except STORAGE_ERRORS as error:
            self._stop([running.job.id for running in self.running])
            raise RunError(
                f"The study cannot be read or written: {reason(error)}.",
                "Make room where the disk is full, or look at the database; the same command goes on.",
            ) from error
        except BaseException:
            try:
                self._let_go()
            except STORAGE_ERRORS as error:
                log.warning("The study cannot be read or written: %s.", reason(error))
            raise

    def _turn(self) -> bool:
        """Look after what runs, and fill up; returns whether there is anything left."""
        for running in list(self.running):
            self._attend(running)
        while len(self.running) < self.trainings.algorithm.settings.max_concurrent:
            one = self.study.next()
            if one is None:
                break
            self._begin(one)
        if time.monotonic() - self._beaten > BEAT:
            for running in list(self.running):
                if not self.study.beat(running.one):
                    self._drop(running)
            self._beaten = time.monotonic()
        self.changed(self.running)
        left = self.study.count() < self.trainings.algorithm.recommendations
        return bool(self.running or left or self.study.unfinished())

    def _begin(self, one: Recommendation, seconds: float = 0.0) -> None:
        attrs = one.trial.user_attrs
        until = self._until(one.number, int(attrs.get(EPOCHS) or 0))
        try:
            job = self.trainings.train(one, until)
        except OpenMAEError as error:
            self._fail(one, f"{'spec' if error.exit_code == 2 else 'infrastructure'}: {first_line(error.problem)}")
            return
        self.running.append(Running(one, job, until, seconds or float(attrs.get(SECONDS) or 0.0)))

    def _until(self, number: int, done: int) -> int:
        """The epoch to which a recommendation is trained next."""
        algorithm = self.trainings.algorithm
        if algorithm.generations == 1:
            return next(epochs for epochs in algorithm.rungs if epochs > done or epochs == algorithm.epochs)
        generation = min(number // algorithm.settings.population_size, algorithm.generations - 1)
        return -(-algorithm.epochs * (generation + 1) // algorithm.generations)

    def _attend(self, running: Running) -> None:
        client = self.trainings.client
        job = running.job = client.get_job_status(running.job.id)
        limit, seconds = self.trainings.algorithm.settings.timeout, running.elapsed
        if not job.finished:
            if limit and seconds > limit and not running.timed_out:
                running.timed_out = True
                client.cancel_job(job.id)
            return
        self.running.remove(running)
        if not self.study.note(running.one, SECONDS, seconds):
            return  # another worker has taken it over
        if running.timed_out:
            self._fail(running.one, f"timeout: it was not done after {limit:g} seconds (automl.timeout)")
        elif job.status == "CANCELED" and job.exit_code == Preempted.exit_code:
            log.warning("Recommendation %d was preempted, and goes on.", running.one.number)
            self._begin(running.one, seconds)
        elif job.status == "CANCELED":
            self._fail(running.one, "canceled: somebody else stopped its job")
        elif job.status == "ERROR":
            failure = client.get_failure_analysis(job.id)
            cause = f"{failure.category}: {first_line(failure.error)}" if failure else job.message
            # where others were trained, values that diverge are to blame themselves
            self._fail(running.one, cause, shared=not (failure and failure.diverged and self.study.best()))
        else:
            self._judge(running, seconds)

    def _judge(self, running: Running, seconds: float) -> None:
        """Report the value of a training, and end it, stop it early, or train it on."""
        one, study = running.one, self.study
        value = study.objective.value_of(self.trainings.folder_of(one.folder))
        if value is None:
            self._fail(one, f"spec: it told no finite {study.objective.metric}", shared=study.best() is None)
            return
        self._failures.clear()
        if not study.report(one, value, running.until):
            return
        last = running.until >= self.trainings.algorithm.epochs or self.trainings.algorithm.generations > 1
        if last:
            self._end(one, TrialState.COMPLETE, value)
        elif one.trial.should_prune():
            self._end(one, TrialState.PRUNED)
        else:
            self._begin(one, seconds)

    def _fail(self, one: Recommendation, cause: str, *, shared: bool = True) -> None:
        """End a recommendation; what the machine is to blame for is tried again, some times.

        Args:
            one: the recommendation.
            cause: with its category in front.
            shared: whether the next one may fail for the same reason.
        """
        tries = int(one.trial.user_attrs.get(TRIES) or 0) + 1
        if cause.startswith("infrastructure") and tries < EQUAL_FAILURES:
            self.study.note(one, TRIES, tries)
            self.study.leave(one.number)
        else:
            self._end(one, TrialState.FAIL, cause=cause)
        log.warning("Recommendation %d failed: %s", one.number, cause)
        if not shared:
            return
        self._failures.append(re.sub(r"\d+", "#", cause.replace(one.folder, "#")))
        alike = self._failures[-EQUAL_FAILURES:]
        if len(alike) == EQUAL_FAILURES and len(set(alike)) == 1:
            raise RunError(
                f"{EQUAL_FAILURES} recommendations in a row failed for the same reason: {cause}",
                "Mend the cause; the same command goes on with the recommendations that are left. The whole log: "
                f"{self.trainings.folder / TRAININGS}.",
            )

    def _end(self, one: Recommendation, state: TrialState, value: float | None = None, cause: str = "") -> None:
        if self.study.end(one, state, value, cause):
            self._tidy()

    def _tidy(self) -> None:
        """Delete the checkpoints that no recommendation needs any more."""
        algorithm = self.trainings.algorithm
        if algorithm.settings.keep_all:
            return
        trials, best = self.study.trials(), self.study.best()  # in this order: one that ends in between is kept
        size = algorithm.settings.population_size
        newest = max((trial.number // size for trial in trials), default=0)
        for trial in trials:
            needed = algorithm.generations > 1 and trial.number // size >= newest - 1
            if not trial.state.is_finished() or needed:
                continue
            if best is None or trial.number != best.number:
                self.trainings.delete_models(trial.user_attrs[FOLDER], self.study.why_deleted(trial))
            for name in trial.user_attrs[SOURCES]:
                if algorithm.generations == 1:  # else they are another one's, and judged with it
                    self.trainings.delete_models(name)

    def _drop(self, running: Running) -> None:
        """Stop a training that another machine's worker has taken over, in a folder of its own."""
        log.warning("Recommendation %d was taken over by another worker.", running.one.number)
        self.running.remove(running)
        self.trainings.client.cancel_job(running.job.id)

    def _let_go(self) -> None:
        """Stop the jobs, and leave the recommendations to whoever goes on."""
        mine, client = self.study.mine(), self.trainings.client
        self._stop([job.id for trial in mine for job in self.trainings.running_in(trial.user_attrs[FOLDER])])
        for running in self.running:
            seconds = running.seconds + _seconds(client.get_job_status(running.job.id))
            self.study.note(running.one, SECONDS, seconds)
        for trial in mine:
            self.study.leave(trial.number)
        self.running.clear()

    def _stop(self, jobs: list[str]) -> None:
        for job in jobs:
            self.trainings.client.cancel_job(job)
        for job in jobs:
            log.info("%s", self.trainings.client.wait(job).message)


@contextmanager
def _without_notices() -> Iterator[None]:
    """What is to be noticed in the spec was told once, and stands in each job's log."""
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def this_machine() -> str:
    """A name that another machine, or this one after a new start, does not have."""
    host, process = socket.gethostname(), identify(os.getpid()) or {}
    start = hashlib.sha256(f"{host} {process.get('boot', '')}".encode()).hexdigest()
    return f"{host}-{start[:6]}"


def _seconds(job: Job) -> float:
    """How long a job has run; the time in a queue, also after a preemption, is none of it."""
    times = [moment(item.at) for item in job.transitions]
    ends = [*times[1:], datetime.now(tz=UTC)]
    spans = zip(job.transitions, times, ends, strict=True)
    return sum((end - begin).total_seconds() for item, begin, end in spans if item.state == "RUNNING")


def _job_name(folder: str, until: int | None = None) -> str:
    return f"{folder} to epoch {until or ''}"


def first_line(text: str) -> str:
    """Of a text that may be empty."""
    return text.strip().splitlines()[0] if text.strip() else "it said nothing"
