"""Ctrl-C: finish the update, write a checkpoint, then stop; in every process of the run."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

log = logging.getLogger("openmae")


class _InterruptHandler(ABC):
    """Handles Ctrl-C while entered; the handler before it is put back at the end.

    Attributes:
        asked: whether a stop was asked for.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @abstractmethod
    def _handle(self, number: int, frame: FrameType | None) -> None:
        """What Ctrl-C does."""


class InterruptWatch(_InterruptHandler):
    """While entered, the first Ctrl-C asks the loop to stop after its update; a second one stops at once."""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("Interrupted: writing a checkpoint after this step. Press Ctrl-C again to stop at once.")


class InterruptRelay(_InterruptHandler):
    """While entered, this process passes Ctrl-C on to its children, and waits for them to end in their own time.

    The children are to call ``join_relay``, so that a terminal does not send them the same Ctrl-C a second time.
    """

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for child in multiprocessing.active_children():
            if child.pid is not None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(child.pid, signal.SIGINT)


def join_relay() -> None:
    """Leave the parent's process group: only the parent hears the terminal's Ctrl-C, and passes it on."""
    os.setpgrp()
