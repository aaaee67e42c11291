"""Signs of life: which process of a run stays behind while the others wait for it."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.queues import SimpleQueue
from typing import NamedTuple

import torch
from lightning_fabric import Fabric
from torch.distributed import Store  # type: ignore[attr-defined]

from openmae.errors import RunError, SpecError
from openmae.results.status import StatusLog

ANSWER_VARIABLE = "OPENMAE_ANSWER_SECONDS"
_ANSWER = 1800.0
_SHOWN = 4  # processes that a message names


def seconds_of(variable: str, default: float) -> float:
    """What a variable of the environment says.

    Raises:
        SpecError: it is no number above 0.
    """
    text = os.environ.get(variable, "") or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise SpecError(f"{variable} must be a number of seconds above 0, got {text!r}.", "Correct it.")
    return seconds


def answer_seconds() -> float:
    """How long one process may keep the others waiting."""
    return seconds_of(ANSWER_VARIABLE, _ANSWER)


class Sign(NamedTuple):
    """What a process tells of itself.

    Attributes:
        beats: signs so far; it grows as long as the process lives.
        passed: places passed at which processes wait for one another; each passes the same ones, in the same order.
        step: updates of the weights.
        at: its clock, for people.
    """

    node: int
    pid: int
    beats: int
    passed: int
    step: int
    at: str


class _Heard(NamedTuple):
    """Another process's newest sign, when it was seen to be a new one, and since when it is where it is."""

    sign: Sign
    lived: float
    arrived: float


class Pulse:
    """Tells the other processes where this one is, and ends it when one of them keeps it waiting too long.

    A thread talks to the store; another one judges, as the store is a process of node 0, and may be the one that hangs.
    The loop only counts. An idle one (``begin`` was not called) is what a single process has.

    Args:
        node: number of this machine.
        rank: of this process.
        size: processes of the run.

    Attributes:
        step: updates of the weights.
        leaves: this process was asked to end.
        someone_leaves: some process was; known within a second.
        verdict: what the run ends with, once a process has been found to hang.
        channel: to the parent, for a verdict that the main thread does not raise; None: there is no such parent.
        status: where such a verdict is told if there is no parent.
    """

    def __init__(self, node: int = 0, rank: int = 0, size: int = 1) -> None:
        self.step = 0
        self.leaves = self.someone_leaves = False
        self.verdict: RunError | None = None
        self.channel: SimpleQueue[tuple[str, str]] | None = None
        self.status: StatusLog | None = None
        self._node, self._rank, self._size = node, rank, size
        self._passed = self._beats = 0
        self._limit = _ANSWER
        self._beat = 1.0
        self._since = self._talked = self._listened = time.monotonic()
        self._heard: dict[int, _Heard] = {}
        self._decided, self._ended = threading.Event(), threading.Event()

    def passes(self) -> None:
        """This process has come to a place where it may wait for others."""
        self._passed += 1

    def begin(self, open_store: Callable[[], Store], grace: float) -> None:
        """Start to tell and to judge.

        Args:
            open_store: a client of its own: another one's call would block it.
            grace: seconds that the main thread has to raise a verdict, before the process is ended under it.

        Raises:
            SpecError: the variable with the time is wrong.
        """
        self._limit = answer_seconds()
        self._beat = min(1.0, self._limit / 20)
        self._since = self._talked = time.monotonic()
        threading.Thread(target=self._talk, args=(open_store,), name="openmae-pulse", daemon=True).start()
        threading.Thread(target=self._judge, args=(grace,), name="openmae-judge", daemon=True).start()

    def end(self) -> None:
        """The others are needed no more."""
        self._ended.set()

    def reason(self, *, wait: bool) -> RunError | None:
        """The verdict, if there is one.

        Args:
            wait: something has failed that a process which hangs would explain, and the judge may need a moment more.
        """
        if wait and not self._ended.is_set():
            self._decided.wait(3 * self._beat + 2)
        return self.verdict

    def _talk(self, open_store: Callable[[], Store]) -> None:
        with suppress(torch.distributed.DistError):  # node 0 is gone: the judge counts how long
            store = open_store()
            while True:
                self._beats += 1
                now = time.strftime("%H:%M:%S UTC", time.gmtime())
                sign = Sign(self._node, os.getpid(), self._beats, self._passed, self.step, now)
                store.set(_key(self._rank), json.dumps(sign))
                if self.leaves:
                    store.set(_key("leaves"), "")
                self.someone_leaves = self.leaves or store.check([_key("leaves")])
                self._listen(store, range(self._size) if self._must_know_all() else (0,))
                self._talked = time.monotonic()
                if self._ended.wait(self._beat):
                    return

    def _must_know_all(self) -> bool:
        """Rarely, and only while this process waits: they may be many."""
        now = time.monotonic()
        waited, ago = now - self._since, now - self._listened
        due = waited > self._limit / 2 and (ago > self._limit / 8 or waited > self._limit - 3 * self._beat)
        if due:
            self._listened = now
        return due

    def _listen(self, store: Store, ranks: Iterable[int]) -> None:
        for rank in ranks:
            if store.check([_key(rank)]):
                sign = Sign(*json.loads(store.get(_key(rank))))
                now, before = time.monotonic(), self._heard.get(rank)
                lived = before.lived if before and before.sign.beats == sign.beats else now
                arrived = before.arrived if before and before.sign.passed == sign.passed else now
                self._heard[rank] = _Heard(sign, lived, arrived)

    def _judge(self, grace: float) -> None:
        passed = self._passed
        while not self._ended.wait(self._beat):
            if self._passed != passed:
                passed, self._since = self._passed, time.monotonic()
            elif time.monotonic() - self._since >= self._limit and (behind := self._behind()):
                self.verdict = RunError(
                    " ".join(behind[:_SHOWN])
                    + (f" So have {len(behind) - _SHOWN} more." if len(behind) > _SHOWN else ""),
                    "See what keeps it: a process that was stopped, a disk or a store that does not answer, a GPU, the "
                    f"network. The same command goes on from the newest checkpoint. {ANSWER_VARIABLE} is how long one "
                    "may keep the others waiting.",
                )
                self._decided.set()
                if not self._ended.wait(grace):
                    self._leave(self.verdict)
                return

    def _behind(self) -> list[str]:
        """Who is silent, or not yet where others have waited too long, in words; this process too."""
        now, patience = time.monotonic(), self._limit / 4
        if now - self._talked > patience:
            return [self._told(0, silent=True)]
        heard = {rank: heard for rank, heard in self._heard.items() if rank != self._rank}
        places = {rank: each.sign.passed for rank, each in heard.items()} | {self._rank: self._passed}
        foremost = max(places.values())
        if foremost > self._passed:
            arrived = min(each.arrived for each in heard.values() if each.sign.passed == foremost)
            if now - arrived < self._limit:
                return []
        silent = {rank for rank, each in heard.items() if now - each.lived > patience}
        silent |= set(range(self._size)) - set(places)
        late = {rank for rank, passed in places.items() if passed < foremost}
        return [self._told(rank, silent=rank in silent) for rank in sorted(silent | late)]

    def _told(self, rank: int, *, silent: bool) -> str:
        text = f"has not answered for {self._limit:g} s"
        if rank not in self._heard:
            return f"Process {rank} {text}: it was never heard of."
        sign = self._heard[rank].sign
        how = (
            f"last heard of at {sign.at}, at step {sign.step}" if silent else f"it lives, but stays at step {sign.step}"
        )
        return f"Process {rank} (node {sign.node}, process id {sign.pid}) {text}: {how}."

    def _leave(self, error: RunError) -> None:
        """End this process: its main thread is where no exception reaches it."""
        if self.channel is not None:
            self.channel.put((error.problem, error.fix))
        else:
            if self.status is not None:
                with suppress(OSError):
                    self.status.write("FAILURE", f"RunError: {error}", verbosity="ERROR")
            print(error, file=sys.stderr, flush=True)
        os._exit(error.exit_code)


def pulse_of(fabric: Fabric) -> Pulse:
    """This process's; an idle one where it is alone."""
    return getattr(fabric.strategy, "pulse", None) or Pulse()


def _key(name: int | str) -> str:
    """Of a process's number, or of what all of them share."""
    return f"openmae/pulse/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
