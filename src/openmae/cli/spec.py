"""``mae spec``: check a spec, print a template, list all config options."""

from __future__ import annotations

import argparse
import logging
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from openmae.cli.parser import ACTIONS, Parser, add_spec_arguments

if TYPE_CHECKING:
    from openmae.spec.schema import ExperimentSpec

log = logging.getLogger("openmae")


def add_arguments(parser: Parser) -> None:
    """Add ``check``, ``template`` and ``keys``."""
    commands = parser.add_commands()
    check = commands.add_parser("check", help="print the resolved spec, or all mistakes in it")
    add_spec_arguments(check)
    check.add_argument(
        "--action", choices=(*ACTIONS, "automl"), default="train", help="action to check for (default: train)"
    )
    check.set_defaults(run=_check)
    template = commands.add_parser("template", help="print a commented spec for an action")
    template.add_argument("action", choices=tuple(ACTIONS), metavar="ACTION", help=", ".join(ACTIONS))
    template.set_defaults(run=_template)
    keys = commands.add_parser("keys", help="list all config options: key, type, default, bounds, help")
    keys.add_argument("--action", choices=tuple(ACTIONS), help="list only the options of this action")
    keys.add_argument("--markdown", action="store_true", help="print Markdown, as in docs/configuration.md")
    keys.set_defaults(run=_keys)


def _check(args: argparse.Namespace) -> None:
    from openmae.data.presence import missing_files, missing_sources
    from openmae.spec.load import load_spec, to_yaml

    spec, action = load_spec(args.experiment_spec, args.overrides, action=args.action), args.action
    missing = {**missing_sources(spec, action), **missing_files(spec, action)}
    for key, text in missing.items():
        log.warning("%s: %s on this machine.", key, text)
    if action in ("train", "automl") and spec.train.recipe != "tao":
        spec = _decided(spec, missing)
    print(to_yaml(spec), end="")


def _decided(spec: ExperimentSpec, missing: Mapping[str, str]) -> ExperimentSpec:
    """Return the spec with the choices of its recipe, as far as the data can be read here."""
    from openmae.actions.facts import decide
    from openmae.actions.sources import open_training_data
    from openmae.storage.encryption import resolve_key
    from openmae.storage.urls import is_remote

    sources = (spec.dataset.train_data_sources, spec.dataset.val_data_sources)
    if missing or not sources[0] or any(map(is_remote, sources)):
        log.warning("train.recipe=%s chooses the options that are not set when it has the data.", spec.train.recipe)
        return spec
    return decide(spec, *open_training_data(spec), resolve_key(spec.encryption_key))


def _template(args: argparse.Namespace) -> None:
    from openmae.spec.describe import template

    print(template(args.action), end="")


def _keys(args: argparse.Namespace) -> None:
    from openmae.spec.describe import KeyRow, keys_table

    rows = keys_table(args.action)
    print(_markdown(rows) if args.markdown else _table([KeyRow._fields, *rows]))


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as one Markdown table per section."""
    sections: dict[str, list[str]] = {}
    for key, *cells in rows:
        kind, default, bounds, help = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
        row = f"| `{key}` | {kind} | {f'`{default}`' if default else ''} | {bounds} | {help} |"
        sections.setdefault(key.rpartition(".")[0] or "Top level", []).append(row)
    lines = [
        "# Configuration",
        "",
        "All config options. `make docs` generates this page from the schema; `mae spec keys`",
        "prints the same table, and `mae spec template ACTION` a commented spec.",
        "",
    ]
    for section, table in sections.items():
        lines += [f"## {section}", "", "| key | type | default | bounds | description |", "|---|---|---|---|---|"]
        lines += [*table, ""]
    return "\n".join(lines[:-1])


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows in columns. The last two columns are wrapped to fit a terminal of 120 columns or more."""
    total = max(shutil.get_terminal_size((160, 24)).columns, 120)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 2)]
    widths.append(24)
    widths.append(max(24, total - sum(widths) - 2 * len(widths)))
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            parts = [(cell[i] if i < len(cell) else "").ljust(w) for cell, w in zip(cells, widths, strict=True)]
            lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)
