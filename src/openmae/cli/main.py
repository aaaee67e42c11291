"""``mae``: parse the command line, import only the requested command, and turn errors into exit codes.

Exit codes: 0 done, 1 the run failed, 2 invalid input, 75 preempted (run the command again), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from openmae._version import __version__
from openmae.cli import automl, cache, completion, dataset, info, jobs, models, serve, skill, spec
from openmae.cli.parser import ACTIONS, Parser, add_spec_arguments, nearest
from openmae.errors import DataError, OpenMAEError, Preempted
from openmae.main_guard import end_if_rerun
from openmae.results.console import notices_on_stderr
from openmae.results.streams import OutputLostError, guarded, open_standard_streams
from openmae.spec.actions import DEVICES, SEARCH, TABLE, Action

_WORK = {*ACTIONS, "quickstart", "serve", "automl"}  # commands whose result is not their output
_OTHERS = {
    "serve": (serve, "serve a model over HTTP, with a page to try it"),
    "automl": (automl, SEARCH.title),
    "jobs": (jobs, "run actions as background jobs, here or on a cluster"),
    "dataset": (dataset, "check a data source, or pack images into shards"),
    "models": (models, "list the architectures: size, operations, memory, machine"),
    "info": (info, "describe a file: a checkpoint, an exported model, results"),
    "spec": (spec, "check a spec, print a template, list all config options"),
    "cache": (cache, "list or clear downloaded and extracted data"),
    "skill": (skill, "install the skill for coding agents and NVIDIA's runner"),
    "completion": (completion, "set up tab completion in a shell"),
}
_QUICKSTART = "pretrain, fine-tune and compare models on a small data set"
_RESTART = "begin a new run; an earlier run in the results folder is kept under a dated name"
_PLAN = "print the memory, the batch and the time that the run needs on GPUs (estimates), and do not train"
_HELP = """\
Pretrain image backbones with masked autoencoders, fine-tune them, and deploy them.

commands:
{commands}

examples:
  mae quickstart
  mae train dataset.train_data_sources=photos results_dir=runs/photos
  mae train -e spec.yaml train.num_epochs=100

`mae COMMAND --help` describes a command, `mae spec keys` lists all config options.
"""

_ACTION_HELP = """\
example:
  {example}

`mae spec template {action}` prints a spec to start from.
`mae spec keys --action {action}` lists the config options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mae`` and return its exit code.

    Args:
        argv: arguments without the program name (default: those of the process).
    """
    end_if_rerun()
    open_standard_streams()
    try:
        with guarded("stdout", needed=True):
            try:
                args = _parse(sys.argv[1:] if argv is None else argv)
            except SystemExit as stop:
                return int(stop.code or 0)
        with notices_on_stderr(_log_level(args.command)), guarded("stdout", needed=args.command not in _WORK):
            return _run(args, program=argv is None)
    except OutputLostError as lost:
        if lost.reader_left:  # as in `mae spec keys | head`
            return 0
        print(f"{lost}\n  Fix: Free space on the disk, or redirect the output to another one.", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace, *, program: bool) -> int:
    try:
        args.run(args)
        return 0
    except OpenMAEError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Preempted as stop:
        return _interrupted("Preempted: the same command resumes from here.", stop.exit_code, program=program)
    except KeyboardInterrupt:
        return _interrupted("Interrupted.", 130, program=program)
    except OutputLostError:
        raise
    except Exception as error:
        print(_describe_unexpected(args.command, error), file=sys.stderr)
        return 1


def _interrupted(message: str, code: int, *, program: bool) -> int:
    """Print the message and return the exit code; as a program, exit at once.

    A normal exit would wait without limit for threads and child processes, and abort if a thread holds a file's lock.
    """
    if program:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(message, file=sys.stderr)
    if program:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def _log_level(command: str) -> int:
    """Return the log level: of several processes of a run only the first reports progress, the others report errors."""
    from openmae.distributed.topology import follows

    return logging.ERROR if command in DEVICES and follows() else logging.INFO


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, argv = _parser(), automl.with_command(argv)
    args, rest = parser.parse_known_args(argv)
    # argparse returns overrides that follow an option as unknown: `mae train a=1 -e spec.yaml b=2`
    leaf = parser.leaf(argv)
    if rest and (not leaf.takes_overrides or any(item.startswith("-") for item in rest)):
        _refuse_unrecognized(leaf, args, rest)
    if rest:
        args.overrides = [*args.overrides, *rest]
    if mistake := dataset.expanded_braces(getattr(args, "overrides", ())):
        leaf.error(mistake)
    return args


def _parser() -> Parser:
    helps = {"quickstart": _QUICKSTART, **ACTIONS, **{name: help for name, (_, help) in _OTHERS.items()}}
    parser = Parser(
        prog="mae",
        usage="mae [-h] [--version] COMMAND ...",
        description=_HELP.format(commands="\n".join(f"  {name:<16}{help}" for name, help in helps.items())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"openmae {__version__}", help=argparse.SUPPRESS)
    commands = parser.add_commands(dest="command", help=argparse.SUPPRESS)
    for name, help in helps.items():
        command = commands.add_parser(name, description=f"{help[0].upper()}{help[1:]}.")
        if name in ACTIONS:
            _add_action_arguments(command, name)
        elif name == "quickstart":
            _add_quickstart_arguments(command)
        else:
            _OTHERS[name][0].add_arguments(command)
    parser.commands["completion"].set_defaults(run=lambda args: completion.run(args, parser))
    return parser


def _add_action_arguments(parser: Parser, action: str) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _ACTION_HELP.format(action=action, example=_example(TABLE[action]))
    if action == "train":
        group = parser.add_mutually_exclusive_group()
        group.add_argument("--restart", action="store_true", help=_RESTART)
        group.add_argument("--plan", action="store_true", help=_PLAN)
    add_spec_arguments(parser)
    parser.set_defaults(run=_run_action)


def _example(action: Action) -> str:
    """Return a command line that sets what the action needs."""
    models = {"checkpoint": "runs/photos/train/model_best.pth", "onnx": "runs/photos/model.onnx"}
    values = {file.key: models.get(file.kinds[0], "") for file in action.inputs}
    values |= {data.key: "photos/" + data.key.removeprefix("dataset.").split("_")[0] for data in action.data}
    if action.output:
        values[action.output.key] = f"runs/photos/{action.output.file}"
    keys = [group[0] for group in action.required]
    return " ".join(["mae", action.name, *(f"{key}={values[key]}" for key in keys), "results_dir=runs/photos"])


def _add_quickstart_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--results_dir", type=Path, default=Path("results/quickstart"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")
    parser.set_defaults(run=_run_quickstart)


def _refuse_unrecognized(parser: Parser, args: argparse.Namespace, rest: Sequence[str]) -> NoReturn:
    """Name the unknown options, without their values, and what may have been meant: an option or a config key."""
    options = [item.partition("=")[0] for item in rest if item.startswith("-")]
    problem = f"unrecognized arguments: {' '.join(options or rest)}"
    if parser.takes_overrides:
        from openmae.spec.describe import key_of_option

        action = getattr(args, "action", None) or args.command
        section = action if action in ACTIONS else "train"
        keys = " ".join(filter(None, (key_of_option(item, section) for item in rest if item.startswith("-"))))
        if keys:
            parser.refuse(problem, f"Config options are written key=value, here {keys}")
    near = [nearest(option, list(parser.flags)) for option in options if option.startswith("--")]
    if any(near):
        parser.refuse(problem, f"Did you mean {' '.join(filter(None, near))}?")
    if parser.takes_overrides:
        parser.refuse(problem, "Config options are written key=value; `mae spec keys` lists them.")
    parser.error(problem)


def _run_action(args: argparse.Namespace) -> None:
    from openmae.actions.run import running
    from openmae.data.presence import check_sources
    from openmae.spec.load import load_spec

    _hide_secrets()
    if args.command == "train" and args.plan:
        importlib.import_module("openmae.cli.gpu_plan").show(args.experiment_spec, args.overrides)
        return
    spec = load_spec(args.experiment_spec, args.overrides, action=args.command)
    try:
        check_sources(spec, args.command)  # before torch is imported
    except DataError:
        with running(spec, args.command):  # it also goes into status.json
            raise
    flags = {"restart": args.restart} if args.command == "train" else {}
    importlib.import_module(f"openmae.actions.{args.command}").run(spec, **flags)


def _hide_secrets() -> None:
    """Remove an encryption key from ``sys.argv``, which loggers such as Weights & Biases record."""
    from openmae.spec.option import SECRET_MARK, is_secret

    for index, (name, equals, value) in enumerate(item.partition("=") for item in sys.argv):
        if name.lstrip("+") == "encryption_key" and is_secret(value):
            sys.argv[index] = name + equals + SECRET_MARK


def _run_quickstart(args: argparse.Namespace) -> None:
    importlib.import_module("openmae.quickstart").run(args.results_dir, args.seed)


def _describe_unexpected(command: str, error: Exception) -> str:
    """Return the message for an unexpected error: a disk error, or a bug, with the traceback in a file."""
    from openmae.storage.atomic import disk_error, fault_of_disk

    if fault := fault_of_disk(error):
        return str(disk_error(fault, Path.cwd(), verb="read or written"))
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="mae-traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(trace)
        where = f"The traceback is in {file.name}"
    except OSError:  # the disk is full
        where = f"The traceback:\n{trace}"
    return f"mae {command} failed: {type(error).__name__}: {error}\n  This is a bug in openmae or a library. {where}"
