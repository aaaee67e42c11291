"""Ctrl-C and preemption: finish the update, write a checkpoint, then stop; in every process of the run."""

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

from openmae.distributed.watchdog import Pulse
from openmae.errors import Preempted, StoppedAtOnce

# a machine that shuts down; SLURM before the time is up (Windows knows no such signal)
PREEMPTION = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))

T = TypeVar("T")

log = logging.getLogger("openmae")


Stop = type[KeyboardInterrupt]  # KeyboardInterrupt itself, or Preempted


def stop_to_counts(stop: Stop | None) -> tuple[float, float]:
    """For a sum over processes: 1 where a stop was asked for, and 1 where by a preemption."""
    return float(stop is not None), float(stop is Preempted)


def stop_from_counts(asked: float, preempted: float) -> Stop | None:
    """What all processes are to end with, of the sums."""
    return (Preempted if preempted else KeyboardInterrupt) if asked else None


class _InterruptHandler(ABC):
    """Handles signals while entered; the handlers before it are put back at the end.

    Attributes:
        reason: what the run is to end with: KeyboardInterrupt after Ctrl-C, Preempted after the others; None while
            nobody has asked for its end.
    """

    signals: ClassVar[tuple[signal.Signals, ...]] = (signal.SIGINT, *PREEMPTION)

    def __init__(self) -> None:
        self.reason: Stop | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for."""
        return self.reason is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self._before = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, _InterruptHandler) and self.reason is Preempted:
                outer.reason = Preempted  # told again, it must not break into what is left to do

    def _note(self, number: int) -> None:
        self.reason = self.reason or (Preempted if number in PREEMPTION else KeyboardInterrupt)

    @abstractmethod
    def _handle(self, number: int, frame: FrameType | None) -> None:
        """What a signal does."""


class InterruptWatch(_InterruptHandler):
    """While entered, the first signal asks the loop to stop after its update; Ctrl-C after it stops at once.

    SIGTERM after Ctrl-C does as well: who canceled the run has waited long enough. What announces a preemption may come
    several times, and only SIGKILL, which follows, is meant to cut the checkpoint short.
    """

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self._note(number)
            if number in PREEMPTION:
                log.warning("%s: writing a checkpoint after this step.", signal.Signals(number).name)
            else:
                log.warning("Interrupted: writing a checkpoint after this step. Press Ctrl-C again to stop at once.")
        elif number == signal.SIGINT or (number == signal.SIGTERM and self.reason is KeyboardInterrupt):
            raise StoppedAtOnce

    def until_asked(self, batches: Iterable[T], pulse: Pulse) -> Iterator[T]:
        """Pass batches on until a stop is asked for, of this process or, as ``pulse`` tells, of another one."""
        for batch in batches:
            pulse.leaves = self.asked
            if self.asked or pulse.someone_leaves:
                return
            yield batch


class PreemptionWatch(_InterruptHandler):
    """While entered, a preemption ends what has nothing to save: what comes before and after the training itself."""

    signals: ClassVar[tuple[signal.Signals, ...]] = PREEMPTION

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:  # told again, it would break into the end of the run
            self._note(number)
            raise Preempted


class InterruptRelay(_InterruptHandler):
    """While entered, this process passes signals on to its children, and waits for them to end in their own time.

    The children are to call ``join_relay``, so that a terminal does not send them the same Ctrl-C a second time.
    """

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(child.pid, number)


def join_relay() -> None:
    """Leave the parent's process group: only the parent hears the terminal's Ctrl-C, and passes it on."""
    os.setpgrp()
