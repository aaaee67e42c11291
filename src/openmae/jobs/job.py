"""``Record``, the content of a job's file ``job.json``, and ``Job``, the public view of it."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from openmae.machine import Identity

Time = Annotated[str, "ISO 8601; in UTC if it has no time zone"]
State = Literal["PENDING", "RUNNING", "COMPLETE", "ERROR", "CANCELED", "UNKNOWN"]
STATES: tuple[State, ...] = get_args(State)
FINAL = frozenset({"COMPLETE", "ERROR", "CANCELED"})
VERSION = 1  # of the record format
_KINDS = {
    str: "a string",
    int: "an integer",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    NoneType: "null",
}


@dataclass(frozen=True)
class Transition:
    """A change of state: its time, the new state, and the platform's message."""

    at: Time
    state: State
    message: str


@dataclass(frozen=True)
class Job:
    """A job at one moment.

    Attributes:
        action: train, evaluate, inference, export or gen_trt_engine.
        status: One of ``STATES``; ``message`` may have the platform's name for it.
        results_dir: ``results_dir`` of the spec. The action writes to ``results_folder``.
        parent_job_id: Id of the job whose model this job uses.
        created_at: ISO 8601, UTC.
        name: Name given by the user, or the action.
        exit_code: Exit code of the action (0, 1, 2, 75 or 130), or minus the number of the signal that killed it;
            None if it is not known.
        results_folder: Folder or URL that the action writes to.
        notices: Notices logged at submission.
        transitions: All transitions, oldest first.
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
        """True if the job is in a final state."""
        return self.status in FINAL

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict, for JSON."""
        return asdict(self)


@dataclass
class Handle:
    """The data by which a platform identifies a job.

    Attributes:
        supervisor, process: Processes of a local job; ``process`` is the first process of the action.
        slurm_job: SLURM's job id.
        ray: Address of the Ray cluster to which the job was submitted.
    """

    supervisor: Identity | None = None
    process: Identity | None = None
    slurm_job: str | None = None
    ray: str | None = None


@dataclass
class Record:
    """Everything that is stored about a job. Fields with a default may be missing in records of early versions.

    Fields that are not listed here are described in ``Job``.

    Attributes:
        transitions: Append-only; see ``move``.
        host: Machine on which the job was submitted.
        submitter: Process that submitted the job.
        own_results: True if ``results_dir`` was not set in the spec, so that only this job uses it.
        outputs: Output files named in the spec, which may be outside ``results_folder``.
        spec: Merged spec, without the value of the encryption key.
        explanation: Origin of each value in the spec.
        cancel_requested: Time of the first request to cancel the job.
        gpus: GPUs per node.
        processes: Processes per node.
        image: Requested container image; not used.
        env_vars: Names of the variables in the request.
        later: Fields written by a later version of OpenMAE, kept unchanged.
    """

    id: str
    action: str
    name: str
    platform: str
    created_at: Time
    results_dir: str
    results_folder: str
    parent_job_id: str | None
    exit_code: int | None
    notices: list[str]
    transitions: list[Transition]
    version: int = VERSION
    host: str = ""
    handle: Handle = field(default_factory=Handle)
    submitter: Identity | None = None
    command: list[str] = field(default_factory=list)
    cwd: str = ""
    own_results: bool = False
    outputs: list[str] = field(default_factory=list)
    spec: dict[str, Any] = field(default_factory=dict)
    explanation: list[dict[str, Any]] = field(default_factory=list)
    cancel_requested: Time | None = None
    gpus: int = 0
    nodes: int = 1
    processes: int = 1
    image: str | None = None
    env_vars: list[str] = field(default_factory=list)
    later: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """State after the last transition."""
        return self.transitions[-1].state

    @property
    def message(self) -> str:
        """Message of the last transition."""
        return self.transitions[-1].message

    @property
    def is_search(self) -> bool:
        """True if the job is a hyperparameter search."""
        return "automl" in self.command

    def move(self, state: State, message: str, exit_code: int | None = None) -> bool:
        """Append a transition unless the job is in a final state; return whether it was appended."""
        if self.state in FINAL:
            return False
        self.transitions.append(Transition(now(), state, message))
        if exit_code is not None:
            self.exit_code = exit_code
        return True

    def to_job(self) -> Job:
        """Return the public view of this record."""
        values = {item.name: getattr(self, item.name) for item in fields(Job) if item.name != "status"}
        transitions = tuple(Transition(_utc(item.at), item.state, item.message) for item in self.transitions)
        values |= {"created_at": _utc(self.created_at), "notices": tuple(self.notices), "transitions": transitions}
        return Job(**values, status=self.state)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``job.json``."""
        values = asdict(self)
        return values.pop("later") | values

    @classmethod
    def from_dict(cls, values: Any, job_id: str) -> Record:
        """Validate ``values``, the parsed ``job.json`` of the job ``job_id``, and return a record.

        Raises:
            ValueError: The record is invalid or was written by a newer version; the message has the reason.
        """
        from_json(values, dict, "the record")
        version = values.get("version", VERSION)
        if isinstance(version, int) and version > VERSION:
            raise ValueError(
                f"a newer version of OpenMAE wrote it (record version {version}, this one reads {VERSION})"
            )
        known = {name: from_json(values[name], hint, name) for name, hint in _TYPES.items() if name in values}
        if missing := [name for name in _REQUIRED if name not in known]:
            raise ValueError(f"it has no {', '.join(missing)}")
        record = cls(**known, later={name: value for name, value in values.items() if name not in _TYPES})
        if record.id != job_id:
            raise ValueError(f"it is the record of job {record.id} in the folder of job {job_id}")
        if not record.transitions:
            raise ValueError("transitions is empty")
        return record


@functools.cache
def _types_of(dataclass_type: type) -> dict[str, Any]:
    return get_type_hints(dataclass_type, include_extras=True)


_TYPES = {name: hint for name, hint in _types_of(Record).items() if name != "later"}
_REQUIRED = list(_TYPES)[: list(_TYPES).index("version")]


def from_json(value: Any, hint: Any, name: str) -> Any:
    """Return a JSON value as the type of a field. An object becomes a dataclass, without its unknown fields.

    Of lists and objects that are no dataclass, the content is not checked, except for transitions and identities.

    Raises:
        ValueError: The value has another type, or is not a time or a state; the message has ``name``.
    """
    optional = NoneType in get_args(hint)
    if optional and value is None:
        return None
    kind = get_args(hint)[0] if optional else hint
    plain = str if kind in (Time, State) else get_origin(kind) or kind
    stored, found = plain if plain in _KINDS else dict, type(value)
    if found is not stored:
        wanted = f"{_KINDS[stored]} or null" if optional else _KINDS[stored]
        raise ValueError(f"{name} must be {wanted}, but is {_KINDS.get(found, 'a number')}")
    if kind == Time:
        parse_time(value)
    elif kind == State and value not in STATES:
        raise ValueError(f"there is no state {value!r}")
    elif kind == list[Transition]:
        return [from_json(item, Transition, f"{name}[{index}]") for index, item in enumerate(value)]
    elif kind is Identity:
        from_json(value.get("pid"), int, f"{name}.pid")
    elif plain is not stored and stored is dict:  # a dataclass
        return kind(**{key: from_json(value.get(key), hint, f"{name}.{key}") for key, hint in _types_of(kind).items()})
    return value


def parse_time(text: str) -> datetime:
    """Parse a time in a record; without a time zone, it is in UTC.

    Raises:
        ValueError: The text is not a date and time in ISO 8601.
    """
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is not a date and time") from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def now() -> str:
    """Return the current time as ISO 8601 in UTC, in a format that sorts by time."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _utc(text: str) -> str:
    return parse_time(text).astimezone(UTC).isoformat(timespec="microseconds")
