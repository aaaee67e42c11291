"""The loop of a worker: run trials as jobs, compare them after each rung, and stop those that are behind."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from optuna.trial import TrialState

from openmae.automl.database import STORAGE_ERRORS, reason
from openmae.automl.study import BEAT, EPOCHS, FOLDER, SECONDS, SOURCES, TRIES, HeldTrial, Study
from openmae.automl.trial_jobs import TrialJobs
from openmae.errors import OpenMAEError, Preempted, RunError
from openmae.jobs.client import TRAININGS
from openmae.jobs.job import Job, parse_time

EQUAL_FAILURES = 3  # consecutive failures with the same cause that end a search
_POLL = 0.5  # seconds

log = logging.getLogger("openmae")


@dataclass
class RunningTrial:
    """A trial and its current job, which ends after epoch ``until``.

    ``seconds`` is the duration of its earlier jobs. The job of a trial that exceeds ``automl.timeout`` is cancelled and
    marked as ``timed_out``.
    """

    held: HeldTrial
    job: Job
    until: int
    seconds: float = 0.0
    timed_out: bool = False

    @property
    def elapsed(self) -> float:
        """Seconds of training so far."""
        return self.seconds + _seconds(self.job)


@dataclass
class Worker:
    """Runs trials until none are left; ``changed`` is called with its running trials after each turn."""

    study: Study
    jobs: TrialJobs
    changed: Callable[[list[RunningTrial]], None] = lambda running: None
    running: list[RunningTrial] = field(default_factory=list)
    _failures: list[str] = field(default_factory=list)
    _beat_at: float = 0.0

    def run(self) -> None:
        """Run until every trial of the study has ended, in this worker or in another one.

        Raises:
            RunError: ``EQUAL_FAILURES`` trials in a row failed for the same reason, or the study cannot be read or
                written.
            KeyboardInterrupt: the jobs have written checkpoints; the same command continues the search.
        """
        try:
            while self.turn():
                time.sleep(_POLL)
        except STORAGE_ERRORS as error:
            self.jobs.cancel_all([running.held.folder for running in self.running])
            raise RunError(
                f"The study cannot be read or written: {reason(error)}.",
                "Free space if the disk is full, or check the database; the same command continues the search.",
            ) from error
        except BaseException:
            try:
                self._release_all()
            except STORAGE_ERRORS as error:
                log.warning("The study cannot be read or written: %s.", reason(error))
            raise

    def turn(self) -> bool:
        """Check the running jobs and start trials up to ``automl.max_concurrent``; return whether work is left."""
        for running in list(self.running):
            self._look_at(running)
        while len(self.running) < self.jobs.algorithm.settings.max_concurrent:
            held = self.study.next()
            if held is None:
                break
            self._start(held)
        if time.monotonic() - self._beat_at > BEAT:
            for running in list(self.running):
                if not self.study.beat(running.held):
                    log.warning("Another worker took over trial %d.", running.held.number)
                    self.running.remove(running)
                    self.jobs.client.cancel_job(running.job.id)
            self._beat_at = time.monotonic()
        self.changed(self.running)
        left = len(self.study.trials()) < self.jobs.algorithm.trials
        return bool(self.running or left or self.study.unfinished())

    def _start(self, held: HeldTrial, seconds: float = 0.0) -> None:
        attrs = held.trial.user_attrs
        until = self._until(held.number, int(attrs.get(EPOCHS) or 0))
        try:
            job = self.jobs.train(held, until)
        except OpenMAEError as error:
            self._fail(held, f"{'spec' if error.exit_code == 2 else 'infrastructure'}: {first_line(error.problem)}")
            return
        self.running.append(RunningTrial(held, job, until, seconds or float(attrs.get(SECONDS) or 0.0)))

    def _until(self, number: int, done: int) -> int:
        algorithm = self.jobs.algorithm
        if algorithm.generations == 1:
            return next(epochs for epochs in algorithm.rungs if epochs > done or epochs == algorithm.epochs)
        generation = min(number // algorithm.settings.population_size, algorithm.generations - 1)
        return -(-algorithm.epochs * (generation + 1) // algorithm.generations)

    def _look_at(self, running: RunningTrial) -> None:
        client, held = self.jobs.client, running.held
        job = running.job = client.get_job_status(running.job.id)
        limit, seconds = self.jobs.algorithm.settings.timeout, running.elapsed
        if not job.finished:
            if limit and seconds > limit and not running.timed_out:
                running.timed_out = True
                client.cancel_job(job.id)
            return
        self.running.remove(running)
        if not self.study.note(held, SECONDS, seconds):
            return  # another worker has taken it over
        if running.timed_out:
            self._fail(held, f"timeout: it did not finish within {limit:g} seconds (automl.timeout)")
        elif job.status == "CANCELED" and job.exit_code == Preempted.exit_code:
            log.warning("Trial %d was preempted; it continues from its checkpoint.", held.number)
            self._start(held, seconds)
        elif job.status == "CANCELED":
            self._fail(held, "canceled: its job was canceled, but not by the search")
        elif job.status == "ERROR":
            failure = client.get_failure_analysis(job.id)
            cause = f"{failure.category}: {first_line(failure.error)}" if failure else job.message
            # If another trial succeeded, the loss diverged because of the parameters of this one.
            self._fail(held, cause, shared=not (failure and failure.diverged and self.study.best()))
        else:
            self._judge(held, running.until, seconds)

    def _judge(self, held: HeldTrial, epoch: int, seconds: float) -> None:
        value = self.study.objective.value_of(self.jobs.folder_of(held.folder))
        if value is None:
            cause = f"spec: it reported no finite {self.study.objective.metric}"
            self._fail(held, cause, shared=self.study.best() is None)
            return
        self._failures.clear()
        if not self.study.report(held, value, epoch):
            return
        if epoch >= self.jobs.algorithm.epochs or self.jobs.algorithm.generations > 1:
            self._end(held, TrialState.COMPLETE, value)
        elif held.trial.should_prune():
            self._end(held, TrialState.PRUNED)
        else:
            self._start(held, seconds)

    def _fail(self, held: HeldTrial, cause: str, *, shared: bool = True) -> None:
        """End a trial as failed, or release it for another attempt after an infrastructure failure.

        ``cause`` starts with its category; ``shared`` is whether other trials may fail for the same reason. Raise
        RunError if the last ``EQUAL_FAILURES`` such failures have the same cause.
        """
        tries = int(held.trial.user_attrs.get(TRIES) or 0) + 1
        if cause.startswith("infrastructure") and tries < EQUAL_FAILURES:
            self.study.note(held, TRIES, tries)
            self.study.release(held.number)
        else:
            self._end(held, TrialState.FAIL, cause=cause)
        log.warning("Trial %d failed: %s", held.number, cause)
        if not shared:
            return
        self._failures.append(re.sub(r"\d+", "#", cause.replace(held.folder, "#")))
        last = self._failures[-EQUAL_FAILURES:]
        if len(last) == EQUAL_FAILURES and len(set(last)) == 1:
            raise RunError(
                f"{EQUAL_FAILURES} trials in a row failed for the same reason: {cause}",
                "Fix the cause; the same command continues with the trials that are left. The complete logs are in "
                f"{self.jobs.folder / TRAININGS}.",
            )

    def _end(self, held: HeldTrial, state: TrialState, value: float | None = None, cause: str = "") -> None:
        if self.study.end(held, state, value, cause) and not self.jobs.algorithm.settings.keep_all:
            self._delete_models()

    def _delete_models(self) -> None:
        algorithm = self.jobs.algorithm
        trials, best = self.study.trials(), self.study.best()  # in this order, to keep a trial that ends in between
        size = algorithm.settings.population_size
        newest = max((trial.number // size for trial in trials), default=0)
        for trial in trials:
            needed = algorithm.generations > 1 and trial.number // size >= newest - 1
            if not trial.state.is_finished() or needed:
                continue
            if best is None or trial.number != best.number:
                self.jobs.delete_models(trial.user_attrs[FOLDER], self.study.why_deleted(trial))
            if algorithm.generations == 1:  # the sources of pbt are other trials
                for name in trial.user_attrs[SOURCES]:
                    self.jobs.delete_models(name)

    def _release_all(self) -> None:
        mine = self.study.mine()
        self.jobs.cancel_all([trial.user_attrs[FOLDER] for trial in mine])
        for running in self.running:
            seconds = running.seconds + _seconds(self.jobs.client.get_job_status(running.job.id))
            self.study.note(running.held, SECONDS, seconds)
        for trial in mine:
            self.study.release(trial.number)
        self.running.clear()


def _seconds(job: Job) -> float:
    """Return the seconds that a job has run, without its time in the queue."""
    times = [parse_time(item.at) for item in job.transitions]
    ends = [*times[1:], datetime.now(tz=UTC)]
    spans = zip(job.transitions, times, ends, strict=True)
    return sum((end - begin).total_seconds() for item, begin, end in spans if item.state == "RUNNING")


def first_line(text: str) -> str:
    """Return the first line of a message."""
    return text.strip().splitlines()[0] if text.strip() else "no message"
