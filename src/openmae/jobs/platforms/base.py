"""What a place where jobs run has to do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from openmae.distributed.topology import LAUNCHERS
from openmae.jobs.job import Record, State


class Observation(NamedTuple):
    """What a platform sees of a job that its record does not say yet."""

    state: State
    message: str
    exit_code: int | None = None


def inherited_environment() -> dict[str, str]:
    """Return this process's variables, without those of the launcher that started it: a job is a run of its own."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHERS}


class Platform(Protocol):
    """A place where jobs run. It appends transitions through the store that it was made with."""

    name: str

    def check(self, gpus: int, nodes: int) -> None:
        """Refuse, before anything is written, what could never start.

        Raises:
            SpecError: more GPUs or nodes than the place has.
            RunError: the place is not there.
        """

    def submit(self, job_id: str, environment: Mapping[str, str]) -> None:
        """Start a job whose record is PENDING, or queue it; it outlives this process.

        Args:
            job_id: its record has the command, the working folder, ``gpus`` and ``nodes``.
            environment: variables besides this process's own. Values are secret: they must not reach a file or a
                process list.

        Raises:
            RunError: it cannot be started.
        """

    def observe(self, record: Record) -> Observation | None:
        """How a job stands that is not at its end; None where the record is right as it is."""

    def cancel(self, job_id: str) -> None:
        """Stop a job whose record says ``cancel_requested``; returns before it has stopped."""
