"""Properties of this machine and of its processes, read in the same way on Linux and macOS."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

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


def usable_cores() -> int:
    """Return the number of cores that this process may use; on macOS, all cores of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def boot_id() -> str:
    """Return an id of this boot of the machine, or an empty string where the system has none."""
    with suppress(OSError):
        return _BOOT_ID.read_text(encoding="utf-8").strip()
    return ""


def identify(pid: int) -> Identity | None:
    """Return the identity of a running process, or None if there is no such process. A zombie does not run."""
    start = start_of(pid)
    if start is None or status_of(pid) in ("", psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return None
    return {"pid": pid, "start": start, "boot": boot_id()}


def is_running(identity: Mapping[str, Any] | None) -> bool:
    """Return whether exactly this process is still running; False for None and for an incomplete identity."""
    if identity is None:
        return False
    found = identify(identity["pid"])
    return found is not None and found["boot"] == identity.get("boot") and same_start(found["start"], identity)


def is_stopped(identity: Mapping[str, Any] | None) -> bool:
    """Return whether exactly this process is stopped, for example by SIGSTOP or Ctrl-Z."""
    if identity is None or not is_running(identity):
        return False
    return status_of(identity["pid"]) in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def start_of(pid: int) -> int | None:
    """Return when a process started (see ``Identity``), or None if there is none; a zombie has a start, too."""
    try:
        started = psutil.Process(pid).create_time()
    except (psutil.Error, OSError, ValueError, OverflowError):  # the last two: no valid process id
        return None
    return round(_TICKS * (started - psutil.boot_time() if boot_id() else started))


def same_start(start: int, identity: Mapping[str, Any]) -> bool:
    """Return whether a start time is that of ``identity``."""
    claimed = identity.get("start")
    return isinstance(claimed, int) and abs(claimed - start) < _TOLERANCE


def status_of(pid: int) -> str:
    """Return psutil's word for the status of a process; empty if there is no such process."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return ""
