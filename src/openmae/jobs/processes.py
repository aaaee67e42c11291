"""Start, find and stop the processes of a job. Each job runs in its own session (``setsid``)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from openmae.machine import boot_id, inspect, is_running, is_same

_POLL = 0.05


def start_session(
    command: Sequence[str],
    log: Path,
    stdin: int = subprocess.DEVNULL,
    *,
    cwd: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in a new session, with its output appended to ``log``."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )


def living_sessions() -> set[int]:
    """Return the ids of all sessions on this machine."""
    return {session for pid in psutil.pids() if (session := _session(pid)) is not None}


def session_members(leader: Mapping[str, Any]) -> list[int]:
    """Return the ids of the living processes in the session of which ``leader`` is or was the first process.

    As long as the session has members, the system does not reuse the pid of its leader. So if a process with that pid
    has another start time, the session has ended.
    """
    found = inspect(leader["pid"])
    if leader.get("boot") != boot_id() or (found is not None and not is_same(found, leader)):
        return []
    members = [pid for pid in psutil.pids() if _session(pid) == leader["pid"]]
    return [pid for pid in members if (member := inspect(pid)) is not None and member.is_alive]


def signal_session(leader: Mapping[str, Any], number: signal.Signals) -> None:
    """Send a signal to all processes of a job; SIGINT only to its first process group, as a terminal does.

    The processes of a distributed run leave the group, but not the session; the first process forwards SIGINT to them.
    """
    for pid in session_members(leader):
        with suppress(ProcessLookupError):
            if number != signal.SIGINT or os.getpgid(pid) == leader["pid"]:
                os.kill(pid, number)


def stop_session(leader: Mapping[str, Any], grace: float) -> None:
    """Stop a job: send SIGINT, then SIGTERM, then SIGKILL, until its first process has ended; kill all others.

    ``grace`` is the time in seconds after SIGINT, in which training writes a checkpoint; SIGKILL follows within 5 s.
    """
    for number, patience in ((signal.SIGINT, grace), (signal.SIGTERM, min(grace, 5.0)), (signal.SIGKILL, 10.0)):
        signal_session(leader, number)
        signal_session(leader, signal.SIGCONT)  # a stopped process does not handle signals
        deadline = time.monotonic() + patience
        while is_running(leader) and time.monotonic() < deadline:
            time.sleep(_POLL)
        if not is_running(leader):
            break
    signal_session(leader, signal.SIGKILL)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:  # it has ended, or belongs to another user
        return None
