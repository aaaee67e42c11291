"""Printing of results: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


def print_result(
    value: Any, heads: Sequence[str] | None, rows: Sequence[Sequence[Any]], *, as_json: bool = False
) -> None:
    """Print ``value`` as JSON, or otherwise the table of ``rows``."""
    if as_json:
        print(json.dumps(value, indent=1))
    else:
        print_table(heads, rows)


def print_table(heads: Sequence[str] | None, rows: Sequence[Sequence[Any]]) -> None:
    """Print rows of text in columns; without ``heads``, pairs of label and value."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=heads is not None, box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in heads or ("", ""):
        table.add_column(head, overflow="fold")
    for row in rows:
        # a path may have bytes that are not UTF-8, which no terminal can print
        table.add_row(*(cell.encode(errors="replace").decode() if isinstance(cell, str) else cell for cell in row))
    # a pipe has no width: do not wrap there, so that each row is one line
    console = Console(file=sys.stdout, highlight=False, markup=False, width=None if sys.stdout.isatty() else 400)
    console.print(table)
