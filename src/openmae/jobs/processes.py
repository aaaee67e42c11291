"""Processes by number and time of start, so that a number used again is not mistaken.

Linux's /proc has a start that no change of the clock moves, and tells one boot from another; elsewhere psutil answers.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

_PROC = Path("/proc/self")
_STATES = {psutil.STATUS_ZOMBIE: "Z", psutil.STATUS_DEAD: "X", psutil.STATUS_STOPPED: "T"}
_STATE, _GROUP, _SESSION, _START = 0, 2, 3, 19  # in /proc/PID/stat, counted behind the name
Identity = dict[str, Any]


def identify(pid: int) -> Identity | None:
    """What tells a process from every other one, past and future; None where it is dead."""
    fields = _stat(pid)
    return (
        {"pid": pid, "start": int(fields[_START]), "boot": _boot()} if fields and fields[_STATE] not in "ZX" else None
    )


def alive(identity: Mapping[str, Any] | None) -> bool:
    """Whether this very process still runs; a zombie does not."""
    return identity is not None and identify(identity["pid"]) == dict(identity)


def stopped(identity: Mapping[str, Any] | None) -> bool:
    """Whether this very process is stopped, as by SIGSTOP."""
    if identity is None or not alive(identity):
        return False
    fields = _stat(identity["pid"])
    return fields is not None and fields[_STATE] in "Tt"


def living_sessions() -> set[int]:
    """The numbers of all sessions that have a living process, in one look at them all."""
    found = set()
    for pid in psutil.pids():
        fields = _stat(pid)
        if fields and fields[_STATE] not in "ZX":
            found.add(int(fields[_SESSION]))
    return found


def session_of(identity: Mapping[str, Any]) -> list[int]:
    """The living processes of the session that a process leads or led.

    After the leader's death its number is not given to another process as long as its session has members; a process
    that was started before the leader is none of them.
    """
    if identity.get("boot") != _boot():
        return []
    leader = _stat(identity["pid"])
    if leader and int(leader[_START]) != identity.get("start"):
        return []
    found = []
    for pid in psutil.pids():
        fields = _stat(pid)
        if fields and fields[_STATE] not in "ZX" and int(fields[_SESSION]) == identity["pid"]:
            found.append(pid)
    return found


def signal_session(identity: Mapping[str, Any], number: signal.Signals) -> None:
    """Send a signal to a job: SIGINT to its first process group, as a terminal would; others to its whole session.

    Processes of a distributed run leave the group (the first one passes SIGINT on to them), but not the session.
    """
    for pid in session_of(identity):
        fields = _stat(pid)
        if fields and (number != signal.SIGINT or int(fields[_GROUP]) == identity["pid"]):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def stop_session(identity: Mapping[str, Any], grace: float) -> None:
    """SIGINT, so that a checkpoint is written; SIGTERM after ``grace`` seconds; SIGKILL at most 5 s later.

    Returns when all are dead.
    """
    for number, patience in ((signal.SIGINT, grace), (signal.SIGTERM, min(grace, 5.0)), (signal.SIGKILL, 10.0)):
        signal_session(identity, number)
        signal_session(identity, signal.SIGCONT)  # a stopped process hears nothing else
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if not session_of(identity):
                return
            time.sleep(0.05)


def _stat(pid: int) -> list[str] | None:
    if not _PROC.is_dir():
        return _stat_by_psutil(pid)
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def _stat_by_psutil(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat that are used here."""
    fields = [""] * (_START + 1)
    try:
        process = psutil.Process(pid)
        fields[_STATE] = _STATES.get(process.status(), "R")
        fields[_GROUP], fields[_SESSION] = str(os.getpgid(pid)), str(os.getsid(pid))
        fields[_START] = str(round(1e6 * process.create_time()))
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return None
    return fields


def _boot() -> str:
    if not _PROC.is_dir():
        return ""  # the time of a start tells boots apart, too
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
