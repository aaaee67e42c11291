"""Settings for all tests, and the tier of each test."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# A shell starts background processes with SIGINT ignored; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The suite runs in as many processes as there are cores. Set before torch is imported, here and in started processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# In these folders, every test runs an action, starts processes or a server, or simulates a search.
_INTEGRATION = (
    "actions",
    "automl",
    "bench",
    "engines",
    "faults",
    "fuzz",
    "jobs/platforms",
    "nvidia",
    "serving",
    "skill",
)
_TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that ``make check`` leaves out; in other folders they carry the mark themselves."""
    for item in items:
        if item.path.relative_to(_TESTS).as_posix().startswith(tuple(f"{folder}/" for folder in _INTEGRATION)):
            item.add_marker(pytest.mark.integration)
