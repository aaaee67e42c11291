"""Handle standard streams that cannot be written: closed pipes, closed descriptors, redirections to a full disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, TextIO

Name = Literal["stdout", "stderr"]


class OutputLostError(Exception):
    """Stdout cannot be written. It is not an ``OSError``, which libraries may catch."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"stdout cannot be written ({cause.strerror}).")
        self.reader_left = isinstance(cause, BrokenPipeError)


@contextmanager
def guarded(name: Name, *, needed: bool = False) -> Iterator[None]:
    """Keep errors of a standard stream from ending the block with ``OSError`` or ``SystemExit``.

    Text that cannot be written is dropped, unless the stream is ``needed`` because it carries the result.

    Raises:
        OutputLostError: the stream is needed and cannot be written.
    """
    before = getattr(sys, name)
    if before is None:  # closed
        yield
        return
    stream = _Guarded(before, needed)
    setattr(sys, name, stream)
    try:
        yield
        stream.flush()
    finally:
        if getattr(sys, name) is stream:
            setattr(sys, name, before)
        _settle(before)


def open_standard_streams() -> None:
    """Open the null device for each standard stream that the caller closed (``>&-``).

    Otherwise the next file to be opened, such as a checkpoint, would get its descriptor, and so all text printed to it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the rest of the process


class _Guarded:
    """A text stream that ignores write errors, or raises ``OutputLostError`` if it is needed."""

    def __init__(self, stream: TextIO, needed: bool) -> None:
        self._stream, self._needed = stream, needed

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fail(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if self._needed:
            raise OutputLostError(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _settle(stream: TextIO) -> None:
    """Discard text that cannot be written. Python would try again to write it at exit, and exit with code 120."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, stream.fileno())
            os.close(descriptor)
            stream.flush()
