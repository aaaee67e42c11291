"""``mae checkpoint``: what fsdp wrote in parts, joined."""

from __future__ import annotations

import argparse
from pathlib import Path

from openmae.cli.parser import Parser
from openmae.errors import CheckpointError, RunError, SpecError
from openmae.storage.urls import is_remote, redact


def add_arguments(parser: Parser) -> None:
    """Add ``consolidate``."""
    commands = parser.add_commands()
    command = commands.add_parser(
        "consolidate",
        help="write the whole checkpoint of a folder of parts",
        description="Write the whole checkpoint of a folder of parts, which takes memory for all of it.",
    )
    add = command.add_argument
    add("folder", type=Path, metavar="FOLDER", help="model_epoch_EEE_step_SSSSS.shards")
    add("-o", "--output", metavar="OUT", help="default: the same name with .pth, beside it")
    add("--encryption-key", default="", metavar="KEY", help="of encrypted parts: env:NAME or file:PATH")
    command.set_defaults(run=_consolidate)


def _consolidate(args: argparse.Namespace) -> None:
    if args.output and is_remote(args.output):
        raise SpecError(
            f"-o must be a path on this machine, not {redact(args.output)}.", "Write it here, and copy it to the store."
        )
    print(consolidate(args.folder, Path(args.output) if args.output else None, args.encryption_key))


def consolidate(folder: Path, out: Path | None = None, encryption_key: str = "") -> Path:
    """Write the whole checkpoint of a folder of parts; returns its path.

    Args:
        out: default: beside the folder, under the name that training would have given it.
        encryption_key: opens the parts, and encrypts what is written.

    Raises:
        SpecError: ``out`` exists, or is in a folder that cannot be written.
        CheckpointError: it is no such folder, or damaged.
        RunError: the disk or the memory is full.
    """
    from openmae.checkpoints.folder import read_training_state, write_checkpoint
    from openmae.checkpoints.parts import SHARDS, joined
    from openmae.storage.atomic import make_folder
    from openmae.storage.encryption import resolve_key

    if folder.suffix != SHARDS or not folder.is_dir():
        raise CheckpointError(
            f"{str(folder)!r} is no checkpoint in parts: such a one is a folder, model_epoch_*{SHARDS}.",
            "A .pth file is whole already. Name a folder that train.sharded_checkpoints=true has left.",
        )
    out = out or folder.with_suffix(".pth")
    if out.exists():
        raise SpecError(f"{out} exists, and is not replaced unasked.", "Give another name with -o, or remove it.")
    key = resolve_key(encryption_key)
    make_folder(out.parent, "-o")
    try:
        payload = joined(read_training_state(folder, key, lazily=True))
    except (MemoryError, RuntimeError) as error:  # torch's own name for want of memory is the latter
        size = sum(file.stat().st_size for file in folder.iterdir()) / 2**30
        raise RunError(
            f"{folder} could not be joined: {str(error).partition(chr(10))[0] or 'no memory is left'}.",
            f"The whole takes {size:.2g} GiB of memory: join it on a machine that has that.",
        ) from error
    try:
        write_checkpoint(payload, out, key)
    except RunError as error:
        raise RunError(error.problem, f"Free space in {out.parent}, or name a place with room with -o.") from error
    return out
