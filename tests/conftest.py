"""Settings for all tests, and the tier of each test."""

from __future__ import annotations

import os
import signal
import types
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# A shell starts background processes with SIGINT ignored; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The suite runs in as many processes as there are cores. Set before torch is imported, here and in started processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Folders whose tests run actions, export models, start servers or simulate searches.
_LAUNCHING_FOLDERS = {"actions", "automl", "bench", "engines", "faults", "fuzz", "nvidia", "serving", "skill"}
# Names in the code of a test, of a helper or of a fixture that start a process, a server or a training run.
_LAUNCHING_NAMES = {
    *("subprocess", "multiprocessing", "Popen", "ProcessPoolExecutor", "fork_server", "spawn"),
    *("Trainer", "train_action", "launch", "create_job", "Worker", "TrialJobs", "uvicorn"),
}
_TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that ``make check`` leaves out."""
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0]
        if folder in _LAUNCHING_FOLDERS or (isinstance(item, pytest.Function) and _launches(item)):
            item.add_marker(pytest.mark.launches)


def _launches(item: pytest.Function) -> bool:
    fixtures = (definition.func for found in item._fixtureinfo.name2fixturedefs.values() for definition in found)
    return any(_reaches_launch(function) for function in (item.function, *fixtures))


@cache
def _reaches_launch(function: Any) -> bool:
    """Return whether a function, or a helper in the tests that it calls, names something that launches."""
    seen: set[Any] = set()
    waiting = [function]
    while waiting:
        function = waiting.pop()
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        names = _names(code)
        if names & _LAUNCHING_NAMES:
            return True
        found = (function.__globals__.get(name) for name in names)
        waiting += [value for value in found if getattr(value, "__module__", "").startswith("tests")]
    return False


def _names(code: types.CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))
