"""``mae dataset``: pack images into shards, check what a source holds. Nothing heavy is imported until one runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from openmae.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Define ``mae dataset pack`` and ``mae dataset check``."""
    commands = parser.add_commands()
    pack = commands.add_parser("pack", help="write images into WebDataset shards")
    add = pack.add_argument
    add("source", metavar="FOLDER", help="a folder of images, or anything else that dataset.train_data_sources takes")
    add("out", type=Path, metavar="OUT", help="a local folder for the shards OUT-000000.tar, OUT-000001.tar, ...")
    add(
        "--size", type=_number(1, 65_535), metavar="N", help="scale larger images so that the shorter side has N pixels"
    )
    add("--shard-mb", type=_number(1, 1_000_000), default=256, metavar="N", help="megabytes a shard (default: 256)")
    add("--quality", type=_number(1, 100), default=95, metavar="N", help="of the JPEG of a scaled image (default: 95)")
    add("--overwrite", action="store_true", help="replace the shards that are in OUT")
    _add_max_megapixels(pack)
    pack.set_defaults(run=_run_pack)
    check = commands.add_parser("check", help="count images, classes, corrupt and duplicate files")
    check.add_argument("source", metavar="SOURCE", help="a folder, an archive or shards")
    check.add_argument("--results_dir", type=Path, default=Path("results/dataset_check"), metavar="DIR")
    _add_max_megapixels(check)
    check.set_defaults(run=_run_check)


def _add_max_megapixels(parser: Parser) -> None:
    parser.add_argument(
        "--max-megapixels",
        type=_number(1, 100_000),
        default=179,
        metavar="N",
        help="millions of pixels of the largest image that is decoded, as dataset.max_megapixels (default: 179)",
    )


def expanded_braces(overrides: Sequence[str]) -> str:
    """Say what is wrong where a shell has made many overrides of one unquoted pattern of shards, else ""."""
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
            raise argparse.ArgumentTypeError(f"must lie between {least} and {most}, not {value}")
        return value

    return number


def _run_pack(args: argparse.Namespace) -> None:
    from openmae.actions.dataset import pack_source

    sizes = {"shard_mb": args.shard_mb, "quality": args.quality, "max_megapixels": args.max_megapixels}
    pack_source(args.source, args.out, args.size, overwrite=args.overwrite, **sizes)


def _run_check(args: argparse.Namespace) -> None:
    from openmae.actions.dataset import check_source
    from openmae.storage.atomic import FULL, disk_errors

    with disk_errors(args.results_dir, FULL, "results_dir"):
        check_source(args.source, args.results_dir, args.max_megapixels)
