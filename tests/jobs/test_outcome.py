"""The lines of status.json have local times without a zone; they are compared with moments in UTC."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from openmae.jobs.outcome import ending, exit_code, status_lines
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


def _record(folder: Path, began: datetime) -> dict[str, Any]:
    return {
        "results_folder": str(folder),
        "transitions": [{"at": began.isoformat(), "state": "RUNNING", "message": ""}],
    }


@pytest.mark.parametrize("writer", ["UTC", "Asia/Tokyo", "America/Los_Angeles", "Asia/Kathmandu", "Pacific/Kiritimati"])
@pytest.mark.parametrize("reader", ["UTC", "Asia/Tokyo", "America/Los_Angeles", "Pacific/Kiritimati"])
def test_a_run_is_judged_alike_in_every_time_zone(tmp_path: Path, zone: Zone, writer: str, reader: str) -> None:
    now = datetime.now(UTC)
    zone(writer)
    status = StatusLog(tmp_path, append=False)
    status.write("STARTED", "train started")
    status.write("SUCCESS", "train finished")
    zone(reader)
    assert ending(_record(tmp_path, now)) == "SUCCESS"
    assert len(status_lines(_record(tmp_path, now - timedelta(hours=1)))) == 2
    assert ending(_record(tmp_path, now + timedelta(minutes=1))) is None, "an earlier run is taken for this one"


@pytest.mark.parametrize(("back", "expected"), [(5, "SUCCESS"), (-5, None)])
def test_clocks_that_are_set_back_in_a_run_change_nothing(
    tmp_path: Path, zone: Zone, back: int, expected: str | None
) -> None:
    zone("Europe/Berlin")
    end = datetime(2025, 10, 26, 1, 5, tzinfo=UTC)  # 2:05, for the second time that night
    line = {"date": "10/26/2025", "time": "2:5:0", "status": "SUCCESS", "message": "train finished"}
    (tmp_path / "status.json").write_text(json.dumps(line) + "\n")
    os.utime(tmp_path / "status.json", (end.timestamp(), end.timestamp()))
    zone("UTC")
    assert ending(_record(tmp_path, end - timedelta(minutes=back))) == expected
    zone("Europe/Berlin")
    assert ending(_record(tmp_path, end - timedelta(minutes=back))) == expected


def test_a_file_that_was_copied_later_is_read_in_this_time_zone(tmp_path: Path, zone: Zone) -> None:
    zone("Asia/Tokyo")
    line = {"date": "1/2/2020", "time": "3:4:5", "status": "SUCCESS"}
    (tmp_path / "status.json").write_text(json.dumps(line) + "\n")
    began = datetime(2020, 1, 1, 18, 4, 0, tzinfo=UTC)
    assert ending(_record(tmp_path, began)) == "SUCCESS"
    assert ending(_record(tmp_path, began + timedelta(minutes=1))) is None


def test_what_is_no_line_is_left_out(tmp_path: Path) -> None:
    status = StatusLog(tmp_path, append=False)
    status.write("SUCCESS", "done")
    with status.path.open("a") as file:
        file.write(
            '3\n"text"\nnull\n{"date": 1}\n' + "[" * 100_000 + '\n{"date": "9/9/99999", "time": "1:1:1"}\n{"torn'
        )
    assert ending(_record(tmp_path, datetime.now(UTC) - timedelta(seconds=1))) == "SUCCESS"


@pytest.mark.parametrize("text", ["", "zero", "1 2", "\0"])
def test_a_damaged_exit_code_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "exit_code").write_text(text)
    assert exit_code(tmp_path) is None
    (tmp_path / "exit_code").write_text("-9\n")
    assert exit_code(tmp_path) == -9
