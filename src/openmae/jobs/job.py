"""A job as its record shows it: states, transitions, and the face that callers get."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

State = Literal["PENDING", "RUNNING", "COMPLETE", "ERROR", "CANCELED", "UNKNOWN"]
STATES: tuple[State, ...] = get_args(State)
FINAL = frozenset({"COMPLETE", "ERROR", "CANCELED"})
Record = dict[str, Any]

VERSION = 1  # of the records that this version writes and reads
_TEXT, _NONE = str, type(None)
# What each record has. What a later version adds is kept and ignored, so that an older one can still show the job.
_REQUIRED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "action", "name", "platform", "created_at", "results_dir", "results_folder"), (_TEXT,)),
    **{"parent_job_id": (_TEXT, _NONE), "exit_code": (int, _NONE), "notices": (list,), "transitions": (list,)},
}
# What a record of an early version may lack, with its type and its value there.
_OPTIONAL: dict[str, tuple[tuple[type, ...], Any]] = {
    **{"version": ((int,), VERSION), "host": ((_TEXT,), ""), "handle": ((dict,), {})},
    **{"submitter": ((dict, _NONE), None), "command": ((list,), []), "cwd": ((_TEXT,), "")},
    **{"own_results": ((bool,), False), "outputs": ((list,), [])},
    **{"spec": ((dict,), {}), "explanation": ((list,), []), "cancel_requested": ((_TEXT, _NONE), None)},
    **{"gpus": ((int,), 0), "nodes": ((int,), 1), "processes": ((int,), 1)},
}  # fmt: skip


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


def checked(record: Any, job_id: str) -> Record:
    """Return the record of a job, complete and of the right types.

    Raises:
        ValueError: it is no record of this job that this version can read; the text says why.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it is no JSON object but {_kind(record)}")
    version = record.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise ValueError(f"a newer version of OpenMAE wrote it (record version {version}, this one reads {VERSION})")
    if missing := [name for name in _REQUIRED if name not in record]:
        raise ValueError(f"it has no {', '.join(missing)}")
    record = {name: copy.deepcopy(default) for name, (_, default) in _OPTIONAL.items()} | record
    for name, types in (_REQUIRED | {name: types for name, (types, _) in _OPTIONAL.items()}).items():
        _check_type(name, record[name], types)
    if record["id"] != job_id:
        raise ValueError(f"it is the record of job {record['id']}, but stands in the folder of {job_id}")
    if not record["transitions"]:
        raise ValueError("transitions is empty")
    for item in record["transitions"]:
        _check_type("a transition", item, (dict,))
        for name in ("at", "state", "message"):
            _check_type(f"{name} of a transition", item.get(name), (_TEXT,))
        if item["state"] not in STATES:
            raise ValueError(f"there is no state {item['state']!r}")
        moment(item["at"])
    for name in ("created_at", "cancel_requested"):
        if record[name] is not None:
            moment(record[name])
    for name in ("supervisor", "process"):
        if name in record["handle"]:
            check_identity(f"{name} in handle", record["handle"][name])
    if record["submitter"] is not None:
        check_identity("submitter", record["submitter"])
    return record


def check_identity(name: str, value: Any) -> None:
    """Refuse what does not identify a process; one with missing parts identifies no living one.

    Raises:
        ValueError: it is no object, or its pid is no integer.
    """
    _check_type(name, value, (dict,))
    _check_type(f"pid of {name}", value.get("pid"), (int,))


def _check_type(name: str, value: Any, types: tuple[type, ...]) -> None:
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError(f"{name} must be {' or '.join(_KINDS[one] for one in types)}, but is {_kind(value)}")


_KINDS = {str: "a text", int: "an integer", list: "a list", dict: "an object", bool: "true or false", _NONE: "null"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a number")


def moment(text: str) -> datetime:
    """A point in time from a record; one without an offset is in UTC.

    Raises:
        ValueError: the text is no date and time of ISO 8601.
    """
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is no date and time") from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def as_job(record: Mapping[str, Any]) -> Job:
    """The public face of a record."""
    transitions = tuple(Transition(_utc(item["at"]), item["state"], item["message"]) for item in record["transitions"])
    return Job(
        status=transitions[-1].state,
        message=transitions[-1].message,
        transitions=transitions,
        notices=tuple(record["notices"]),
        created_at=_utc(record["created_at"]),
        **{
            name: record[name]
            for name in (
                *("id", "action", "results_dir", "parent_job_id"),
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


def _utc(text: str) -> str:
    return moment(text).astimezone(UTC).isoformat(timespec="microseconds")


def now() -> str:
    """This moment as ISO 8601 in UTC; the texts sort as the times do."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
