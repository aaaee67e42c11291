"""Show OpenMAE's log messages on stderr, with a prefix for warnings and errors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from openmae.results.streams import guarded
from openmae.storage.printable import encodable

_MARKS = {logging.WARNING: "Notice: ", logging.ERROR: "Error: "}


@contextmanager
def notices_on_stderr(level: int = logging.INFO) -> Iterator[None]:
    """Show messages of ``level`` and above on stderr while the block runs; drop them if stderr is closed."""
    logger, handler = logging.getLogger("openmae"), _OnStderr()
    handler.setFormatter(_Formatter())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        with guarded("stderr"):
            yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


class _OnStderr(logging.StreamHandler[TextIO]):
    """A handler that looks up ``sys.stderr`` for each message, since a live display replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _MARKS.get(record.levelno, "") + encodable(super().format(record))
