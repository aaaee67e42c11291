"""``mae``: parse the command, import what it needs and nothing else, turn errors into exit codes.

Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted, 75 preempted: start it again.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from openmae._version import __version__
from openmae.cli.automl import add_arguments as add_automl_arguments
from openmae.cli.automl import with_command
from openmae.cli.cache import add_arguments as add_cache_arguments
from openmae.cli.checkpoint import add_arguments as add_checkpoint_arguments
from openmae.cli.dataset import add_dataset_commands, expanded_braces
from openmae.cli.jobs import SPEC_OPTION
from openmae.cli.jobs import add_arguments as add_jobs_arguments
from openmae.cli.skill import add_arguments as add_skill_arguments
from openmae.errors import OpenMAEError, Preempted
from openmae.main_guard import end_if_rerun
from openmae.results.console import notices_on_stderr
from openmae.results.streams import OutputLostError, guarded, open_standard_streams
from openmae.serving.settings import Settings

_ACTIONS = {
    "train": "pretrain or fine-tune a backbone",
    "evaluate": "measure a trained model on validation images",
    "inference": "classify or embed test images",
    "export": "write a trained model as ONNX",
    "gen_trt_engine": "build a TensorRT engine from ONNX",
}
_WORK = {*_ACTIONS, "quickstart", "serve", "automl"}  # what they print only accompanies what they do
_EXAMPLES = """\
examples:
  mae quickstart
  mae train dataset.train_data_sources=photos model.arch=vit_small_patch16
  mae train -e spec.yaml train.num_epochs=100
  mae spec template train > spec.yaml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mae`` with ``argv`` (default: the command line) and return its exit code."""
    end_if_rerun()
    open_standard_streams()
    try:
        with guarded("stdout", needed=True):
            try:
                args = _parse(argv)
            except SystemExit as stop:
                return int(stop.code or 0)
        with notices_on_stderr(_level(args.command)), guarded("stdout", needed=args.command not in _WORK):
            return _run(args, program=argv is None)
    except OutputLostError as lost:
        if lost.reader_left:  # as in `mae spec keys | head`: it has what it wanted
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
        print(_told(args.command, error), file=sys.stderr)
        return 1


def _interrupted(message: str, code: int, *, program: bool) -> int:
    """Say what happened; as a program, end at once.

    Python would wait without a limit for threads and child processes, and aborts where a thread holds a file's lock.
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


def _level(command: str) -> int:
    """Of the processes that a launcher or several nodes started, one tells what happens; the others tell of errors."""
    from openmae.distributed.topology import follows

    if not follows():
        return logging.INFO
    from openmae.spec.schema import DEVICES

    return logging.ERROR if command in DEVICES else logging.INFO


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(with_command(sys.argv[1:] if argv is None else argv))
    # argparse gives overrides that follow an option back as unknown: `mae train a=1 -e spec.yaml b=2`
    if rest and (not hasattr(args, "overrides") or any(item.startswith("-") for item in rest)):
        parser.error(_unrecognized(args, rest))
    if rest:
        args.overrides = [*args.overrides, *rest]
    if mistake := expanded_braces(getattr(args, "overrides", ())):
        parser.error(mistake)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mae",
        description="Pretrain image backbones with masked autoencoders, fine-tune them, measure them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"openmae {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help in _ACTIONS.items():
        command = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"`mae spec template {name}` prints a spec to start from, `mae spec keys` all options.",
            allow_abbrev=False,
        )
        _add_spec_arguments(command)
        command.set_defaults(run=_run_action)
    _add_serve_arguments(
        commands.add_parser(
            "serve", help="answer requests over HTTP, with a page to try a model on", allow_abbrev=False
        )
    )
    add_dataset_commands(commands.add_parser("dataset", help="pack images into shards, check what a source holds"))
    add_automl_arguments(
        commands.add_parser("automl", help="search for the best training options", allow_abbrev=False),
        _add_spec_arguments,
    )
    add_jobs_arguments(commands.add_parser("jobs", help="run actions as jobs that feed one another"), _ACTIONS)
    add_checkpoint_arguments(commands.add_parser("checkpoint", help="join a checkpoint that fsdp wrote in parts"))
    add_cache_arguments(commands.add_parser("cache", help="what is downloaded and extracted: list or clear it"))
    add_skill_arguments(commands.add_parser("skill", help="the folder that coding agents and other runners use"))
    _add_spec_commands(commands.add_parser("spec", help="check a spec, print a template or all options"))
    quickstart = commands.add_parser("quickstart", help="see on a small data set that pretraining helps")
    quickstart.add_argument("--results_dir", type=Path, default=Path("results/quickstart"), metavar="DIR")
    quickstart.add_argument("--seed", type=int, default=0, metavar="N")
    quickstart.set_defaults(run=_run_quickstart)
    return parser


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    limits = Settings()
    add = parser.add_argument
    add("-m", "--model", type=Path, required=True, metavar="MODEL", help="a checkpoint, an .onnx or an .engine file")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for every network (default: %(default)s)")
    add("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    add("--encryption-key", default="", metavar="KEY", help="of an encrypted model: env:NAME or file:PATH")
    add(
        "--max-batch", type=int, default=limits.max_batch, metavar="N", help="images run at once (default: %(default)s)"
    )
    add(
        "--max-request-mb",
        type=float,
        default=limits.max_request_mb,
        metavar="MB",
        help="size of a request, all its images together (default: %(default)g)",
    )
    add(
        "--max-pixels",
        type=int,
        default=limits.max_pixels,
        metavar="N",
        help="width x height of an image (default: %(default)s)",
    )
    parser.set_defaults(run=_run_serve)


def _add_spec_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="spec_command", metavar="COMMAND", required=True)
    check = commands.add_parser("check", help="print the resolved spec, or every mistake in it", allow_abbrev=False)
    _add_spec_arguments(check)
    check.add_argument(
        "--action", choices=(*_ACTIONS, "automl"), default="train", help="what it is for (default: train)"
    )
    check.set_defaults(run=_run_check)
    template = commands.add_parser("template", help="print a commented spec to start from")
    template.add_argument("action", choices=_ACTIONS, metavar="ACTION", help=", ".join(_ACTIONS))
    template.set_defaults(run=_run_template)
    keys = commands.add_parser("keys", help="list all options: key, type, default, bounds, help")
    keys.add_argument("--action", choices=_ACTIONS, help="only those in the spec of this action")
    keys.set_defaults(run=_run_keys)


def _unrecognized(args: argparse.Namespace, rest: Sequence[str]) -> str:
    """Name the options that no command has, without their values, and the keys of a spec that they may mean."""
    options = [item.partition("=")[0] for item in rest if item.startswith("-")]
    text = f"unrecognized arguments: {' '.join(options or rest)} (options of a spec are written key=value"
    if not hasattr(args, "overrides"):
        return f"{text})"
    from openmae.spec.describe import key_of_option

    instead = [key_of_option(item, _spec_section(args)) for item in rest if item.startswith("-")]
    return f"{text}, here {' '.join(filter(None, instead))})" if any(instead) else f"{text})"


def _spec_section(args: argparse.Namespace) -> str:
    """The section of a spec that the command reads first."""
    action = getattr(args, "action", None) or args.command
    return action if action in _ACTIONS else "train"


def _add_spec_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *SPEC_OPTION, dest="experiment_spec", metavar="SPEC", help="YAML file; without it, all defaults"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="option that replaces the file's")


def _run_action(args: argparse.Namespace) -> None:
    from openmae.spec.load import load_spec

    _hide_secrets()

    spec = load_spec(args.experiment_spec, args.overrides, action=args.command)
    importlib.import_module(f"openmae.actions.{args.command}").run(spec)


def _hide_secrets() -> None:
    """Take a key that is an override out of ``sys.argv``, which loggers such as Weights & Biases write down."""
    from openmae.spec.option import SECRET_MARK, is_secret

    for place, (name, equals, value) in enumerate(item.partition("=") for item in sys.argv):
        if name.lstrip("+") == "encryption_key" and is_secret(value):
            sys.argv[place] = name + equals + SECRET_MARK


def _run_quickstart(args: argparse.Namespace) -> None:
    importlib.import_module("openmae.quickstart").run(args.results_dir, args.seed)


def _run_serve(args: argparse.Namespace) -> None:
    settings = Settings(max_batch=args.max_batch, max_request_mb=args.max_request_mb, max_pixels=args.max_pixels)
    server = importlib.import_module("openmae.serving.server")
    server.serve(args.model, args.host, args.port, settings, args.device, args.encryption_key)


def _run_check(args: argparse.Namespace) -> None:
    from openmae.data.presence import missing_files, missing_sources
    from openmae.spec.load import load_spec, to_yaml

    spec, action = load_spec(args.experiment_spec, args.overrides, action=args.action), args.action
    data_of = "train" if action == "automl" else action
    for key, text in {**missing_sources(spec, data_of), **missing_files(spec, action)}.items():
        logging.getLogger("openmae").warning("%s: %s on this machine.", key, text)
    print(to_yaml(spec), end="")


def _run_template(args: argparse.Namespace) -> None:
    from openmae.spec.describe import template

    print(template(args.action), end="")


def _run_keys(args: argparse.Namespace) -> None:
    from openmae.spec.describe import KeyRow, keys_table

    print(_table([KeyRow._fields, *keys_table(args.action)]))


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side; the last two are wrapped so that a row fits the terminal, if that has room."""
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


def _told(command: str, error: Exception) -> str:
    """The message of an error that nobody has explained: of the disk, or a fault in openmae, with its traceback."""
    from openmae.storage.atomic import disk_error, fault_of_disk

    if fault := fault_of_disk(error):
        return str(disk_error(fault, Path.cwd(), verb="read or written"))
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="mae-traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(trace)
        place = f"The traceback is in {file.name}"
    except OSError:  # no place is left for it
        place = f"The traceback:\n{trace}"
    return f"mae {command} failed: {type(error).__name__}: {error}\n  This is a fault in openmae or below it. {place}"
