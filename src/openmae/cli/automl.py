"""``mae automl``: start or continue a search, add a worker to it, or show it in a browser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from openmae.cli.parser import Parser, add_spec_arguments
from openmae.errors import UserError
from openmae.jobs.platforms import PLATFORMS

_COMMANDS = ("search", "worker", "dashboard")
_EPILOG = """\
Each trial of a search is a training job; trial 0 has the values of the spec. The options of a search are in the section
automl (`mae spec keys`). Ctrl-C pauses a search; the same command continues it.

  mae automl -e spec.yaml              search; report.html, best.yaml and model_best.pth are in RESULTS/automl
  mae automl worker -e spec.yaml       run trials of a search in another process, here or on another machine
  mae automl dashboard -e spec.yaml    show a search in a browser (pip install 'openmae[automl]')

`mae automl COMMAND --help` describes a command; without one, it is search.
"""


def add_arguments(parser: Parser) -> None:
    """Add ``search``, ``worker`` and ``dashboard``."""
    parser.description = "Search for the best values of training options."
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.takes_overrides = True  # without a command they are those of search
    commands = parser.add_commands()
    search = commands.add_parser("search", help="start or continue a search (the default)")
    worker = commands.add_parser("worker", help="run trials of a search in another process")
    dashboard = commands.add_parser("dashboard", help="show a search in a browser")
    search.description = "Start a search, or continue the one in the results folder."
    worker.description = "Run trials of a search until none are left. Use the spec and results_dir of the search."
    dashboard.description = "Show a search in a browser. Use the spec and results_dir of the search."
    for command in (search, worker, dashboard):
        add_spec_arguments(command)
    for command in (search, worker):
        command.add_argument("--platform", choices=PLATFORMS, default="local", help="where jobs run")
    dashboard.add_argument("--port", type=int, default=8080, metavar="N", help="port (default: %(default)s)")
    search.set_defaults(run=_run_search)
    worker.set_defaults(run=_run_worker)
    dashboard.set_defaults(run=_run_dashboard)


def with_command(argv: Sequence[str]) -> list[str]:
    """Insert ``search`` into the arguments ``automl ...`` of ``mae`` if they name no other command."""
    command, *rest = argv or [""]
    if command == "automl" and (not rest or rest[0] not in (*_COMMANDS, "-h", "--help")):
        return [command, "search", *rest]
    return list(argv)


def _run_search(args: argparse.Namespace) -> None:
    from openmae.automl import search

    search.run(_load(args), args.platform)


def _run_worker(args: argparse.Namespace) -> None:
    from openmae.automl import search

    search.work(_load(args), args.platform)


def _run_dashboard(args: argparse.Namespace) -> None:
    from openmae.automl.database import read_storage

    try:
        import optuna_dashboard
    except ImportError as error:
        raise UserError("`mae automl dashboard` needs optuna-dashboard.", "pip install 'openmae[automl]'") from error
    storage = read_storage(_load(args))
    print(f"The search is shown at http://127.0.0.1:{args.port} (Ctrl-C stops it)", flush=True)
    optuna_dashboard.run_server(storage, host="127.0.0.1", port=args.port)


def _load(args: argparse.Namespace) -> Any:
    from openmae.spec.load import load_spec

    return load_spec(args.experiment_spec, args.overrides, action="automl")
