"""What a run said about itself in ``status.json``: the lines that a job wrote, and no earlier run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any

from openmae.jobs.artifacts import below, modified, read_text
from openmae.jobs.job import State, moment
from openmae.storage import layout

EXIT = "exit_code"  # in a job's folder, on clusters
_QUARTER = 15 * 60.0  # seconds


def status_lines(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The whole lines of ``status.json`` that were written since the job began to run, oldest first.

    Raises:
        DataError: the results are in a remote store that cannot be read.
    """
    began = next((item["at"] for item in record["transitions"] if item["state"] == "RUNNING"), None)
    path = below(record["results_folder"], layout.STATUS)
    text = read_text(path) if began else None
    if not began or text is None:
        return []
    # the log has whole seconds; a clock of a file server may lag a little
    earliest = moment(began) - timedelta(seconds=2)
    entries = [entry for line in text.split("\n")[:-1] if (entry := _parsed(line)) is not None]
    zone = _zone(entries, path)
    return [entry for entry in entries if (when := _when(entry, zone)) is not None and when >= earliest]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _when(entry: Mapping[str, Any], zone: tzinfo | None) -> datetime | None:
    """When a line was written, in ``zone`` (None: this process's)."""
    try:
        when = datetime.strptime(f"{entry['date']} {entry['time']}", "%m/%d/%Y %H:%M:%S")
        return when.replace(tzinfo=zone) if zone else when.astimezone()
    except (ValueError, KeyError, OverflowError):
        return None


def _zone(entries: Sequence[Mapping[str, Any]], path: str) -> tzinfo | None:
    """The time zone of a run, whose lines have local times without one (TAO's format); None where it cannot be told.

    Its last line was written when the file was, and that moment is known in UTC. So a run in another time zone than
    this process's, or before the clocks were changed, is not misjudged.
    """
    last = next((when for entry in reversed(entries) if (when := _when(entry, UTC)) is not None), None)
    written = modified(path)
    if last is None or not written:
        return None
    quarters = round((last.timestamp() - written) / _QUARTER)  # offsets are whole quarters of an hour
    return timezone(timedelta(seconds=quarters * _QUARTER)) if -48 <= quarters <= 56 else None


def exit_code(folder: Path) -> int | None:
    """What stands in a job's folder of how it ended; None before, and where the file is damaged."""
    path = folder / EXIT
    try:
        return int(path.read_bytes()) if path.is_file() else None
    except ValueError:
        return None


def signal_as_minus(code: int) -> int:
    """An exit code with a shell's word for a signal (128 and its number) as minus the number; 130 is our own."""
    return 128 - code if code > 128 and code != 130 else code


def unseen_end(record: Mapping[str, Any], told: str, *, canceled: bool) -> tuple[State, str, int | None]:
    """State, message and exit code of a job that has ended and left no exit code.

    By what it said itself, else by whether it was ``canceled``; ``told`` is what the platform says.
    """
    if ending(record) in ("SUCCESS", "SKIPPED"):
        return "COMPLETE", f"finished; {told}", 0
    return "CANCELED" if canceled else "ERROR", told, None


def ending(record: Mapping[str, Any]) -> str | None:
    """SUCCESS, SKIPPED or FAILURE where the run came to an end that it could tell; else None."""
    lines = status_lines(record)
    last = str(lines[-1].get("status")) if lines else None
    return last if last in ("SUCCESS", "SKIPPED", "FAILURE") else None
