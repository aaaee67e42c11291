"""A process that keeps the others waiting is named, wherever it hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
from torch.distributed import DistStoreError, HashStore, Store

from openmae.distributed import rendezvous, watchdog
from openmae.distributed.topology import World
from openmae.distributed.watchdog import Watchdog
from openmae.errors import RunError, SpecError

LIMIT = 1.0
Start = Callable[..., Watchdog]


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMAE_ANSWER_SECONDS", str(LIMIT))


@pytest.fixture
def start() -> Iterator[Start]:
    """``start(rank, store)``: the watchdog of a process on a node of its own."""
    started = []

    def run(rank: int, store: Store, size: int = 2, grace: float = 60.0) -> Watchdog:
        own = Watchdog(World(nodes=size, node_rank=rank, local_rank=0))
        own.start(lambda: store, grace)
        started.append(own)
        return own

    yield run
    for own in started:
        own.end()


def wait_until(ready: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20 * LIMIT
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def problem_of(own: Watchdog) -> str:
    wait_until(lambda: own.error, "no process was named")
    assert own.error is not None
    return own.error.problem


def test_a_process_that_stays_behind_is_named_by_all(start: Start) -> None:
    store = HashStore()
    ahead, behind = start(0, store), start(1, store)
    ahead.arrive()
    assert problem_of(ahead) == "Process 1 (node 1) has not responded for 1 s."
    assert problem_of(behind) == problem_of(ahead)
    assert ahead.error is not None
    assert "resumes from the newest checkpoint" in ahead.error.fix
    assert "OPENMAE_ANSWER_SECONDS" in ahead.error.fix


def test_a_process_that_is_stopped_between_two_points_is_named(start: Start) -> None:
    store = HashStore()
    waiting, stopped = start(0, store), start(1, store)
    wait_until(lambda: store.check(["openmae/watchdog/0/1"]), "process 1 published nothing")
    stopped.end()
    assert problem_of(waiting) == "Process 1 (node 1) has not responded for 1 s."


def test_a_process_that_waits_for_the_slow_one_is_not_named(start: Start) -> None:
    """A broadcast lets its source go on while the other receivers wait."""
    store = HashStore()
    source, waiting, _ = (start(rank, store, size=3) for rank in range(3))
    for _ in range(2):
        source.arrive()
    waiting.arrive()
    assert problem_of(source) == "Process 2 (node 2) has not responded for 1 s."


def test_all_know_that_one_is_asked_to_stop(start: Start) -> None:
    store = HashStore()
    one, other = start(0, store), start(1, store)
    assert not other.someone_stopping
    one.stopping = True
    wait_until(lambda: one.someone_stopping and other.someone_stopping, "it was not published")


def test_a_message_names_few_of_many(start: Start) -> None:
    """Eight of nine publish nothing from the start."""
    own, published = start(0, HashStore(), size=9), "1 (node 1), 2 (node 2), 3 (node 3), 4 (node 4)"
    assert problem_of(own) == f"Processes {published} and 4 more have not responded for 1 s."


class HangingStore(HashStore):
    """A store whose process is stopped: no call returns."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped, self.ended = threading.Event(), threading.Event()

    def set(self, key: str, value: str) -> None:
        if self.stopped.is_set():
            self.ended.wait()
        super().set(key, value)


def test_a_store_that_hangs_is_process_0(start: Start) -> None:
    store = HangingStore()
    start(0, store)
    waiting = start(1, store)
    store.stopped.set()
    try:
        assert problem_of(waiting) == "Process 0 (node 0) has not responded for 1 s."
    finally:
        store.ended.set()


def test_a_store_that_is_gone_is_process_0(start: Start) -> None:
    class Gone(HashStore):
        def set(self, key: str, value: str) -> None:
            raise DistStoreError("Connection reset by peer")

    assert problem_of(start(1, Gone())) == "Process 0 (node 0) has not responded for 1 s."


def test_none_is_named_while_all_wait_at_one_point_or_go_on(start: Start) -> None:
    """A long validation and a slow step are no faults."""
    store = HashStore()
    one, other = start(0, store), start(1, store)
    time.sleep(2.5 * LIMIT)
    assert one.error is other.error is None
    end = time.monotonic() + 2.5 * LIMIT
    while time.monotonic() < end:
        one.arrive()
        time.sleep(LIMIT / 4)
        other.arrive()
    assert one.error is other.error is None


def test_a_process_whose_main_thread_cannot_raise_is_ended(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, seen = threading.Event(), []

    class Status:
        @staticmethod
        def write(*arguments: object, **more: object) -> None:
            seen.append(arguments)

    monkeypatch.setattr(watchdog.os, "_exit", lambda code: seen.append(code) or ended.set())
    own = start(0, HashStore(), grace=0.1)
    own.status = Status()  # type: ignore[assignment]
    assert ended.wait(20 * LIMIT), "it was not ended"
    assert seen == [("FAILURE", f"RunError: {own.error}"), 1]
    assert capsys.readouterr().err == f"{own.error}\n"
    reported: list[RunError] = []
    ended.clear()
    own = start(0, HashStore(), grace=0.1)
    own.report = reported.append
    assert ended.wait(20 * LIMIT), "it was not ended"
    assert reported == [own.error]


def test_the_timeout_of_the_process_group_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rendezvous.ReplicatedStrategy()._timeout == timedelta(seconds=LIMIT)
    assert rendezvous.ShardedStrategy(World(per_node=2))._timeout == timedelta(seconds=LIMIT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert rendezvous.ReplicatedStrategy()._timeout > timedelta(seconds=LIMIT), "NCCL would end it before the watchdog"


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_the_limit_is_a_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMAE_ANSWER_SECONDS", text)
    with pytest.raises(SpecError, match=f"OPENMAE_ANSWER_SECONDS must be a number of seconds above 0, got '{text}'"):
        rendezvous.ReplicatedStrategy()
