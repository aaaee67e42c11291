"""``mae cache``: list and clear downloads, extracted archives, copies of images and results waiting for upload."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from typing import TYPE_CHECKING

from openmae.cli.parser import Parser

if TYPE_CHECKING:
    from openmae.storage.cache import Entry


def add_arguments(parser: Parser) -> None:
    """Add ``list``, ``clear`` and ``path``."""
    commands = parser.add_commands()
    commands.add_parser("list", help="list the entries, most recently used first").set_defaults(run=_list)
    commands.add_parser("clear", help="remove entries that can be recreated and are not in use").set_defaults(
        run=_clear
    )
    commands.add_parser("path", help="print the cache's folder (OPENMAE_CACHE)").set_defaults(run=_path)


def _list(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from openmae.storage import cache

    found = cache.entries()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("kind", "size", "last used", "state", "from"):
        table.add_column(title, justify="right" if title == "size" else "left", overflow="fold")
    for entry in found:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        table.add_row(entry.kind, cache.gigabytes(entry.size), used, _state(entry), entry.origin)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    if found:
        console.print(table)
    total = sum(entry.size for entry in found)
    limit = f"of {cache.gigabytes(cache.limit())} ({cache.SIZE_VARIABLE})"
    console.print(f"{len(found)} entries, {cache.gigabytes(total)} {limit}, in {cache.root()}", soft_wrap=True)


def _state(entry: Entry) -> str:
    if entry.in_use:
        return "in use"
    if entry.complete:
        return "complete"
    return "not uploaded" if not entry.removable else "unfinished"


def _clear(args: argparse.Namespace) -> None:
    from openmae.storage import cache

    freed, kept = cache.clear()
    print(f"Freed {cache.gigabytes(freed)} in {cache.root()}.")
    for entry in kept:
        why = "it is in use" if entry.in_use else "its results are not uploaded yet; delete the folder to discard them"
        print(f"Kept {entry.path} ({entry.origin}): {why}.")


def _path(args: argparse.Namespace) -> None:
    from openmae.storage import cache

    print(cache.root())
