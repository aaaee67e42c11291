"""How a job ended, from its exit code and status.json, and the analysis of failures."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.helpers.job_records import make_record

from openmae.jobs.job import Record, Transition, now
from openmae.jobs.outcome import (
    FailureAnalysis,
    analyse,
    conclude,
    last_error,
    read_exit_code,
    status_lines,
)
from openmae.results.status import StatusLog


def _record(folder: Path, began: datetime) -> Record:
    return make_record(results_folder=str(folder), transitions=[Transition(began.isoformat(), "RUNNING", "")])


def _last_status(record: Record) -> str | None:
    lines = status_lines(record)
    return lines[-1]["status"] if lines else None


def test_only_the_last_run_that_this_job_has_written_counts(tmp_path: Path) -> None:
    StatusLog(tmp_path, append=False).write("SUCCESS", "an earlier run finished")
    status = StatusLog(tmp_path, append=True)
    status.write("STARTED", "train started")
    status.write("FAILURE", "no")
    now = datetime.now(UTC)
    assert _last_status(_record(tmp_path, now)) == "FAILURE"
    assert len(status_lines(_record(tmp_path, now - timedelta(hours=1)))) == 2
    assert _last_status(_record(tmp_path, now + timedelta(minutes=1))) is None, "an earlier run is taken for this one"


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/Los_Angeles"])
def test_a_run_has_the_same_outcome_in_every_time_zone(
    tmp_path: Path, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(UTC)
    StatusLog(tmp_path, append=False).write("SUCCESS", "train finished")
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert _last_status(_record(tmp_path, now)) == "SUCCESS"
        assert _last_status(_record(tmp_path, now + timedelta(minutes=1))) is None
    finally:
        monkeypatch.undo()
        time.tzset()


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    status = StatusLog(tmp_path, append=False)
    status.write("SUCCESS", "done")
    with status.path.open("a") as file:
        file.write(
            '3\n"text"\nnull\n{"date": 1}\n' + "[" * 100_000 + '\n{"date": "9/9/99999", "time": "1:1:1"}\n{"torn'
        )
    assert _last_status(_record(tmp_path, datetime.now(UTC) - timedelta(seconds=1))) == "SUCCESS"


@pytest.mark.parametrize("text", ["", "zero", "1 2", "\0"])
def test_a_damaged_exit_code_is_unknown(tmp_path: Path, text: str) -> None:
    (tmp_path / "exit_code").write_text(text)
    assert read_exit_code(tmp_path) is None
    (tmp_path / "exit_code").write_text("-9\n")
    assert read_exit_code(tmp_path) == -9


@pytest.mark.parametrize(
    ("code", "canceled", "state", "message"),
    [
        (0, True, "COMPLETE", "finished"),
        (1, False, "ERROR", "the run failed (exit code 1)"),
        (2, False, "ERROR", "the request was invalid (exit code 2)"),
        (-9, False, "ERROR", "it failed (ended by SIGKILL)"),
        (-9, True, "CANCELED", "canceled (ended by SIGKILL)"),
        (130, False, "CANCELED", "interrupted by another program (exit code 130)"),
        (75, False, "CANCELED", "preempted: a job with results_dir=r resumes from its checkpoint (exit code 75)"),
    ],
)
def test_the_outcome_follows_from_the_exit_code(code: int, canceled: bool, state: str, message: str) -> None:
    record = make_record(cancel_requested=now() if canceled else None)
    assert conclude(record, code) == (state, message, code)


def _analyse(tmp_path: Path, log: str = "", code: int | None = 1, message: str = "it failed") -> FailureAnalysis:
    (tmp_path / "log.txt").write_text(log, encoding="utf-8")
    transitions = [Transition(now(), "RUNNING", "on"), Transition(now(), "ERROR", message)]
    record = make_record(exit_code=code, results_folder=str(tmp_path), transitions=transitions)
    return analyse(record, tmp_path / "log.txt")


def _write_failure(tmp_path: Path, message: str) -> None:
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
        ("SLURM no longer knows job 7", "infrastructure"),
        ("ZeroDivisionError: division by zero", "unknown"),
    ],
)
def test_a_failure_in_status_json_is_classified(tmp_path: Path, message: str, category: str) -> None:
    _write_failure(tmp_path, message)
    failure = _analyse(tmp_path, "something else\n")
    assert (failure.category, failure.error, failure.evidence) == (category, message, "status.json")
    assert failure.suggestions
    assert failure.diverged == (category == "spec" and "not finite" in message)
    if "Fix: Check the path." in message:
        assert failure.suggestions[0] == "Check the path.", "the run's own advice comes first"


@pytest.mark.parametrize("where", ["spec.yaml has", "The overrides have"])
def test_an_invalid_request_is_a_failure_of_the_spec(tmp_path: Path, where: str) -> None:
    log = f"Notice: x\n{where} 2 mistakes:\n  model.arch: no\n  train.seed: no\n"
    failure = _analyse(tmp_path, log, 2)
    assert failure.category == "spec"
    assert failure.error == f"{where} 2 mistakes:\n  model.arch: no\n  train.seed: no"
    assert failure.evidence == "log"


def test_the_last_line_of_a_traceback_is_the_error(tmp_path: Path) -> None:
    log = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\nMemoryError: no\n'
    failure = _analyse(tmp_path, log)
    assert (failure.error, failure.category) == ("MemoryError: no", "out of memory")


def test_a_line_before_the_error_may_give_the_category(tmp_path: Path) -> None:
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
        (None, "its processes died with their supervisor; the exit code is unknown", "infrastructure"),
        (-11, "it failed (ended by SIGSEGV)", "unknown"),
        (2, "the request was invalid (exit code 2)", "spec"),
    ],
)
def test_without_output_a_job_is_classified_by_how_it_ended(
    tmp_path: Path, code: int | None, message: str, category: str
) -> None:
    failure = _analyse(tmp_path, "", code, message)
    assert (failure.category, failure.error, failure.evidence) == (category, message, "platform")
    assert failure.exit_code == code
    assert failure.suggestions


def test_a_failure_of_an_earlier_run_is_ignored(tmp_path: Path) -> None:
    old = {"date": "1/2/2020", "time": "3:4:5", "status": "FAILURE", "message": "DataError: old"}
    (tmp_path / "status.json").write_text(json.dumps(old) + "\nno json\n", encoding="utf-8")
    os.utime(tmp_path / "status.json", (1.6e9, 1.6e9))
    assert _analyse(tmp_path, "KeyError: 'new'\n").error == "KeyError: 'new'"


def test_the_last_error_of_a_log_is_found(tmp_path: Path) -> None:
    failure = _analyse(tmp_path, "line\n" * 100_000 + "ValueError: late\n")
    assert failure.error == "ValueError: late"
    assert last_error([]) == ""
    assert last_error(["only", "words", ""]) == "words"
    assert last_error(["There is no spec file.", "  Fix: Check the path.", "Notice: x"]) == (
        "There is no spec file.\n  Fix: Check the path."
    )
