"""Argument parsing of all commands: suggestions for misspelled words, and the arguments that read a spec."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from openmae.spec.actions import TABLE

ACTIONS = {name: action.title for name, action in TABLE.items()}
_INVALID_CHOICE = re.compile(r"argument (.+?): invalid choice: (.+) \(choose from (.*)\)$", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests the nearest valid word and records what it accepts.

    Attributes:
        flags: the options, such as ``--platform``, with their choices (empty if any value is accepted).
        values: the choices of positional arguments.
        commands: the subcommands with their parsers.
        takes_overrides: whether the command accepts ``key=value`` overrides of a spec.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.flags: dict[str, tuple[str, ...]] = {}
        self.values: list[str] = []
        self.commands: Mapping[str, Parser] = {}
        self.takes_overrides = False
        options.setdefault("allow_abbrev", False)
        super().__init__(*args, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument and record it for suggestions and completion."""
        choices = tuple(str(choice) for choice in options.get("choices") or ())
        if not names[0].startswith("-"):
            self.values += choices
        elif options.get("help") != argparse.SUPPRESS:
            self.flags.update((name, choices) for name in names)
        return super().add_argument(*names, **options)

    def add_commands(self, **options: Any) -> argparse._SubParsersAction[Parser]:
        """Return the object whose ``add_parser`` adds a required subcommand."""
        commands = self.add_subparsers(metavar="COMMAND", required=True, prog=self.prog, **options)
        self.commands = commands.choices
        return commands

    def leaf(self, words: Sequence[str]) -> Parser:
        """Return the parser of the subcommand that ``words`` select."""
        parser = self
        for word in words:
            parser = parser.commands.get(word, parser)
        return parser

    def error(self, message: str) -> NoReturn:
        """Print the problem and a fix, which suggests the nearest word for a misspelled one, and exit with code 2."""
        fix = f"`{self.prog} --help` lists what it accepts."
        if match := _INVALID_CHOICE.match(message):
            argument, given, choices = match.groups()
            near = nearest(given.strip("'\""), re.findall(r"[^\s,'\"]+", choices))
            if argument == "COMMAND":
                message = f"there is no command {given}."
                fix = f"Did you mean `{self.prog} {near}`?" if near else fix
            elif near:
                fix = f"Did you mean {near!r}?"
        self.refuse(message, fix)

    def refuse(self, problem: str, fix: str) -> NoReturn:
        """Print the problem and the fix, and exit with code 2."""
        self.exit(2, f"{self.prog}: {problem}\n  Fix: {fix}\n")


def nearest(word: str, words: Sequence[str]) -> str:
    """Return the word most similar to a misspelled one; empty if none is similar."""
    return next(iter(difflib.get_close_matches(word, words, 1)), "")


def add_spec_arguments(parser: Parser, overrides_help: str = "config option; overrides the value in the file") -> None:
    """Add ``-e`` (also under TAO's name) and the ``key=value`` overrides."""
    parser.add_argument(
        *("-e", "--experiment_spec_file", "--experiment_spec"),
        dest="experiment_spec",
        metavar="SPEC",
        help="YAML file with config options; defaults apply to the rest",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=overrides_help)
    parser.takes_overrides = True
