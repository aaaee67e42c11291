"""The interface of a platform, and functions that platforms share."""

from __future__ import annotations

import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Generic, TypeVar

from openmae.distributed.topology import LAUNCHERS
from openmae.errors import RunError, SpecError
from openmae.jobs.job import Record
from openmae.jobs.outcome import JobOutcome
from openmae.jobs.processes import stop_session
from openmae.jobs.store import JobStore
from openmae.machine import Identity, is_running
from openmae.storage import layout

GRACE = "OPENMAE_JOB_GRACE"
_POLL = 0.1
_FRESH = 1.0  # seconds for which an answer is cached

_Answer = TypeVar("_Answer")


class Platform(ABC):
    """A place where jobs run: this machine or a cluster."""

    def __init__(self, store: JobStore) -> None:
        self.store = store

    @abstractmethod
    def check(self, gpus: int, nodes: int) -> None:
        """Raise an error if a job with these resources could never start; called before anything is stored.

        Raises:
            SpecError: The job needs more GPUs or nodes than the platform has.
            RunError: The platform cannot be reached.
        """

    @abstractmethod
    def submit(self, job_id: str, environment: Mapping[str, str]) -> None:
        """Start or queue a PENDING job, whose record is stored, in such a way that it outlives this process.

        ``environment`` is added to the variables of this process. Its values are secret: they must not appear in a
        process list, nor unencrypted in a file.

        Raises:
            RunError: The job cannot be started.
        """

    @abstractmethod
    def observe(self, record: Record) -> JobOutcome | None:
        """Return the state of a job whose record is not in a final state; None if the record is up to date."""

    @abstractmethod
    def cancel(self, job_id: str) -> None:
        """Stop a job, whose ``cancel_requested`` is already recorded, without waiting for its end."""


class Fresh(Generic[_Answer]):
    """A cache of slow queries whose entries expire after a second, so that listing many jobs is fast."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[_Answer, float]] = {}

    def get(self, key: str, ask: Callable[[], _Answer]) -> _Answer:
        """Return the cached answer for ``key``; call ``ask`` if there is none or it has expired."""
        if key not in self._answers or time.monotonic() - self._answers[key][1] >= _FRESH:
            self._answers[key] = ask(), time.monotonic()
        return self._answers[key][0]

    def forget(self, key: str) -> None:
        """Remove the answer for ``key``."""
        self._answers.pop(key, None)


def inherited_environment() -> dict[str, str]:
    """Return the environment of this process without a launcher's variables, since a job is a separate run."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHERS}


def read_number(variable: str, unit: str, default: int = 1, least: int = 1) -> int:
    """Return the number in an environment variable.

    Raises:
        SpecError: It is not an integer, or too small.
    """
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or int(text) < least:
        raise SpecError(
            f"{variable} must be a number of {unit}, {least} or more, got {text!r}.",
            f"Set it to an integer, or unset it for {default}.",
        )
    return int(text)


def grace_seconds() -> int:
    """Return the seconds that a canceled job may take to write its checkpoint: OPENMAE_JOB_GRACE, or 60."""
    return read_number(GRACE, "seconds", default=60, least=0)


def cluster_name(job_id: str) -> str:
    """Return the name of a job in SLURM and Ray."""
    return f"mae-{job_id}"


def before_submission(record: Record, step: str = "started") -> JobOutcome | None:
    """Return the outcome of a job that is not known to its platform, since ``step`` has not happened yet."""
    if is_running(record.submitter):
        return None
    return JobOutcome("ERROR", f"the client died before the job was {step}")


def cancel_pending(store: JobStore, job_id: str) -> bool:
    """Cancel a job if it has not started; return whether it was canceled."""
    with store.update(job_id) as record:
        return record.state == "PENDING" and record.move("CANCELED", "canceled before it started")


def wait(
    store: JobStore,
    job_id: str,
    process: subprocess.Popen[bytes],
    identity: Identity,
    give_up: Callable[[], bool] = lambda: False,
) -> int | None:
    """Wait for the first process of a job, a child of this process, and return its exit code.

    The job is stopped if it is canceled or its record is deleted. If ``give_up`` returns True, return None at once.
    """
    path, seen = store.folder(job_id) / layout.JOB_RECORD, 0
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
        except (OSError, RunError):  # the disk does not respond or the record is damaged; let the job continue
            continue
        seen = changed
        if canceled:
            stop_session(identity, grace_seconds())
            return process.wait()
