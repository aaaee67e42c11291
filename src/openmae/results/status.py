"""``status.json``: the progress of a run as JSON lines, in the format of TAO's status logger.

Each line is an object with ``date`` (m/d/yyyy), ``time`` (h:m:s), ``status``, ``verbosity``, ``message`` and, if there
are metrics, ``kpi`` (a flat object of finite numbers). The line of an epoch also has ``epoch`` and ``max_epoch`` (both
counted from 0), ``step``, ``max_step``, ``time_per_epoch``, ``time_per_step`` and ``eta`` (``0:01:23.456789``).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from openmae.storage import layout
from openmae.storage.atomic import complete_lines, drop_torn_line, make_folder, parse_object

Status = Literal["STARTED", "RUNNING", "SUCCESS", "FAILURE", "SKIPPED"]
Verbosity = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]

log = logging.getLogger("openmae")


class StatusLog:
    """A writer of ``status.json`` in a results folder, used only by rank 0; ``append`` keeps the existing lines.

    Raises:
        UserError: the folder cannot be created or written.
    """

    def __init__(self, folder: Path, append: bool) -> None:
        self.path = make_folder(folder) / layout.STATUS
        if append and self.path.exists():
            drop_torn_line(self.path)
        else:
            self.path.write_text("", encoding="utf-8")

    def write(
        self,
        status: Status,
        message: str,
        *,
        verbosity: Verbosity = "INFO",
        kpi: Mapping[str, float] | None = None,
        progress: Mapping[str, int | str] | None = None,
    ) -> None:
        """Append a line, with ``progress`` as further fields.

        Metrics in ``kpi`` that are not finite are left out, and named in the message.
        """
        kpi = {name: float(value) for name, value in (kpi or {}).items()}
        finite = {name: value for name, value in kpi.items() if math.isfinite(value)}
        if len(finite) < len(kpi):
            message = f"{message} (not finite: {', '.join(name for name in kpi if name not in finite)})"
        now = datetime.now()
        entry = {
            "date": f"{now.month}/{now.day}/{now.year}",
            "time": f"{now.hour}:{now.minute}:{now.second}",
            "status": status,
            "verbosity": verbosity,
            "message": message,
            **(progress or {}),
            **({"kpi": finite} if finite else {}),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")


def read_status(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a ``status.json``, oldest first.

    An incomplete last line is left out. Damaged lines are skipped with a warning.
    """
    entries = []
    for number, line in enumerate(complete_lines(path), start=1):
        if entry := parse_object(line):
            entries.append(entry)
        else:
            log.warning("%s: line %d is not a JSON object and is skipped", path, number)
    return entries
