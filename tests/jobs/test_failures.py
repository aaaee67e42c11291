"""Why a job failed: what is taken for the last error, and which class it gets."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from openmae.jobs.failures import FailureAnalysis, analyse, last_error
from openmae.jobs.job import now


def _analyse(tmp_path: Path, log: str = "", code: int | None = 1, message: str = "it failed") -> FailureAnalysis:
    (tmp_path / "log.txt").write_text(log, encoding="utf-8")
    record: dict[str, Any] = {
        **{"id": "j", "exit_code": code, "results_folder": str(tmp_path)},
        "transitions": [
            {"at": now(), "state": "RUNNING", "message": "on"},
            {"at": now(), "state": "ERROR", "message": message},
        ],
    }
    return analyse(record, tmp_path / "log.txt")


def _tell(tmp_path: Path, message: str) -> None:
    when = datetime.now()
    entry = {"date": f"{when.month}/{when.day}/{when.year}", "time": f"{when.hour}:{when.minute}:{when.second}"}
    entry |= {"status": "FAILURE", "verbosity": "ERROR", "message": message}
    (tmp_path / "status.json").write_text(json.dumps(entry) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("message", "category"),
    [
        ("DataError: dataset.val_data_sources: there is nothing at 'x'.\n  Fix: Check the path.", "data"),
        ("DataError: the images need more memory than there is: out of memory\n  Fix: No.", "data"),
        ("SpecError: export.onnx_file: exists.", "spec"),
        ("CheckpointError: x.pth is truncated.", "spec"),
        ("RunError: The loss is not finite (nan) in 8 steps in a row.", "spec"),
        ("RunError: The loss was not finite 10 steps in a row, so these images are at fault, not the weights.", "data"),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "out of memory"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "out of memory"),
        ("RuntimeError: DataLoader worker (pid 3) is killed by signal: Bus error.", "out of memory"),
        ("RunError: The results could not be written (No space left on device): /finance/nan.", "infrastructure"),
        ("RuntimeError: NCCL error in: unhandled system error", "infrastructure"),
        ("ConnectionRefusedError: [Errno 111] Connection refused", "infrastructure"),
        ("SLURM does not know job 7 any more, and it left no exit code.", "infrastructure"),
        ("ZeroDivisionError: division by zero", "unknown"),
    ],
)
def test_a_failure_that_the_run_told(tmp_path: Path, message: str, category: str) -> None:
    _tell(tmp_path, message)
    failure = _analyse(tmp_path, "something else\n")
    assert (failure.category, failure.error, failure.evidence) == (category, message, "status.json")
    assert failure.suggestions
    assert failure.diverged == (category == "spec" and "not finite" in message)
    if "Fix: Check the path." in message:
        assert failure.suggestions[0] == "Check the path.", "the run's own advice comes first"


def test_a_request_that_was_wrong_before_anything_ran(tmp_path: Path) -> None:
    log = "Notice: x\nspec.yaml has 2 mistakes:\n  model.arch: no\n  train.seed: no\n"
    failure = _analyse(tmp_path, log, 2)
    assert failure.category == "spec"
    assert failure.error == "spec.yaml has 2 mistakes:\n  model.arch: no\n  train.seed: no"
    assert failure.evidence == "log"


def test_the_end_of_a_traceback_is_the_error(tmp_path: Path) -> None:
    log = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\nMemoryError: no\n'
    failure = _analyse(tmp_path, log)
    assert (failure.error, failure.category) == ("MemoryError: no", "out of memory")


def test_a_line_above_the_error_may_say_what_it_was(tmp_path: Path) -> None:
    log = "slurmstepd: error: Detected 1 oom_kill event in StepId=3.0.\nRuntimeError: worker died\n"
    assert _analyse(tmp_path, log).category == "out of memory"


@pytest.mark.parametrize(
    ("code", "message", "category"),
    [
        (-9, "it failed (ended by SIGKILL)", "out of memory"),
        (137, "it failed", "out of memory"),
        (None, "SLURM job 7: OUT_OF_MEMORY", "out of memory"),
        (None, "SLURM job 7: NODE_FAIL", "infrastructure"),
        (None, "SLURM job 7: TIMEOUT (TimeLimit)", "infrastructure"),
        (None, "its processes died with their supervisor, so that no exit code is known", "infrastructure"),
        (-11, "it failed (ended by SIGSEGV)", "unknown"),
        (2, "the request was wrong (exit code 2)", "spec"),
    ],
)
def test_a_silent_job_is_judged_by_how_it_ended(tmp_path: Path, code: int | None, message: str, category: str) -> None:
    failure = _analyse(tmp_path, "", code, message)
    assert (failure.category, failure.error, failure.evidence) == (category, message, "platform")
    assert failure.exit_code == code
    assert failure.suggestions


def test_a_failure_of_an_earlier_run_is_not_this_one(tmp_path: Path) -> None:
    old = {"date": "1/2/2020", "time": "3:4:5", "status": "FAILURE", "message": "DataError: old"}
    (tmp_path / "status.json").write_text(json.dumps(old) + "\nno json\n", encoding="utf-8")
    assert _analyse(tmp_path, "KeyError: 'new'\n").error == "KeyError: 'new'"


def test_a_log_is_looked_at_from_its_end(tmp_path: Path) -> None:
    failure = _analyse(tmp_path, "line\n" * 100_000 + "ValueError: late\n")
    assert failure.error == "ValueError: late"
    assert last_error([]) == ""
    assert last_error(["only", "words", ""]) == "words"
    assert last_error(["There is no spec file.", "  Fix: Check the path.", "Notice: x"]) == (
        "There is no spec file.\n  Fix: Check the path."
    )
