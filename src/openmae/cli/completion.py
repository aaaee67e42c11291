"""``mae completion``: scripts for tab completion, which get their candidates from ``mae completion words``."""

from __future__ import annotations

import argparse
import os

from openmae.cli.parser import Parser

_SCRIPTS = {
    "bash": """\
_mae() {
    local IFS=' '
    local line="${COMP_WORDS[*]:0:COMP_CWORD+1}"
    local IFS=$'\\n'
    COMPREPLY=($(MAE_LINE="$line" mae completion words 2>/dev/null))
    [[ ${COMPREPLY-} == *= ]] && compopt -o nospace 2>/dev/null
}
complete -o default -F _mae mae
""",
    "zsh": """\
#compdef mae
_mae() {
    local -a found
    found=("${(@f)$(MAE_LINE="${words[1,CURRENT-1]} $PREFIX" mae completion words 2>/dev/null)}")
    [[ -n $found[1] ]] && compadd -S '' -- ${(M)found:#*=}
    [[ -n $found[1] ]] && compadd -- ${found:#*=} || _files
}
compdef _mae mae
""",
    "fish": """\
complete -c mae -a '(MAE_LINE=(commandline -cp | string collect) mae completion words 2>/dev/null)'
""",
}
_HELP = """\
Print a script that completes commands, options and config keys with the Tab key. Load it in the shell's startup file:

  bash   eval "$(mae completion bash)"       in ~/.bashrc
  zsh    eval "$(mae completion zsh)"        in ~/.zshrc, after compinit
  fish   mae completion fish | source        in ~/.config/fish/config.fish
"""


def add_arguments(parser: Parser) -> None:
    """Add the name of the shell."""
    parser.description = _HELP
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    # "words" is called by the scripts, with the line up to the cursor in MAE_LINE
    parser.add_argument("shell", choices=(*_SCRIPTS, "words"), metavar="SHELL", help=", ".join(_SCRIPTS))


def run(args: argparse.Namespace, root: Parser) -> None:
    """Print the script of a shell, or the candidates that complete the words in ``MAE_LINE``."""
    if args.shell in _SCRIPTS:
        print(_SCRIPTS[args.shell], end="")
        return
    line = os.environ.get("MAE_LINE", "")
    words = line.split()[1:]
    current = "" if line.endswith(" ") or not words else words.pop()
    print("\n".join(candidates(root, words, current)))


def candidates(root: Parser, before: list[str], current: str) -> list[str]:
    """Return the completions of ``current``.

    Args:
        root: the parser of ``mae``.
        before: the complete words between ``mae`` and ``current``.
        current: the beginning of a word; may be empty.
    """
    parser = root.leaf(before)
    if before and (choices := parser.flags.get(before[-1])):
        found = list(choices)
    elif current.startswith("-"):
        found = list(parser.flags)
    elif parser.takes_overrides and "=" not in current:
        from openmae.spec.describe import fields

        found = [*parser.commands, *parser.values, *(f"{key}=" for key in fields())]
    else:
        found = [*parser.commands, *parser.values]
    return [word for word in found if word.startswith(current) and word != "words"]
