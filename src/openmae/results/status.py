"""``status.json``: what a run is doing, as JSON lines that other programs follow.

One object a line: ``date`` (m/d/yyyy), ``time`` (h:m:s), ``status``, ``verbosity``, ``message``, and ``kpi`` (a flat
object of finite numbers) where there are numbers. The line of an epoch also has ``epoch`` and ``max_epoch`` (from 0),
``step``, ``max_step``, ``time_per_epoch``, ``time_per_step`` and ``eta`` (as ``0:01:23.456789``). The layout is that
of TAO's status logger, so that programs that follow a TAO job can follow this one.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from openmae.storage import layout
from openmae.storage.atomic import complete_lines, drop_torn_line, make_folder

STATUSES = ("STARTED", "RUNNING", "SUCCESS", "FAILURE", "SKIPPED")
VERBOSITIES = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

log = logging.getLogger("openmae")


class StatusLog:
    """Writes ``folder/status.json``, one flushed line at a time.

    Only one process of a run (rank 0) may hold it.

    Args:
        folder: the action's results folder; created when it does not exist.
        append: keep the lines of an earlier run (a resumed one) instead of starting anew.

    Raises:
        UserError: the folder cannot be created or written.
    """

    def __init__(self, folder: Path, append: bool) -> None:
        self.path = make_folder(Path(folder)) / layout.STATUS
        if append and self.path.exists():
            drop_torn_line(self.path)
        else:
            self.path.write_text("", encoding="utf-8")

    def write(
        self,
        status: str,
        message: str,
        *,
        verbosity: str = "INFO",
        kpi: Mapping[str, float] | None = None,
        progress: Mapping[str, int | str] | None = None,
    ) -> None:
        """Append one line.

        Args:
            status: one of ``STATUSES``.
            message: for a person.
            verbosity: one of ``VERBOSITIES``.
            kpi: metric name -> value. JSON has no NaN or infinity: such values are left out and the
                message names them.
            progress: fields of the line itself, such as ``epoch`` and ``eta``.

        Raises:
            ValueError: an unknown status or verbosity.
        """
        if status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, not {status!r}")
        if verbosity not in VERBOSITIES:
            raise ValueError(f"verbosity must be one of {', '.join(VERBOSITIES)}, not {verbosity!r}")
        numbers = {name: float(value) for name, value in (kpi or {}).items()}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        if dropped := [name for name in numbers if name not in finite]:
            message = f"{message} (not finite: {', '.join(dropped)})"
        now = datetime.now()
        entry: dict[str, Any] = {
            "date": f"{now.month}/{now.day}/{now.year}",
            "time": f"{now.hour}:{now.minute}:{now.second}",
            "status": status,
            "verbosity": verbosity,
            "message": message,
            **(progress or {}),
        }
        if finite:
            entry["kpi"] = finite
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")


def read_status(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a ``status.json``, oldest first.

    A last line that is still being written is left out; a damaged line is skipped with a warning.
    """
    entries = []
    for number, line in enumerate(complete_lines(Path(path)), start=1):
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            log.warning("%s: line %d is not a JSON object and is skipped", path, number)
    return entries
