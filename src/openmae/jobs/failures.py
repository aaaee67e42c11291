"""Why a job failed: the last error, its class, and what to try."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from openmae.jobs.job import Record
from openmae.jobs.outcome import status_lines
from openmae.storage import layout

Category = Literal["data", "spec", "out of memory", "infrastructure", "unknown"]
_TAIL = 64 * 1024  # bytes of the log that are looked at


@dataclass(frozen=True)
class FailureAnalysis:
    """What is known of a failure.

    Attributes:
        job_id: of the job.
        category: class of the failure.
        error: the last error, as the run told it.
        suggestions: what to try, likeliest first.
        exit_code: of the action; minus a signal's number; None where nobody saw it.
        evidence: where the error was found: status.json, the log, or the platform.
    """

    job_id: str
    category: Category
    error: str
    suggestions: tuple[str, ...]
    exit_code: int | None
    evidence: str

    @property
    def diverged(self) -> bool:
        """Whether the loss was not finite: the values are to blame, and not the data or the machine."""
        return self.category == "spec" and re.search(_DIVERGED, self.error, re.IGNORECASE) is not None


class _Rule(NamedTuple):
    pattern: str
    category: Category
    suggestion: str


_DIVERGED = r"not finite|diverged|\bNaN\b"
_SMALLER = "Lower dataset.batch_size, and raise train.accum_grad_batches by as much; or use bf16 or fp16."
_RULES = tuple(
    _Rule(*row)
    for row in (
        (r"bus error|insufficient shared memory|/dev/shm", "out of memory", "Set dataset.num_workers_per_gpu=0, or "
         "give the machine more shared memory (/dev/shm)."),
        (r"out of memory|outofmemory|can't allocate memory|cannot allocate memory|MemoryError|oom[-_ ]kill",
         "out of memory", _SMALLER),
        (r"no space left|disk is full|disk quota|could not be written", "infrastructure", "Free space, or set "
         "results_dir to another disk; the same job goes on from its newest checkpoint."),
        (r"NCCL|gloo|connection (refused|reset|closed)|timed? ?out|could not connect|EndpointConnection|name resolution"
         r"|network is unreachable|CUDA (driver|error)|no CUDA|cuInit|NVML|NODE_FAIL|PREEMPTED|BOOT_FAIL|DEADLINE"
         r"|supervisor|client died|does not know .* any more"
         r"|stale file handle|Input/output error", "infrastructure", "Submit it again; if it "
         "comes back, look at the machine, the network and the driver."),
        (r"\bDataError\b|corrupt|unreadable image|images are at fault|dataset\.\w+_data_sources", "data",
         "Look at the data source: `mae dataset check` counts images, classes and broken files."),
        (r"\bSpecError\b|\bCheckpointError\b|has (a mistake|\d+ mistakes)", "spec", "Mend the spec; `mae spec check -e "
         "SPEC --action ACTION` prints every mistake."),
        (_DIVERGED, "spec", "Lower train.optim.lr, raise warmup_epochs, or set clip_grad_norm."),
    )
)  # fmt: skip


def analyse(record: Record, log: Path) -> FailureAnalysis:
    """Judge a job that ended in ERROR.

    Raises:
        DataError: its results are in a remote store that cannot be read.
    """
    message = record["transitions"][-1]["message"]
    code: int | None = record["exit_code"]
    told = [str(line.get("message", "")) for line in status_lines(record) if line.get("status") == "FAILURE"]
    tail = log_tail(log)
    if told:
        error, evidence = told[-1], layout.STATUS
    else:
        error = last_error(tail.splitlines())
        evidence = "log" if error else "platform"
        error = error or message
    category, suggestions = _judge(error, message, tail, code)
    mends = tuple(line.strip().removeprefix("Fix:").strip() for line in error.split("\n") if "Fix:" in line)
    ordered = tuple(dict.fromkeys((*mends, *suggestions)))
    return FailureAnalysis(record["id"], category, error, ordered, code, evidence)


def log_tail(log: Path) -> str:
    """The end of a log; empty where there is none."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        return file.read().decode("utf-8", errors="replace")


def last_error(lines: Sequence[str]) -> str:
    """The last message that looks like an error: with its Fix line, or the end of a traceback; else the last line."""
    texts = [line.rstrip() for line in lines if line.strip()]
    for number in range(len(texts) - 1, -1, -1):
        if texts[number].startswith("  Fix: ") and number:
            return f"{texts[number - 1].strip()}\n{texts[number]}"
        if re.match(r"[\w.]*(Error|Exception|Interrupt|Warning: .*killed)\b.*", texts[number]):
            return texts[number]
        if re.search(r"has (a mistake|\d+ mistakes):$", texts[number]):
            return "\n".join(texts[number:])
    return texts[-1] if texts else ""


def _judge(error: str, message: str, tail: str, code: int | None) -> tuple[Category, tuple[str, ...]]:
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL) or "OUT_OF_MEMORY" in message:
        more = "Or somebody killed it: nothing else sends SIGKILL." if "OUT_OF_MEMORY" not in message else ""
        why = "The system ends a process that takes too much memory. " + _SMALLER
        return "out of memory", tuple(filter(None, (why, "Lower dataset.num_workers_per_gpu.", more)))
    # the class of an error of ours is the first word, and says more than any word behind it
    for text in (error.partition(":")[0], error, message):
        for rule in _RULES:
            if re.search(rule.pattern, text, re.IGNORECASE):
                return rule.category, (rule.suggestion,)
    if code == 2:
        return "spec", ("The request was wrong: mend what the error names.",)
    for rule in _RULES[:4]:  # what a library printed before the error that we know
        if re.search(rule.pattern, tail, re.IGNORECASE):
            return rule.category, (rule.suggestion,)
    return "unknown", ("Read the whole log: `mae jobs logs JOB`.", "Run the action itself with the job's spec.yaml.")
