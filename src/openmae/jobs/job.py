"""``Record``, the content of a job's file ``job.json``, and ``Job``, the public view of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from openmae.machine import Identity

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
    """A change of state: its time (ISO 8601, UTC), the new state, and the platform's message."""

    at: str
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
    created_at: str
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
    cancel_requested: str | None = None
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
        shared = {name: getattr(self, name) for name in _SHARED}
        transitions = tuple(Transition(_utc(item.at), item.state, item.message) for item in self.transitions)
        shared |= {"created_at": _utc(self.created_at), "notices": tuple(self.notices), "transitions": transitions}
        return Job(**shared, status=self.state, message=self.message)

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
        _check_type("the record", values, dict)
        version = values.get("version", VERSION)
        if isinstance(version, int) and version > VERSION:
            raise ValueError(
                f"a newer version of OpenMAE wrote it (record version {version}, this one reads {VERSION})"
            )
        known = {name: values[name] for name in _TYPES if name in values}
        try:
            record = cls(**known)
        except TypeError:
            missing = [name for name in _REQUIRED if name not in known]
            raise ValueError(f"it has no {', '.join(missing)}") from None
        for name, value in known.items():
            _check_type(name, value, _TYPES[name])
        if record.id != job_id:
            raise ValueError(f"it is the record of job {record.id} in the folder of job {job_id}")
        if not record.transitions:
            raise ValueError("transitions is empty")
        record.transitions = [_transition(item) for item in record.transitions]
        for time in (record.created_at, record.cancel_requested):
            if time is not None:
                parse_time(time)
        if "handle" in known:
            record.handle = _handle(known["handle"])
        check_identity("submitter", record.submitter)
        record.later = {name: value for name, value in values.items() if name not in _TYPES}
        return record


_TYPES = {name: hint for name, hint in get_type_hints(Record).items() if name != "later"}
_REQUIRED = [item.name for item in fields(Record)][: list(_TYPES).index("version")]
_SHARED = [name for name in _REQUIRED if name != "transitions"]


def check_identity(name: str, value: Any) -> None:
    """Check that a value from a file is None or identifies a process by an integer pid.

    Raises:
        ValueError: The value is not an object, or its pid is not an integer.
    """
    _check_type(name, value, dict | None)
    if value is not None:
        _check_type(f"{name}.pid", value.get("pid"), int)


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


def _transition(item: Any) -> Transition:
    _check_type("a transition", item, dict)
    for name in ("at", "state", "message"):
        _check_type(f"{name} of a transition", item.get(name), str)
    if item["state"] not in STATES:
        raise ValueError(f"there is no state {item['state']!r}")
    parse_time(item["at"])
    return Transition(item["at"], item["state"], item["message"])


def _handle(values: Any) -> Handle:
    handle = Handle(*(values.get(item.name) for item in fields(Handle)))
    for name in ("supervisor", "process"):
        check_identity(f"handle.{name}", getattr(handle, name))
    for name in ("slurm_job", "ray"):
        _check_type(f"handle.{name}", getattr(handle, name), str | None)
    return handle


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Check the outermost type of a JSON value; dataclasses are stored as objects."""
    wanted = [get_origin(one) or one for one in (get_args(hint) if NoneType in get_args(hint) else (hint,))]
    wanted = [one if one in _KINDS else dict for one in wanted]
    if type(value) not in wanted:
        names = " or ".join(_KINDS[one] for one in wanted)
        raise ValueError(f"{name} must be {names}, but is {_KINDS.get(type(value), 'a number')}")
