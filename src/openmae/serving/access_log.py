"""Limit the number of log records that clients can cause."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_BURST, _PERIOD = 10, 60.0  # at most 10 records of one kind in 60 seconds
_KINDS = 1000
_LOGGERS = ("asyncio", "uvicorn.error", "openmae", "python_multipart")

log = logging.getLogger("openmae")


class LogLimit(logging.Filter):
    """Passes ``_BURST`` records of a kind per ``_PERIOD`` seconds, and counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is logged; the first one of a new period reports how many were dropped."""
        kind = (record.name, str(record.msg)[:80])
        began, count = self._kinds.get(kind, (-_PERIOD, 0))
        if time.monotonic() - began >= _PERIOD:
            if count > _BURST:
                record.msg = f"{record.msg} ({count - _BURST} more like this were not logged)"
            if len(self._kinds) > _KINDS:
                self._kinds.clear()
            began, count = time.monotonic(), 0
        self._kinds[kind] = (began, count + 1)
        return count < _BURST


@contextmanager
def limited_logs() -> Iterator[None]:
    """Limit the records of all loggers to which requests can write."""
    limits = [(logging.getLogger(name), LogLimit()) for name in _LOGGERS]
    for logger, limit in limits:
        logger.addFilter(limit)
    try:
        yield
    finally:
        for logger, limit in limits:
            logger.removeFilter(limit)


def log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error of the event loop; failures to accept a connection, which may be many, without a traceback."""
    error = context.get("exception")
    if isinstance(error, OSError) and "accept" in str(context.get("message")):
        log.error("A connection could not be accepted (%s).", error.strerror)
    else:
        loop.default_exception_handler(context)
