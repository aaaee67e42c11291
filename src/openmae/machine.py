"""Facts about the machine that operating systems report in different ways."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return the number of cores that this process may use (on macOS: that the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
