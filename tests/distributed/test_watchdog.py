"""A process that keeps the others waiting is named, wherever it hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from torch.distributed import DistStoreError, HashStore, Store

from openmae.distributed import rendezvous, watchdog
from openmae.distributed.topology import World
from openmae.distributed.watchdog import Watchdog
from openmae.errors import RunError, SpecError

pytestmark = pytest.mark.integration

LIMIT = 1.0
Start = Callable[..., "Process"]


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMAE_ANSWER_SECONDS", str(LIMIT))


class Process:
    """A process on a node of its own, with the errors that its watchdog has reported."""

    def __init__(self, rank: int, store: Store, size: int) -> None:
        self.watchdog = Watchdog(World(nodes=size, node_rank=rank, local_rank=0))
        self.errors: list[RunError] = []
        self.watchdog.report = self.errors.append
        self.watchdog.start(lambda: store)

    @property
    def problem(self) -> str:
        wait_until(lambda: self.errors, "no process was named")
        return self.errors[0].problem


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """``start(rank, store)``: a process on a node of its own."""
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: None)
    started = []

    def run(rank: int, store: Store, size: int = 2) -> Process:
        started.append(Process(rank, store, size))
        return started[-1]

    yield run
    for process in started:
        process.watchdog.end()


def wait_until(ready: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20 * LIMIT
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_a_process_that_stays_behind_is_named_by_all(start: Start) -> None:
    store = HashStore()
    ahead, behind = start(0, store), start(1, store)
    ahead.watchdog.arrive()
    assert ahead.problem == "Process 1 (node 1) has not responded for 1 s."
    assert behind.problem == ahead.problem
    assert "resumes from the newest checkpoint" in ahead.errors[0].fix
    assert "OPENMAE_ANSWER_SECONDS" in ahead.errors[0].fix


def test_a_process_that_is_stopped_between_two_points_is_named(start: Start) -> None:
    store = HashStore()
    waiting, stopped = start(0, store), start(1, store)
    wait_until(lambda: store.check(["openmae/watchdog/0/1"]), "process 1 published nothing")
    stopped.watchdog.end()
    assert waiting.problem == "Process 1 (node 1) has not responded for 1 s."


def test_no_thread_is_left_at_the_end(start: Start) -> None:
    """A thread in a call of the store would abort the process when the interpreter exits."""
    process = start(0, HashStore())
    process.watchdog.end()
    assert "openmae-watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_process_that_waits_for_the_slow_one_is_not_named(start: Start) -> None:
    """A broadcast lets its source go on while the other receivers wait."""
    store = HashStore()
    source, waiting, _ = (start(rank, store, size=3) for rank in range(3))
    for _ in range(2):
        source.watchdog.arrive()
    waiting.watchdog.arrive()
    assert source.problem == "Process 2 (node 2) has not responded for 1 s."


def test_all_know_that_one_is_asked_to_stop(start: Start) -> None:
    store = HashStore()
    one, other = start(0, store), start(1, store)
    assert not other.watchdog.someone_stopping
    one.watchdog.stopping = True
    wait_until(lambda: one.watchdog.someone_stopping and other.watchdog.someone_stopping, "it was not published")


def test_a_message_names_few_of_many(start: Start) -> None:
    """Eight of nine publish nothing from the start."""
    own, published = start(0, HashStore(), size=9), "1 (node 1), 2 (node 2), 3 (node 3), 4 (node 4)"
    assert own.problem == f"Processes {published} and 4 more have not responded for 1 s."


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
        assert waiting.problem == "Process 0 (node 0) has not responded for 1 s."
    finally:
        store.ended.set()


def test_a_store_that_is_gone_is_process_0(start: Start) -> None:
    class Gone(HashStore):
        def set(self, key: str, value: str) -> None:
            raise DistStoreError("Connection reset by peer")

    assert start(1, Gone()).problem == "Process 0 (node 0) has not responded for 1 s."


def test_none_is_named_while_all_wait_at_one_point_or_go_on(start: Start) -> None:
    """A long validation and a slow step are no faults."""
    store = HashStore()
    one, other = start(0, store), start(1, store)
    time.sleep(2.5 * LIMIT)
    assert one.errors == other.errors == []
    end = time.monotonic() + 2.5 * LIMIT
    while time.monotonic() < end:
        one.watchdog.arrive()
        time.sleep(LIMIT / 4)
        other.watchdog.arrive()
    assert one.errors == other.errors == []


def test_a_process_that_waits_too_long_reports_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, seen = threading.Event(), []

    class Status:
        @staticmethod
        def write(*arguments: object, **more: object) -> None:
            seen.append(arguments)

    monkeypatch.setattr(watchdog.os, "_exit", lambda code: seen.append(code) or ended.set())
    own = Watchdog(World(nodes=2))
    own.status = Status()  # type: ignore[assignment]
    own.start(HashStore)
    assert ended.wait(20 * LIMIT), "it was not ended"
    (status, text), code = seen
    assert (status, code) == ("FAILURE", 1)
    assert text.startswith("RunError: Process 1 (node 1) has not responded for 1 s.\n  Fix: Look for what blocks it")
    assert f"RunError: {capsys.readouterr().err}" == f"{text}\n"


def test_the_timeout_of_the_process_group_follows() -> None:
    for strategy in (rendezvous.ReplicatedStrategy(), rendezvous.ShardedStrategy(World(per_node=2))):
        assert strategy._timeout == timedelta(seconds=LIMIT + 60), "the watchdog must come first"


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_the_limit_is_a_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMAE_ANSWER_SECONDS", text)
    with pytest.raises(SpecError, match=f"OPENMAE_ANSWER_SECONDS must be a number of seconds above 0, got '{text}'"):
        rendezvous.ReplicatedStrategy()
