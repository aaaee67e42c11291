"""``mae info``: describe a file."""

from __future__ import annotations

import argparse

from openmae.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add the file and the key that decrypts it."""
    add = parser.add_argument
    add("file", metavar="FILE", help="a checkpoint, an .onnx or .engine file, a shard, a folder, or a URL of one")
    add("--encryption-key", default="", metavar="KEY", help="key of an encrypted file: env:NAME or file:PATH")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from openmae.actions.describe_file import describe_file
    from openmae.cli.output import print_table

    print_table(None, describe_file(args.file, args.encryption_key))
