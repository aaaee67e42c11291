"""What every action does around its work: a results folder, a status log, the resolved spec, and the end told."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from openmae.data.images import CORRUPT_LIST
from openmae.results.files import make_folder, write_atomically
from openmae.results.status import StatusLog
from openmae.spec.load import to_yaml
from openmae.spec.schema import ExperimentSpec

log = logging.getLogger("openmae")

Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Run:
    """A running action: its results folder and its status log."""

    folder: Path
    status: StatusLog

    def write_spec(self, spec: ExperimentSpec) -> None:
        """Write what acts as ``experiment.yaml``; it loads back."""
        write_atomically(self.folder / "experiment.yaml", to_yaml(spec))


@contextmanager
def running(spec: ExperimentSpec, action: str, *, append: bool = False) -> Iterator[Run]:
    """Open the results folder, write ``experiment.yaml``, and tell ``status.json`` how the action ended.

    Args:
        spec: resolved.
        action: names the folder.
        append: keep the status lines of an earlier run in the same folder.
    """
    folder = make_folder(spec.results_folder(action))
    status = StatusLog(folder, append=append)
    if not append:
        (folder / CORRUPT_LIST).unlink(missing_ok=True)
    run = Run(folder, status)
    run.write_spec(spec)
    status.write("STARTED", f"{action} started")
    try:
        yield run
    except KeyboardInterrupt:
        status.write("FAILURE", f"{action} was interrupted", verbosity="WARNING")
        raise
    except BaseException as error:
        status.write("FAILURE", f"{type(error).__name__}: {error}", verbosity="ERROR")
        raise
    status.write("SUCCESS", f"{action} finished")
    log.info("Results are in %s; open report.html there.", folder)


def show_table(title: str, rows: Rows) -> None:
    """Print label and value pairs as a table on the terminal."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for label, value in rows:
        table.add_row(label, value)
    console = Console(stderr=True, highlight=False)
    console.print(table)
    console.print()
