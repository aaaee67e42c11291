"""Properties of this machine and of its processes, read in the same way on Linux and macOS."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import psutil

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux only
_TICKS = 100  # units of a start time per second, as in /proc/PID/stat
_TOLERANCE = 2 * _TICKS  # the kernel's time of boot may change by a second; no process id is reused that fast


class Identity(TypedDict):
    """A process, distinguished from every other one that has or will have its id.

    Attributes:
        pid: Process id.
        start: Start time in 1/100 s; since boot on Linux, where changing the clock does not move it, else since 1970.
        boot: Id of this boot; empty where the system has none.
    """

    pid: int
    start: int
    boot: str


class ProcessInfo(NamedTuple):
    """Start time and status of a process.

    Attributes:
        start: See ``Identity``.
        status: One of psutil's constants.
    """

    start: int
    status: str

    @property
    def is_alive(self) -> bool:
        """False for a process that has ended and was not waited for."""
        return self.status not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def usable_cores() -> int:
    """Return the number of cores that this process may use; on macOS, all cores of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def boot_id() -> str:
    """Return an id of this boot of the machine, or an empty string where the system has none."""
    with suppress(OSError):
        return _BOOT_ID.read_text(encoding="utf-8").strip()
    return ""


def inspect(pid: int) -> ProcessInfo | None:
    """Return start and status of a process, which may be a zombie, or None if there is no such process."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            started, status = process.create_time(), str(process.status())
    except (psutil.Error, ValueError, OverflowError):  # the last two: not a process id
        return None
    start = started - psutil.boot_time() if boot_id() else started
    return ProcessInfo(round(_TICKS * start), status)


def identify(pid: int) -> Identity | None:
    """Return the identity of a running process, or None if there is no such process. A zombie does not run."""
    found = inspect(pid)
    return {"pid": pid, "start": found.start, "boot": boot_id()} if found and found.is_alive else None


def is_running(identity: Mapping[str, Any] | None) -> bool:
    """Return whether exactly this process is still running; False for None and for an incomplete identity."""
    found = inspect(identity["pid"]) if identity else None
    return found is not None and found.is_alive and is_same(found, identity)


def is_stopped(identity: Mapping[str, Any] | None) -> bool:
    """Return whether exactly this process is stopped, for example by SIGSTOP or Ctrl-Z."""
    found = inspect(identity["pid"]) if identity else None
    stopped = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return found is not None and found.status in stopped and is_same(found, identity)


def is_same(found: ProcessInfo, identity: Mapping[str, Any] | None) -> bool:
    """Return whether a process with the id of ``identity`` is that process."""
    start = identity.get("start") if identity and identity.get("boot") == boot_id() else None
    return isinstance(start, int) and abs(start - found.start) < _TOLERANCE
