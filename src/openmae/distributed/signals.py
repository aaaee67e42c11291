"""Ctrl-C and preemption: finish the step, write a checkpoint, then stop, in every process of the run."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self, TypeVar

from openmae.distributed.watchdog import Watchdog
from openmae.errors import Preempted, StoppedAtOnce

# sent by a machine that shuts down, and by SLURM before the time is up (Windows has no SIGUSR1)
PREEMPTION = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))

T = TypeVar("T")

log = logging.getLogger("openmae")

Stop = type[KeyboardInterrupt]  # KeyboardInterrupt itself, or Preempted


def stop_to_counts(stop: Stop | None) -> tuple[float, float]:
    """Encode a request to stop as two numbers that can be summed over processes."""
    return float(stop is not None), float(stop is Preempted)


def stop_from_counts(asked: float, preempted: float) -> Stop | None:
    """Return what all processes must stop with, from the sums of ``stop_to_counts``."""
    return (Preempted if preempted else KeyboardInterrupt) if asked else None


class _InterruptHandler(ABC):
    """Handles signals while entered, and restores the previous handlers on exit.

    Attributes:
        reason: KeyboardInterrupt after Ctrl-C, Preempted after the other signals; None before any.
    """

    signals: ClassVar[tuple[signal.Signals, ...]] = (signal.SIGINT, *PREEMPTION)

    def __init__(self) -> None:
        self.reason: Stop | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self._previous = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, _InterruptHandler) and self.reason is Preempted:
                outer.reason = Preempted  # so that a second signal does not interrupt what is left to do

    def _note(self, number: int) -> None:
        self.reason = self.reason or (Preempted if number in PREEMPTION else KeyboardInterrupt)

    @abstractmethod
    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""


class InterruptWatch(_InterruptHandler):
    """While entered, the first signal asks the loop to stop after its step; Ctrl-C after it stops at once.

    So does SIGTERM after Ctrl-C: whoever canceled the run has waited long enough. Signals that announce a preemption
    may come several times; only the SIGKILL that follows them is meant to cut the checkpoint short.
    """

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self._note(number)
            if number in PREEMPTION:
                log.warning("%s: writing a checkpoint after this step.", signal.Signals(number).name)
            else:
                log.warning("Interrupted: writing a checkpoint after this step. Press Ctrl-C again to stop at once.")
        elif number == signal.SIGINT or (number == signal.SIGTERM and self.reason is KeyboardInterrupt):
            raise StoppedAtOnce

    def until_asked(self, batches: Iterable[T], watchdog: Watchdog) -> Iterator[T]:
        """Yield batches until this process or, as ``watchdog`` knows, another one is asked to stop."""
        for batch in batches:
            watchdog.stopping = self.reason is not None
            if watchdog.stopping or watchdog.someone_stopping:
                return
            yield batch


class PreemptionWatch(_InterruptHandler):
    """While entered, a preemption ends the run at once: nothing has to be saved before and after the training loop."""

    signals: ClassVar[tuple[signal.Signals, ...]] = PREEMPTION

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:  # a second signal would interrupt the end of the run
            self._note(number)
            raise Preempted


class InterruptRelay(_InterruptHandler):
    """While entered, this process forwards signals to its child processes, which end in their own time.

    The children must call ``join_relay``, so that a terminal does not send them the same Ctrl-C a second time.
    """

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(child.pid, number)


def join_relay() -> None:
    """Leave the parent's process group: only the parent gets the terminal's Ctrl-C, and forwards it."""
    os.setpgrp()
