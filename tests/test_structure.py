"""The source has one name for one thing, and files and functions of readable size."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "openmae"
TREES = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text("utf-8")) for path in SOURCE.rglob("*.py")}
MAX_FILE, MAX_FUNCTION = 400, 60  # lines


def test_no_two_modules_have_one_name() -> None:
    """Packages count too. Exempt are modules that declare or parse the options of a package or an action."""
    found = defaultdict(list)
    for name in TREES:
        path = Path(name)
        module = path.parent if path.stem == "__init__" else path
        if not name.startswith(("cli/", "spec/sections/", "spec/actions.py")) and path.stem != "__main__":
            found[module.stem].append(name)
    repeated = {stem: names for stem, names in found.items() if len(names) > 1}
    assert not repeated, repeated


def test_no_two_classes_have_one_name() -> None:
    found = defaultdict(list)
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(name)
    repeated = {name: files for name, files in found.items() if len(files) > 1}
    assert not repeated, repeated


def test_files_are_short() -> None:
    lines = {
        path.relative_to(SOURCE).as_posix(): len(path.read_text("utf-8").splitlines()) for path in SOURCE.rglob("*.py")
    }
    assert not {name: count for name, count in lines.items() if count > MAX_FILE}


def test_functions_are_short() -> None:
    """The docstring does not count."""
    long = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                count = node.end_lineno - body[0].lineno + 1
                if count > MAX_FUNCTION:
                    long[f"{name}: {node.name}"] = count
    assert not long
