"""The library's log messages on stderr; warnings and errors are marked."""

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
    """Show messages of ``level`` and above while the block runs; drop them if stderr is closed."""
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
    """A handler for the current ``sys.stderr``, which a live display replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _MARKS.get(record.levelno, "") + encodable(super().format(record))
