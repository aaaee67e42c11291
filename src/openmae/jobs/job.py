"""A job as its record shows it: states, transitions, and the face that callers get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

State = Literal["PENDING", "RUNNING", "COMPLETE", "ERROR", "CANCELED", "UNKNOWN"]
STATES: tuple[State, ...] = get_args(State)
FINAL = frozenset({"COMPLETE", "ERROR", "CANCELED"})
Record = dict[str, Any]


@dataclass(frozen=True)
class Transition:
    """A change of state: when (ISO 8601, UTC), to what, and what the platform said."""

    at: str
    state: State
    message: str


@dataclass(frozen=True)
class Job:
    """A job at one moment.

    Attributes:
        id: names it everywhere.
        action: train, evaluate, inference, export or gen_trt_engine.
        status: one of ``STATES``; a platform's own word for it stands in ``message``.
        results_dir: of the spec; the action's own folder is ``results_folder``.
        parent_job_id: the job that its model comes from.
        created_at: ISO 8601, UTC.
        name: the user's, or the action's.
        platform: where it runs.
        message: of the last transition.
        exit_code: of the action (0, 1, 2, 75, 130; minus the signal that ended it), once it is known.
        results_folder: where the action writes.
        notices: what was worth saying when it was submitted.
        transitions: all of them, oldest first.
    """

    id: str
    action: str
    status: State
    results_dir: str
    parent_job_id: str | None
    created_at: str
    name: str
    platform: str
    message: str
    exit_code: int | None
    results_folder: str
    notices: tuple[str, ...]
    transitions: tuple[Transition, ...]

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in FINAL

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def as_job(record: Mapping[str, Any]) -> Job:
    """The public face of a record."""
    transitions = tuple(Transition(**item) for item in record["transitions"])
    return Job(
        status=transitions[-1].state,
        message=transitions[-1].message,
        transitions=transitions,
        notices=tuple(record["notices"]),
        **{
            name: record[name]
            for name in (
                *("id", "action", "results_dir", "parent_job_id", "created_at"),
                *("name", "platform", "exit_code", "results_folder"),
            )
        },
    )


def state_of(record: Mapping[str, Any]) -> State:
    """The state after the last transition."""
    return record["transitions"][-1]["state"]


def move(record: Record, state: State, message: str, exit_code: int | None = None) -> bool:
    """Append a transition, unless the job is at its end already; returns whether it was appended."""
    if state_of(record) in FINAL:
        return False
    record["transitions"].append({"at": now(), "state": state, "message": message})
    if exit_code is not None:
        record["exit_code"] = exit_code
    return True


def now() -> str:
    """This moment as ISO 8601 in UTC; the texts sort as the times do."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
