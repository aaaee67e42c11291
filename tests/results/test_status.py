import json
import logging
import re
from pathlib import Path

import pytest

from openmae.errors import UserError
from openmae.results.status import StatusLog, read_status


def test_lines_follow_the_contract(tmp_path: Path) -> None:
    status = StatusLog(tmp_path / "train", append=False)
    status.write("STARTED", "Starting train.")
    status.write("RUNNING", "Epoch 0 done.", kpi={"train_loss": 0.5, "ACC_all": 1})
    status.write("FAILURE", "The disk is full.", verbosity="ERROR")
    lines = (tmp_path / "train" / "status.json").read_text().splitlines()
    started, running, failure = map(json.loads, lines)
    assert list(started) == ["date", "time", "status", "verbosity", "message"]
    assert re.fullmatch(r"\d{1,2}/\d{1,2}/\d{4}", started["date"])
    assert re.fullmatch(r"\d{1,2}:\d{1,2}:\d{1,2}", started["time"])
    assert started["verbosity"] == "INFO"
    assert running["kpi"] == {"train_loss": 0.5, "ACC_all": 1.0}
    assert failure["verbosity"] == "ERROR"


def test_non_finite_values_are_named_in_the_message(tmp_path: Path) -> None:
    status = StatusLog(tmp_path, append=False)
    status.write("RUNNING", "Epoch 3 done.", kpi={"train_loss": float("nan"), "lr": 1e-3, "val_loss": float("inf")})
    status.write("RUNNING", "Epoch 4 done.", kpi={"train_loss": float("nan")})
    first, second = read_status(status.path)
    assert first["kpi"] == {"lr": 1e-3}
    assert first["message"] == "Epoch 3 done. (not finite: train_loss, val_loss)"
    assert "kpi" not in second
    assert "NaN" not in status.path.read_text()


def test_new_run_replaces_the_file_and_resumed_run_appends(tmp_path: Path) -> None:
    StatusLog(tmp_path, append=False).write("STARTED", "first")
    StatusLog(tmp_path, append=True).write("STARTED", "second")
    assert [entry["message"] for entry in read_status(tmp_path / "status.json")] == ["first", "second"]
    StatusLog(tmp_path, append=False).write("STARTED", "third")
    assert [entry["message"] for entry in read_status(tmp_path / "status.json")] == ["third"]


def test_append_without_an_earlier_file(tmp_path: Path) -> None:
    StatusLog(tmp_path, append=True)
    assert read_status(tmp_path / "status.json") == []


def test_incomplete_last_line_is_ignored_and_removed_on_append(tmp_path: Path) -> None:
    status = StatusLog(tmp_path, append=False)
    status.write("STARTED", "whole")
    with status.path.open("a") as file:
        file.write('{"date": "1/2/20')
    assert [entry["message"] for entry in read_status(status.path)] == ["whole"]
    StatusLog(tmp_path, append=True).write("RUNNING", "next")
    assert [entry["message"] for entry in read_status(status.path)] == ["whole", "next"]


def test_damaged_line_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "status.json"
    path.write_text('{"status": "STARTED"}\nrubbish\n[1]\n{"status": "SUCCESS"}\n')
    with caplog.at_level(logging.WARNING, logger="openmae"):
        assert [entry["status"] for entry in read_status(path)] == ["STARTED", "SUCCESS"]
    assert "line 2 is not a JSON object" in caplog.text
    assert "line 3 is not a JSON object" in caplog.text


def test_results_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"results_dir: cannot write to '.*taken' \(file exists\)") as error:
        StatusLog(tmp_path / "taken", append=False)
    assert "Fix: Set results_dir to a folder that you may write to." in str(error.value)


def test_results_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere, so permissions cannot tell
    with pytest.raises(UserError, match=r"\(permission denied\)"):
        StatusLog(tmp_path, append=False)
