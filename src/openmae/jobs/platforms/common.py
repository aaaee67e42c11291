"""The interface of a platform, which is a place where jobs run, and what platforms share."""

from __future__ import annotations

import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import ClassVar, Generic, TypeVar

from openmae.distributed.topology import LAUNCHERS
from openmae.errors import RunError, SpecError
from openmae.jobs.job import Record
from openmae.jobs.outcome import JobOutcome
from openmae.jobs.processes import stop_session
from openmae.jobs.store import RECORD, JobStore
from openmae.machine import Identity, is_running

GRACE = "OPENMAE_JOB_GRACE"
_POLL = 0.1
_FRESH = 1.0  # seconds that an answer remains valid

_Answer = TypeVar("_Answer")


class Platform(ABC):
    """A place where jobs run.

    Args:
        store: Where the records of the jobs are; the platform adds transitions.
    """

    name: ClassVar[str]

    def __init__(self, store: JobStore) -> None:
        self.store = store

    @abstractmethod
    def check(self, gpus: int, nodes: int) -> None:
        """Refuse a job that could never start, before anything is written.

        Raises:
            SpecError: It needs more GPUs or nodes than the platform has.
            RunError: The platform cannot be reached.
        """

    @abstractmethod
    def submit(self, job_id: str, environment: Mapping[str, str]) -> None:
        """Start or queue a job in the state PENDING; it outlives this process.

        Args:
            job_id: The record has the command, the working directory, ``gpus`` and ``nodes``.
            environment: Variables in addition to those of this process. Their values are secret: they must not appear
                in a file or a process list.

        Raises:
            RunError: It cannot be started.
        """

    @abstractmethod
    def observe(self, record: Record) -> JobOutcome | None:
        """Return what the platform reports about a job that has not ended; None if the record is up to date."""

    @abstractmethod
    def cancel(self, job_id: str) -> None:
        """Stop a job whose record has ``cancel_requested``; return before it has stopped."""


class Fresh(Generic[_Answer]):
    """Answers that are reused for a second, so that nothing slow is asked for each of a thousand jobs."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[float, _Answer]] = {}

    def get(self, key: str, ask: Callable[[], _Answer]) -> _Answer:
        """Return the answer for ``key``, and ask if there is none from the last second."""
        when, *known = self._answers.get(key, (0.0,))
        if known and time.monotonic() - when < _FRESH:
            return known[0]
        answer = ask()
        self._answers[key] = (time.monotonic(), answer)
        return answer

    def forget(self, key: str) -> None:
        """Ask the next time."""
        self._answers.pop(key, None)


def inherited_environment() -> dict[str, str]:
    """Return the variables of this process without those of a launcher that started it: a job is a separate run."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHERS}


def grace_seconds() -> float:
    """Return how long a canceled job may take to write its checkpoint: OPENMAE_JOB_GRACE, or 60 seconds."""
    return float(os.environ.get(GRACE, "60"))


def cluster_name(job_id: str) -> str:
    """Return the name of a job in SLURM and Ray."""
    return f"mae-{job_id}"


def before_submission(record: Record, cluster: str) -> JobOutcome | None:
    """Return the outcome of a job that the cluster does not know and whose record has no id of the cluster."""
    if is_running(record.submitter):
        return None
    return JobOutcome("ERROR", f"the client died before the job was submitted to {cluster}")


def cancel_pending(store: JobStore, job_id: str) -> bool:
    """Cancel a job that has not started; return whether it was one."""
    with store.update(job_id) as record:
        return record.state == "PENDING" and record.move("CANCELED", "canceled before it started")


def wait(
    store: JobStore,
    job_id: str,
    process: subprocess.Popen[bytes],
    identity: Identity,
    give_up: Callable[[], bool] = lambda: False,
) -> int | None:
    """Wait for the process of a job, and stop it if the job is canceled or its record is deleted.

    The record is read when its file changes. Without a record the job is stopped, since it could not be canceled.

    Args:
        store: Where the record is.
        job_id: Id of the job.
        process: The job's first process, a child of this one.
        identity: Its identity.
        give_up: Asked continually whether to return at once.

    Returns:
        The exit code, or None if ``give_up`` returned True.
    """
    path, seen = store.folder(job_id) / RECORD, 0
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=_POLL)
        if give_up():
            return None
        try:
            changed = path.stat().st_mtime_ns
            if changed == seen:
                continue
            canceled = store.read(job_id).cancel_requested is not None
        except (FileNotFoundError, NotADirectoryError, SpecError):
            canceled = True
        except (OSError, RunError):  # a disk that does not respond, or a damaged record: the job can continue
            continue
        seen = changed
        if canceled:
            stop_session(identity, grace_seconds())
            return process.wait()
