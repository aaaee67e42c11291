"""``mae skill``: build, install or validate the agent skill."""

from __future__ import annotations

import argparse
from pathlib import Path

from openmae.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add ``build``, ``install`` and ``validate``."""
    commands = parser.add_commands()
    build = commands.add_parser("build", help="regenerate the generated files in the source tree")
    build.set_defaults(run=_build)
    install = commands.add_parser("install", help="copy the skill into a folder of skills")
    install.add_argument("folder", type=Path, metavar="DIR", help="receives the folder tao-train-mask-auto-encoder")
    install.add_argument("--overwrite", action="store_true", help="replace an existing copy")
    install.set_defaults(run=_install)
    validate = commands.add_parser(
        "validate", help="check a skill folder by the rules of NVIDIA's runner and skill bank"
    )
    validate.add_argument("folder", type=Path, metavar="DIR", help="the folder that contains SKILL.md")
    validate.set_defaults(run=_validate)


def _build(args: argparse.Namespace) -> None:
    from openmae.skill import FOLDER
    from openmae.skill.package import build

    changed = build()
    print(f"Wrote {', '.join(changed)}" if changed else "Everything is up to date", f"in {FOLDER}.")


def _install(args: argparse.Namespace) -> None:
    import shutil

    from openmae.errors import UserError
    from openmae.skill import FOLDER, NAME

    target: Path = args.folder.expanduser() / NAME
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} already exists.", "Choose another folder, or pass --overwrite to replace it.")
    if target.exists() and not (target / "SKILL.md").is_file():
        raise UserError(f"{target} is not a skill: it has no SKILL.md.", "Choose another folder.")
    try:
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(FOLDER, target, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}.", "Choose another folder.") from error
    print(target)


def _validate(args: argparse.Namespace) -> None:
    from openmae.errors import UserError
    from openmae.skill.validate import find_breaches

    folder = args.folder.expanduser().resolve()
    if breaches := find_breaches(folder):
        count = "1 problem" if len(breaches) == 1 else f"{len(breaches)} problems"
        raise UserError("\n".join([f"{folder} has {count}:", *(f"  {text}" for text in breaches)]))
    print(f"{folder} is valid.")
