"""Ctrl-C during training: finish the update, write a checkpoint, then stop."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

log = logging.getLogger("openmae")


class InterruptWatch:
    """While entered, the first Ctrl-C only asks the loop to stop; a second one stops at once.

    Attributes:
        asked: whether a stop was asked for; the loop looks at it between updates.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def raise_if_asked(self) -> None:
        """Stop here, where nothing is lost.

        Raises:
            KeyboardInterrupt: a stop was asked for.
        """
        if self.asked:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("Interrupted: writing a checkpoint after this step. Press Ctrl-C again to stop at once.")
