"""Processes and their sessions, as on Linux and as on a system without an id of the boot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.helpers.platform_contract import until

from openmae import machine
from openmae.jobs.processes import living_sessions, session_members, signal_session, stop_session
from openmae.machine import identify, is_running, is_stopped


@pytest.fixture(params=["with a boot id", "without"])
def child(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """Start a shell that leads a session with another process in it."""
    if request.param == "without":
        monkeypatch.setattr(machine, "_BOOT_ID", Path("/no/boot_id"))
        machine.boot_id.cache_clear()
    process = subprocess.Popen(["/bin/sh", "-c", "sleep 60 & wait"], start_new_session=True)
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    machine.boot_id.cache_clear()


@pytest.mark.integration
def test_a_process_is_distinguished_from_others_of_its_id(child: subprocess.Popen[bytes]) -> None:
    identity = identify(child.pid)
    assert identity is not None
    assert is_running(identity)
    assert not is_running({**identity, "start": identity["start"] - 1000})
    assert not is_running({**identity, "boot": "another"})
    assert not is_running({"pid": child.pid})
    assert not is_running({"pid": -1})
    assert not is_running({"pid": 1 << 80})
    assert not is_running(None)
    assert session_members({**identity, "start": identity["start"] - 1000}) == []
    assert session_members({**identity, "boot": "another"}) == []


@pytest.mark.integration
def test_a_session_is_stopped(child: subprocess.Popen[bytes]) -> None:
    identity = identify(child.pid)
    assert identity is not None
    until(lambda: len(session_members(identity)) == 2, "the start of the second process")
    assert child.pid in living_sessions()
    signal_session(identity, signal.SIGSTOP)
    until(lambda: is_stopped(identity), "the stop of the shell")
    stop_session(identity, grace=0.1)
    assert not is_running(identity), "a zombie does not run"
    until(lambda: session_members(identity) == [], "the end of the second process")
    child.wait()
    assert identify(child.pid) is None
    assert not is_stopped(identity)


def test_a_clock_that_is_changed_does_not_end_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux derives the time of boot from the clock, and psutil derives start times from that."""
    me = identify(os.getpid())
    changed = psutil.boot_time() + 7200.0
    monkeypatch.setattr("psutil._psplatform.boot_time", lambda: changed)
    assert psutil.boot_time() == changed
    assert is_running(me)


def test_the_peak_memory_of_a_process_and_its_children():
    code = """
import subprocess, sys
from openmae.machine import peak_memory
empty = peak_memory()
block = bytearray(b"x") * 200_000_000
del block
alone = peak_memory()
child = subprocess.Popen([sys.executable, "-c", "b = bytearray(b'x') * 100_000_000; print(flush=True); input()"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(empty, alone, peak_memory())
child.communicate(b"")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    empty, alone, with_child = map(int, done.stdout.split())
    assert alone - empty > 150e6, "memory that was freed is not counted"
    assert 100e6 < with_child - alone < 180e6, "the child is not counted"
