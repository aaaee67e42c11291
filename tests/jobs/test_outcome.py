"""How a job ended: status.json, whose lines have local times without a zone, and the analysis of failures."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
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
    last_status,
    read_exit_code,
    status_lines,
)
from openmae.results.status import StatusLog

Zone = Callable[[str], None]


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Zone]:
    def use(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield use
    monkeypatch.undo()
    time.tzset()


def _record(folder: Path, began: datetime) -> Record:
    return make_record(results_folder=str(folder), transitions=[Transition(began.isoformat(), "RUNNING", "")])


@pytest.mark.parametrize("writer", ["UTC", "Asia/Tokyo", "America/Los_Angeles", "Asia/Kathmandu", "Pacific/Kiritimati"])
@pytest.mark.parametrize("reader", ["UTC", "Asia/Tokyo", "America/Los_Angeles", "Pacific/Kiritimati"])
def test_a_run_has_the_same_outcome_in_every_time_zone(tmp_path: Path, zone: Zone, writer: str, reader: str) -> None:
    now = datetime.now(UTC)
    zone(writer)
    status = StatusLog(tmp_path, append=False)
    status.write("STARTED", "train started")
    status.write("SUCCESS", "train finished")
    zone(reader)
    assert last_status(_record(tmp_path, now)) == "SUCCESS"
    assert len(status_lines(_record(tmp_path, now - timedelta(hours=1)))) == 2
    assert last_status(_record(tmp_path, now + timedelta(minutes=1))) is None, "an earlier run is taken for this one"


@pytest.mark.parametrize(("back", "expected"), [(5, "SUCCESS"), (-5, None)])
def test_the_end_of_summer_time_has_no_effect(tmp_path: Path, zone: Zone, back: int, expected: str | None) -> None:
    zone("Europe/Berlin")
    end = datetime(2025, 10, 26, 1, 5, tzinfo=UTC)  # 2:05, for the second time that night
    line = {"date": "10/26/2025", "time": "2:5:0", "status": "SUCCESS", "message": "train finished"}
    (tmp_path / "status.json").write_text(json.dumps(line) + "\n")
    os.utime(tmp_path / "status.json", (end.timestamp(), end.timestamp()))
    zone("UTC")
    assert last_status(_record(tmp_path, end - timedelta(minutes=back))) == expected
    zone("Europe/Berlin")
    assert last_status(_record(tmp_path, end - timedelta(minutes=back))) == expected


def test_a_file_that_was_copied_is_read_in_the_time_zone_of_this_process(tmp_path: Path, zone: Zone) -> None:
    zone("Asia/Tokyo")
    line = {"date": "1/2/2020", "time": "3:4:5", "status": "SUCCESS"}
    (tmp_path / "status.json").write_text(json.dumps(line) + "\n")
    began = datetime(2020, 1, 1, 18, 4, 0, tzinfo=UTC)
    assert last_status(_record(tmp_path, began)) == "SUCCESS"
    assert last_status(_record(tmp_path, began + timedelta(minutes=1))) is None


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    status = StatusLog(tmp_path, append=False)
    status.write("SUCCESS", "done")
    with status.path.open("a") as file:
        file.write(
            '3\n"text"\nnull\n{"date": 1}\n' + "[" * 100_000 + '\n{"date": "9/9/99999", "time": "1:1:1"}\n{"torn'
        )
    assert last_status(_record(tmp_path, datetime.now(UTC) - timedelta(seconds=1))) == "SUCCESS"


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


def test_an_invalid_request_is_a_failure_of_the_spec(tmp_path: Path) -> None:
    log = "Notice: x\nspec.yaml has 2 mistakes:\n  model.arch: no\n  train.seed: no\n"
    failure = _analyse(tmp_path, log, 2)
    assert failure.category == "spec"
    assert failure.error == "spec.yaml has 2 mistakes:\n  model.arch: no\n  train.seed: no"
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
    assert _analyse(tmp_path, "KeyError: 'new'\n").error == "KeyError: 'new'"


def test_the_last_error_of_a_log_is_found(tmp_path: Path) -> None:
    failure = _analyse(tmp_path, "line\n" * 100_000 + "ValueError: late\n")
    assert failure.error == "ValueError: late"
    assert last_error([]) == ""
    assert last_error(["only", "words", ""]) == "words"
    assert last_error(["There is no spec file.", "  Fix: Check the path.", "Notice: x"]) == (
        "There is no spec file.\n  Fix: Check the path."
    )
