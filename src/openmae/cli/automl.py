"""``mae automl``: search, join a search, look at one."""

from __future__ import annotations

import argparse
from typing import Any

from openmae.cli.parser import Parser, add_spec_arguments
from openmae.errors import UserError
from openmae.jobs.platforms import PLATFORMS

_MODES = ("worker", "dashboard")
_EPILOG = """\
A search trains every recommendation as a job, the spec's own values first; its keys are those of the section automl
(`mae spec keys`). Ctrl-C pauses it, and the same command goes on.

  mae automl -e spec.yaml                    search; report.html, best.yaml and model_best.pth are in RESULTS/automl
  mae automl worker -e spec.yaml             one more process for a search, here or on another machine
  mae automl dashboard -e spec.yaml          look at it in a browser (pip install 'openmae[automl]')
"""


def add_arguments(parser: Parser) -> None:
    """Declare the command."""
    parser.description = "Search for the best values of training options."
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_spec_arguments(parser)
    parser.add_argument("--platform", choices=PLATFORMS, default="local", help="where jobs run")
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="of the dashboard (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from openmae.spec.load import load_spec

    mode = args.overrides.pop(0) if args.overrides and args.overrides[0] in _MODES else ""
    spec = load_spec(args.experiment_spec, args.overrides, action="automl")
    from openmae.automl import search

    if mode == "worker":
        search.work(spec, args.platform)
    elif mode == "dashboard":
        _dashboard(spec, args.port)
    else:
        search.run(spec, args.platform)


def _dashboard(spec: Any, port: int) -> None:
    try:
        import optuna_dashboard
    except ImportError as error:
        raise UserError("`mae automl dashboard` needs optuna-dashboard.", "pip install 'openmae[automl]'") from error
    from openmae.automl.database import stored

    storage = stored(spec)
    print(f"The search is shown at http://127.0.0.1:{port} (Ctrl-C stops it)", flush=True)
    optuna_dashboard.run_server(storage, host="127.0.0.1", port=port)
