"""What a run said about itself in ``status.json``: the lines that a job wrote, and no earlier run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from openmae.jobs.artifacts import below, read_text
from openmae.jobs.job import State

EXIT = "exit_code"  # in a job's folder, on clusters


def status_lines(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The whole lines of ``status.json`` that were written since the job began to run, oldest first.

    Raises:
        DataError: the results are in a remote store that cannot be read.
    """
    began = next((item["at"] for item in record["transitions"] if item["state"] == "RUNNING"), None)
    text = read_text(below(record["results_folder"], "status.json")) if began else None
    if not began or text is None:
        return []
    # the log has whole seconds; a clock of a file server may lag a little
    earliest = datetime.fromisoformat(began) - timedelta(seconds=2)
    lines = []
    for line in text.split("\n")[:-1]:
        try:
            entry = json.loads(line)
            when = datetime.strptime(f"{entry['date']} {entry['time']}", "%m/%d/%Y %H:%M:%S").astimezone()
        except (ValueError, KeyError, TypeError):
            continue  # not a line of ours
        if when >= earliest:
            lines.append(entry)
    return lines


def exit_code(folder: Path) -> int | None:
    """What stands in a job's folder of how it ended; None before."""
    path = folder / EXIT
    return int(path.read_text(encoding="utf-8")) if path.is_file() else None


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
