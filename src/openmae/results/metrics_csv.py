"""``metrics.csv``: all metrics of a run, one row per logged step.

The first columns are ``step`` and ``epoch`` (counted from 1, as in the names of checkpoints); each new metric adds a
column. A cell is empty if the metric was not measured at that step. Values have full precision. A row with step 0 and
epoch 0 has the metrics before the first step.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from openmae.storage import layout
from openmae.storage.atomic import complete_lines, drop_torn_line, make_folder, write_atomically

Row = dict[str, float]
_KEYS = ("step", "epoch")


class MetricsLog:
    """A writer of ``metrics.csv`` in a results folder, used only by rank 0; ``append`` keeps the existing rows.

    Raises:
        UserError: the folder cannot be created or written.
    """

    def __init__(self, folder: Path, append: bool) -> None:
        self.path = make_folder(folder) / layout.METRICS
        self._columns: list[str] = list(_KEYS)
        if append and self.path.exists():
            drop_torn_line(self.path)
            if header := next(csv.reader(complete_lines(self.path)), None):
                self._columns = header
                return
        self._rewrite([])

    def write(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Append a row of ``values`` by metric; ``epoch`` is counted from 1."""
        row: Row = {"step": int(step), "epoch": int(epoch), **{k: float(v) for k, v in values.items()}}
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            self._rewrite([*read_metrics(self.path), row])
        else:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                self._writer(file).writerow(row)

    def truncate_after(self, step: int) -> None:
        """Drop the rows after ``step``, where a run is resumed and writes them again."""
        self._rewrite([row for row in read_metrics(self.path) if row["step"] <= step])

    def _rewrite(self, rows: Iterable[Row]) -> None:
        text = io.StringIO()
        writer = self._writer(text)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue())

    def _writer(self, file: TextIO) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self._columns, restval="", lineterminator="\n")


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a ``metrics.csv``, each with the metrics measured at its step.

    An incomplete last row is left out. Epochs of old files, which count from 0, are converted to count from 1.
    """
    rows: list[Row] = []
    for cells in csv.DictReader(complete_lines(path)):
        row: Row = {name: float(cell) for name, cell in cells.items() if cell}
        rows.append(row | {name: int(row[name]) for name in _KEYS})
    from_zero = any(row["epoch"] == 0 and row["step"] > 0 for row in rows)
    return [row | {"epoch": row["epoch"] + from_zero} for row in rows]


def before_training(rows: Sequence[Row]) -> Row:
    """Return the metrics before the first step; empty if they were not measured."""
    return next((row for row in rows if row["step"] == 0), {})


def series(rows: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Return the steps and values of a metric, from the rows that have it."""
    measured = [row for row in rows if name in row]
    return [row["step"] for row in measured], [row[name] for row in measured]
