"""Handle Ctrl-C and preemption: all processes finish the step, write a checkpoint and stop."""

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

# sent when a machine shuts down, and by SLURM shortly before the time limit (Windows has no SIGUSR1)
PREEMPTION = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))

T = TypeVar("T")

log = logging.getLogger("openmae")

Stop = type[KeyboardInterrupt]  # KeyboardInterrupt or Preempted


def stop_to_counts(stop: Stop | None) -> tuple[float, float]:
    """Encode a stop request as two numbers that can be summed over processes."""
    return float(stop is not None), float(stop is Preempted)


def stop_from_counts(asked: float, preempted: float) -> Stop | None:
    """Return the exception to stop all processes with, from the sums of ``stop_to_counts``, or None."""
    return (Preempted if preempted else KeyboardInterrupt) if asked else None


class _InterruptHandler(ABC):
    """Handles signals while entered, and restores the previous handlers on exit.

    Attributes:
        reason: KeyboardInterrupt after Ctrl-C, Preempted after another signal, None before any signal.
    """

    signals: ClassVar[tuple[signal.Signals, ...]] = (signal.SIGINT, *PREEMPTION)

    def __init__(self) -> None:
        self.reason: Stop | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # other threads cannot set signal handlers
            self._previous = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, _InterruptHandler) and self.reason is Preempted:
                outer.reason = Preempted  # so that the outer handler ignores a second signal

    def _note(self, number: int) -> None:
        self.reason = self.reason or (Preempted if number in PREEMPTION else KeyboardInterrupt)

    @abstractmethod
    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""


class InterruptWatch(_InterruptHandler):
    """While entered, the first signal makes the training loop stop after its step; a later Ctrl-C stops at once.

    SIGTERM after Ctrl-C also stops at once, since a canceled job gets SIGTERM when its grace period is over. Repeated
    preemption signals have no effect, so that the checkpoint can be completed.
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
        """Yield batches until this process or (according to ``watchdog``) another one is asked to stop."""
        for batch in batches:
            watchdog.stopping = self.reason is not None
            if watchdog.stopping or watchdog.someone_stopping:
                return
            yield batch


class PreemptionWatch(_InterruptHandler):
    """While entered, a preemption stops the run at once; for use outside the training loop, with nothing to save."""

    signals: ClassVar[tuple[signal.Signals, ...]] = PREEMPTION

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:  # a second signal must not interrupt the cleanup
            self._note(number)
            raise Preempted


class InterruptRelay(_InterruptHandler):
    """While entered, this process forwards signals to its child processes, and does not stop itself.

    The children must call ``join_relay``, so that the terminal does not also send them Ctrl-C directly.
    """

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(child.pid, number)


class InterruptNote(_InterruptHandler):
    """While entered, Ctrl-C only sets ``reason``, for code that would lose an exception of a signal handler."""

    signals: ClassVar[tuple[signal.Signals, ...]] = (signal.SIGINT,)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)


def join_relay() -> None:
    """Leave the parent's process group, so that only the parent gets Ctrl-C from the terminal, and forwards it."""
    os.setpgrp()
