"""Determine from exit code, ``status.json`` and log how a job ended, and what to do if it failed."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from openmae.errors import Preempted
from openmae.jobs.artifacts import below, find_file, read_text
from openmae.jobs.job import Record, State, parse_time
from openmae.storage import layout
from openmae.storage.atomic import parse_object

EXIT = "exit_code"  # file in the folder of a SLURM or Ray job
_CLOCK_SKEW = 2.0  # seconds by which the clock of a file server may be behind
_TAIL = 64 * 1024  # bytes to analyse at the end of a log

Category = Literal["data", "spec", "out of memory", "infrastructure", "unknown"]


class JobOutcome(NamedTuple):
    """The final state of a job, or its current state as reported by its platform."""

    state: State
    message: str
    exit_code: int | None = None


def conclude(record: Record, code: int) -> JobOutcome:
    """Return the outcome of a job, given its exit code (negative: the number of a signal)."""
    if code == 0:
        return JobOutcome("COMPLETE", "finished", 0)
    how = f"ended by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
    if record.cancel_requested:
        return JobOutcome("CANCELED", f"canceled ({how})", code)
    if code in (130, -signal.SIGINT):
        return JobOutcome("CANCELED", f"interrupted by another program ({how})", code)
    if code == Preempted.exit_code:
        same = f"a job with results_dir={record.results_dir} resumes from its checkpoint"
        return JobOutcome("CANCELED", f"preempted: {same} ({how})", code)
    meaning = {1: "the run failed", 2: "the request was invalid"}.get(code, "it failed")
    return JobOutcome("ERROR", f"{meaning} ({how})", code)


def conclude_without_code(record: Record, report: str, *, stopped: bool = False) -> JobOutcome:
    """Return the outcome of a job without an exit code, from ``status.json`` or else from the request to cancel it.

    ``report`` is the platform's message about the job; ``stopped`` is True if it was stopped through the platform.
    """
    lines = status_lines(record)
    if lines and lines[-1]["status"] in ("SUCCESS", "SKIPPED"):
        return JobOutcome("COMPLETE", f"finished; {report}", 0)
    return JobOutcome("CANCELED" if record.cancel_requested or stopped else "ERROR", report)


def read_exit_code(folder: Path) -> int | None:
    """Return the exit code in a job's folder (see ``signal_as_minus``), or None if it is missing or damaged."""
    path = folder / EXIT
    try:
        return signal_as_minus(int(path.read_bytes())) if path.is_file() else None
    except ValueError:
        return None


def signal_as_minus(code: int) -> int:
    """Convert a shell's exit code for a signal, 128 + number, to minus the number. 130 is an exit code of OpenMAE."""
    return 128 - code if code > 128 and code != 130 else code


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def status_lines(record: Record) -> list[dict[str, Any]]:
    """Return the lines of the last run in ``status.json``, oldest first; none if this job has not written to the file.

    Raises:
        DataError: The results are in a remote store that cannot be read.
    """
    began = next((item.at for item in record.transitions if item.state == "RUNNING"), None)
    path = below(record.results_folder, layout.STATUS)
    file = find_file(path) if began else None
    if not began or file is None or 0 < file.modified < parse_time(began).timestamp() - _CLOCK_SKEW:
        return []
    found: list[dict[str, Any]] = []
    for line in (read_text(path) or "").split("\n")[:-1]:  # the last line may be incomplete
        entry = parse_object(line)
        if "status" in entry:
            if entry["status"] == "STARTED":
                found.clear()
            found.append(entry)
    return found


@dataclass(frozen=True)
class FailureAnalysis:
    """Why a job failed.

    Attributes:
        error: The last error that the run reported.
        suggestions: What to try, most likely first.
        exit_code: Exit code of the action, or minus the number of a signal; None if unknown.
        evidence: Where the error was found: ``status.json``, ``log`` or ``platform``.
    """

    job_id: str
    category: Category
    error: str
    suggestions: tuple[str, ...]
    exit_code: int | None
    evidence: str

    @property
    def diverged(self) -> bool:
        """True if training diverged because of values in the spec, not because of the data or the machine."""
        return self.category == "spec" and re.search(_DIVERGED, self.error, re.IGNORECASE) is not None


class _Rule(NamedTuple):
    pattern: str
    category: Category
    suggestion: str


_DIVERGED = r"not finite|diverged|\bNaN\b"
_SMALLER = "Lower dataset.batch_size and raise train.accum_grad_batches by the same factor, or use bf16 or fp16."
_RULES = (
    _Rule(r"bus error|insufficient shared memory|/dev/shm", "out of memory",
          "Set dataset.num_workers_per_gpu=0, or give the machine more shared memory (/dev/shm)."),
    _Rule(r"out of memory|outofmemory|can't allocate memory|cannot allocate memory|MemoryError|oom[-_ ]kill",
          "out of memory", _SMALLER),
    _Rule(r"no space left|disk is full|disk quota|could not be written", "infrastructure",
          "Free space, or set results_dir to another disk; the same job resumes from its newest checkpoint."),
    _Rule(r"NCCL|gloo|connection (refused|reset|closed)|timed? ?out|could not connect|EndpointConnection"
          r"|name resolution|network is unreachable|CUDA (driver|error)|no CUDA|cuInit|NVML|NODE_FAIL|PREEMPTED"
          r"|BOOT_FAIL|DEADLINE|supervisor|client died|no longer knows|stale file handle|Input/output error",
          "infrastructure", "Submit it again; if it fails again, check the machine, the network and the driver."),
    _Rule(r"\bDataError\b|corrupt|unreadable image|images are at fault|dataset\.\w+_data_sources", "data",
          "Check the data source: `mae dataset check` counts images, classes and broken files."),
    _Rule(r"\bSpecError\b|\bCheckpointError\b|ha(s|ve) (a mistake|\d+ mistakes)", "spec",
          "Fix the spec; `mae spec check -e SPEC --action ACTION` prints every mistake."),
    _Rule(_DIVERGED, "spec", "Lower train.optim.lr, raise train.optim.warmup_epochs, or set train.clip_grad_norm."),
)  # fmt: skip


def analyse(record: Record, log: Path) -> FailureAnalysis:
    """Analyse why a job in the state ERROR failed, from its record, ``status.json`` and log file.

    Raises:
        DataError: The results are in a remote store that cannot be read.
    """
    failures = [str(line.get("message", "")) for line in status_lines(record) if line["status"] == "FAILURE"]
    tail = log_tail(log)
    if failures:
        error, evidence = failures[-1], layout.STATUS
    else:
        error = last_error(tail.splitlines())
        evidence = "log" if error else "platform"
        error = error or record.message
    category, suggestions = _classify(error, record.message, tail, record.exit_code)
    fixes = [line.strip().removeprefix("Fix:").strip() for line in error.split("\n") if "Fix:" in line]
    ordered = tuple(dict.fromkeys((*fixes, *suggestions)))
    return FailureAnalysis(record.id, category, error, ordered, record.exit_code, evidence)


def log_tail(log: Path) -> str:
    """Return the end of a log, or "" if there is no log."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        return file.read().decode("utf-8", errors="replace")


def last_error(lines: Sequence[str]) -> str:
    """Return the last error in a log, with its Fix line, or the last line of a traceback; otherwise the last line."""
    texts = [line.rstrip() for line in lines if line.strip()]
    for number in range(len(texts) - 1, -1, -1):
        if texts[number].startswith("  Fix: ") and number:
            return f"{texts[number - 1].strip()}\n{texts[number]}"
        if re.match(r"[\w.]*(Error|Exception|Interrupt|Warning: .*killed)\b.*", texts[number]):
            return texts[number]
        if re.search(r"ha(s|ve) (a mistake|\d+ mistakes):$", texts[number]):
            return "\n".join(texts[number:])
    return texts[-1] if texts else ""


def _classify(error: str, message: str, tail: str, code: int | None) -> tuple[Category, tuple[str, ...]]:
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL) or "OUT_OF_MEMORY" in message:
        why = "The system kills a process that takes too much memory. " + _SMALLER
        other = () if "OUT_OF_MEMORY" in message else ("It may also have been killed by a person (SIGKILL).",)
        return "out of memory", (why, "Lower dataset.num_workers_per_gpu.", *other)
    # the class of OpenMAE's errors is at the beginning, and is more reliable than the words after it
    for text in (error.partition(":")[0], error, message):
        for rule in _RULES:
            if re.search(rule.pattern, text, re.IGNORECASE):
                return rule.category, (rule.suggestion,)
    if code == 2:
        return "spec", ("The request was invalid: fix what the error names.",)
    for rule in _RULES[:4]:  # a library may have printed the cause before the error
        if re.search(rule.pattern, tail, re.IGNORECASE):
            return rule.category, (rule.suggestion,)
    return "unknown", ("Read the complete log: `mae jobs logs JOB`.", "Run the action with the job's spec.yaml.")
