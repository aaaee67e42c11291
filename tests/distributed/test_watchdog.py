"""A process that keeps the others waiting is named, wherever it hangs."""

from __future__ import annotations

import re
import threading
import time
from datetime import timedelta

import pytest
import torch
from torch.distributed import DistStoreError, HashStore

from openmae.distributed import rendezvous, watchdog
from openmae.distributed.topology import World
from openmae.distributed.watchdog import Pulse
from openmae.errors import SpecError

LIMIT = 1.0


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    monkeypatch.setenv("OPENMAE_ANSWER_SECONDS", str(LIMIT))


@pytest.fixture
def begin():
    """``begin(rank, store)``: the pulse of a process on a node of its own, which nothing ends."""
    begun = []

    def start(rank, store, size=2, grace=60.0):
        own = Pulse(rank, rank, size)
        own.begin(lambda: store, grace)
        begun.append(own)
        return own

    yield start
    for own in begun:
        own.end()


def _verdict(own: Pulse) -> str:
    assert own._decided.wait(20 * LIMIT), "nobody was named"
    assert own.verdict is not None
    return own.verdict.problem


def test_one_that_lives_but_stays_behind_is_named(begin):
    store = HashStore()
    ahead, behind = begin(0, store), begin(1, store)
    for own in (ahead, behind):
        own.step = 7
    ahead.passes()
    told = r"Process 1 \(node 1, process id \d+\) has not answered for 1 s: it lives, but stays at step 7\.$"
    assert re.match(told, _verdict(ahead)), ahead.verdict
    assert _verdict(behind) == _verdict(ahead), "the one that hangs blames another one"
    assert "goes on from the newest checkpoint" in ahead.verdict.fix
    assert "OPENMAE_ANSWER_SECONDS" in ahead.verdict.fix


def test_one_that_is_stopped_is_named_with_when_and_where(begin):
    store = HashStore()
    waiting, stopped = begin(0, store), begin(1, store)
    stopped.step = 3
    deadline = time.monotonic() + 20
    while not store.check([watchdog._key(1)]) or b", 3, " not in store.get(watchdog._key(1)):
        assert time.monotonic() < deadline, "it told nothing"
        time.sleep(0.01)
    stopped.end()
    assert "Process 1 (node 1, process id " in _verdict(waiting)
    assert ": last heard of at " in _verdict(waiting)
    assert _verdict(waiting).endswith(" UTC, at step 3.")


def test_who_is_asked_to_leave_is_heard_by_all(begin):
    store = HashStore()
    one, other = begin(0, store), begin(1, store)
    assert not other.someone_leaves
    one.leaves = True
    deadline = time.monotonic() + 20
    while not (one.someone_leaves and other.someone_leaves):
        assert time.monotonic() < deadline, "nobody heard"
        time.sleep(0.01)


def test_one_that_never_told_anything_is_named(begin):
    assert _verdict(begin(0, HashStore())) == "Process 1 has not answered for 1 s: it was never heard of."


def test_many_are_not_all_listed(begin):
    told = _verdict(begin(0, HashStore(), size=9))
    assert "Process 4 " in told
    assert "Process 5 " not in told
    assert told.endswith(" So have 4 more.")


class _Mute(HashStore):
    """Its process is stopped: it takes what it is told, and answers nothing more."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = threading.Event()
        self.ended = threading.Event()

    def check(self, keys):
        if self.stopped.is_set():
            self.ended.wait()
        return super().check(keys)


def test_a_store_that_answers_no_more_is_process_0(begin):
    store = _Mute()
    begin(0, store)
    waiting = begin(1, store)
    deadline = time.monotonic() + 20
    while 0 not in waiting._heard:
        assert time.monotonic() < deadline, "it was never heard of"
        time.sleep(0.01)
    store.stopped.set()
    try:
        assert "Process 0 (node 0, process id " in _verdict(waiting)
        assert "last heard of at" in _verdict(waiting)
    finally:
        store.ended.set()


def test_a_store_that_is_gone_is_process_0(begin):
    class Gone(HashStore):
        def set(self, key, value):
            raise DistStoreError("Connection reset by peer")

    assert "Process 0 has not answered" in _verdict(begin(1, Gone()))


def test_none_is_named_while_all_are_at_one_place_or_go_on(begin):
    """A long validation, and a step that takes its time, are no faults."""
    store = HashStore()
    one, other = begin(0, store), begin(1, store)
    end = time.monotonic() + 2.5 * LIMIT
    while time.monotonic() < end:
        time.sleep(0.01)
    assert one.verdict is other.verdict is None, "they were at the same place"
    end = time.monotonic() + 2.5 * LIMIT
    while time.monotonic() < end:
        one.passes()
        time.sleep(LIMIT / 4)
        other.passes()
    assert one.verdict is other.verdict is None, "they went on"


@pytest.mark.parametrize("parent", [True, False])
def test_a_main_thread_that_no_error_reaches_is_ended(begin, parent, monkeypatch, capsys):
    left, told = threading.Event(), []

    class Channel:
        put = staticmethod(told.append)

    class Status:
        @staticmethod
        def write(*arguments, **more):
            told.append(arguments)

    monkeypatch.setattr(watchdog.os, "_exit", lambda code: told.append(code) or left.set())
    own = begin(0, HashStore(), grace=0.1)
    own.channel, own.status = Channel() if parent else None, Status()
    assert left.wait(20 * LIMIT), "it was not ended"
    error = own.verdict
    assert told == [(error.problem, error.fix) if parent else ("FAILURE", f"RunError: {error}"), 1]
    assert capsys.readouterr().err == ("" if parent else f"{error}\n")


def test_the_processes_own_timeout_follows(monkeypatch):
    assert rendezvous.ReplicatedStrategy()._timeout == timedelta(seconds=LIMIT)
    assert rendezvous.ShardedStrategy(World(per_node=2))._timeout == timedelta(seconds=LIMIT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert rendezvous.ReplicatedStrategy()._timeout > timedelta(seconds=LIMIT), "NCCL ends it before anybody is named"


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_the_time_is_a_number_of_seconds(text, monkeypatch):
    monkeypatch.setenv("OPENMAE_ANSWER_SECONDS", text)
    with pytest.raises(SpecError, match="OPENMAE_ANSWER_SECONDS must be a number of seconds above 0"):
        rendezvous.ReplicatedStrategy()
