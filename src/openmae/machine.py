"""Facts about this machine and its processes that operating systems report in different ways."""

from __future__ import annotations

import os

import psutil

_JITTER = 2.0  # seconds: Linux computes the time of its boot from the clock, in whole seconds


def usable_cores() -> int:
    """Return the number of cores that this process may use (on macOS: that the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_start(pid: int) -> float | None:
    """Return when a living process started, in seconds since the boot (macOS: since 1970); None if it has ended.

    Together with the pid this identifies a process until the next boot, even if the clock is changed meanwhile.
    """
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return process.create_time() - (psutil.boot_time() if psutil.LINUX else 0.0)
    except psutil.NoSuchProcess:
        return None


def is_running(pid: int, start: float) -> bool:
    """Return whether the process with this pid and this ``process_start`` still runs; pids are used again."""
    found = process_start(pid)
    return found is not None and abs(found - start) < _JITTER
