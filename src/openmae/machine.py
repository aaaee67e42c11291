"""Properties of this machine and its processes, with one interface for Linux and macOS."""

from __future__ import annotations

import functools
import os
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import psutil

_STATUS = Path("/proc/self/status")  # Linux only
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux only
_TICKS = 100  # units of a start time per second, as in /proc/PID/stat
_TOLERANCE = 2 * _TICKS  # the kernel's boot time may vary by a second; no process id is reused that fast


class Identity(TypedDict):
    """A process, distinguished from all earlier and later processes with the same id.

    Attributes:
        pid: process id.
        start: start time in 1/100 s, since boot on Linux (changing the clock has no effect), elsewhere since 1970.
        boot: id of this boot; empty if the system has none.
    """

    pid: int
    start: int
    boot: str


class ProcessInfo(NamedTuple):
    """Start time of a process (as in ``Identity``), and its status: one of psutil's constants."""

    start: int
    status: str

    @property
    def is_alive(self) -> bool:
        """False for a zombie: a process that has ended but was not waited for."""
        return self.status not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def usable_cores() -> int:
    """Return the number of cores that this process may use; on macOS, all cores of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """Return the most memory that this process has used, plus the memory that its children use now, in bytes.

    Memory that children share with this process is counted once.
    """
    total = _own_peak()
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                total += child.memory_full_info().uss
    return total


def _own_peak() -> int:
    """Return the largest resident set of this process. On Linux, ``ru_maxrss`` may be that of its parent."""
    with suppress(OSError):
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@functools.cache
def boot_id() -> str:
    """Return an id of this boot of the machine; empty if the system has none."""
    with suppress(OSError):
        return _BOOT_ID.read_text(encoding="utf-8").strip()
    return ""


def inspect(pid: int) -> ProcessInfo | None:
    """Return start time and status of a process, which may be a zombie; None if there is no such process."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            started, status = process.create_time(), str(process.status())
    except (psutil.Error, ValueError, OverflowError):  # the last two: not a process id
        return None
    start = started - psutil.boot_time() if boot_id() else started
    return ProcessInfo(round(_TICKS * start), status)


def identify(pid: int) -> Identity | None:
    """Return the identity of a running process; None if it does not exist or is a zombie."""
    found = inspect(pid)
    return {"pid": pid, "start": found.start, "boot": boot_id()} if found and found.is_alive else None


def is_running(identity: Mapping[str, Any] | None) -> bool:
    """Return whether this very process is still running; False for None and for an incomplete identity."""
    found = inspect(identity["pid"]) if identity else None
    return found is not None and found.is_alive and is_same(found, identity)


def is_stopped(identity: Mapping[str, Any] | None) -> bool:
    """Return whether this very process is stopped, for example by SIGSTOP or Ctrl-Z."""
    found = inspect(identity["pid"]) if identity else None
    stopped = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return found is not None and found.status in stopped and is_same(found, identity)


def is_same(found: ProcessInfo, identity: Mapping[str, Any] | None) -> bool:
    """Return whether a process found under the id of ``identity`` is that process, not a later one with the same id."""
    start = identity.get("start") if identity and identity.get("boot") == boot_id() else None
    return isinstance(start, int) and abs(start - found.start) < _TOLERANCE
