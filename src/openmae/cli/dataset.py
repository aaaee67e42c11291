"""The ``mae dataset`` commands. torch, numpy and Pillow are imported when a command runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from openmae.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Define ``mae dataset pack`` and ``mae dataset check``."""
    commands = parser.add_commands()
    pack = commands.add_parser("pack", help="pack images into WebDataset shards")
    add = pack.add_argument
    add("source", metavar="FOLDER", help="a folder of images, or any other source of dataset.train_data_sources")
    add("out", type=Path, metavar="OUT", help="a local folder; shards/photos gets the shards photos-000000.tar, ...")
    add("--size", type=_number(1, 65_535), metavar="N", help="scale larger images down to a shorter side of N pixels")
    add("--shard-mb", type=_number(1, 1_000_000), default=256, metavar="N", help="megabytes per shard (default: 256)")
    add("--quality", type=_number(1, 100), default=95, metavar="N", help="JPEG quality of scaled images (default: 95)")
    add("--overwrite", action="store_true", help="replace existing shards in OUT")
    _add_max_megapixels(pack)
    pack.set_defaults(run=_run_pack)
    check = commands.add_parser("check", help="count images, classes, corrupt and duplicate files")
    check.add_argument("source", metavar="SOURCE", help="a folder, an archive or shards")
    check.add_argument(
        "--results_dir",
        type=Path,
        default=Path("results/dataset_check"),
        metavar="DIR",
        help="folder for report.html and the lists of files; replaces an earlier report there (default: %(default)s)",
    )
    _add_max_megapixels(check)
    check.set_defaults(run=_run_check)


def _add_max_megapixels(parser: Parser) -> None:
    parser.add_argument(
        "--max-megapixels",
        type=_number(1, 100_000),
        default=179,
        metavar="N",
        help="millions of pixels of the largest image to decode, as dataset.max_megapixels (default: 179)",
    )


def expanded_braces(overrides: Sequence[str]) -> str:
    """Return an error message if the shell has expanded an unquoted pattern of shards, otherwise ""."""
    sources: dict[str, set[str]] = {}
    for key, _, value in (item.partition("=") for item in overrides):
        if key.endswith("_data_sources") and value.endswith(".tar"):
            sources.setdefault(key, set()).add(value)
    for key, values in sources.items():
        if len(values) > 1:
            return (
                f"{key} is given {len(values)} times, such as {min(values)}: the shell has expanded the braces. "
                f"Quote them: {key}='train-{{000..099}}.tar'"
            )
    return ""


def _number(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be between {least} and {most}, not {value}")
        return value

    return number


def _run_pack(args: argparse.Namespace) -> None:
    from openmae.actions.dataset import pack_source
    from openmae.data.shards.packing import PackOptions

    options = PackOptions(args.size, args.shard_mb * 1_000_000, args.quality)
    pack_source(args.source, args.out, options, overwrite=args.overwrite, max_megapixels=args.max_megapixels)


def _run_check(args: argparse.Namespace) -> None:
    from openmae.actions.dataset import check_source
    from openmae.storage.atomic import FULL, disk_errors

    with disk_errors(args.results_dir, FULL, "results_dir"):
        check_source(args.source, args.results_dir, args.max_megapixels)
