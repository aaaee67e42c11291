"""``mae info``: its arguments and its output."""

import sys
from types import ModuleType

import pytest

from openmae.cli.main import main
from openmae.errors import UserError


@pytest.fixture
def install(monkeypatch):
    """Replace the function that reads files by a fake."""

    def replace(function):
        module = ModuleType("openmae.actions.describe_file")
        module.describe_file = function
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return replace


def test_rows_are_printed(install, capsys):
    calls = []
    install(lambda *arguments: calls.append(arguments) or [("kind", "a file"), ("classes", "2: [red], blue")])
    assert main(["info", "model.pth", "--encryption-key", "env:NAME"]) == 0
    assert calls == [("model.pth", "env:NAME")]
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "kind     a file",
        "classes  2: [red], blue",
    ]


def test_an_unknown_file_is_invalid_input(install, capsys):
    def refuse(*arguments):
        raise UserError("x is of an unknown kind.", "mae info reads checkpoints.")

    install(refuse)
    assert main(["info", "x"]) == 2
    assert capsys.readouterr().err == "x is of an unknown kind.\n  Fix: mae info reads checkpoints.\n"
