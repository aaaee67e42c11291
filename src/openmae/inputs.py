"""Opening what a user names: regular files, and a pipe only where one makes sense.

A named pipe would block until somebody writes to it, and a device such as /dev/zero never ends. Both may be in a data
set or behind a link, under any name, so that readers ask here instead of calling ``open``.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger("openmae")

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_KINDS = (
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_PATIENCE = 3  # seconds before it is said that a pipe is waited for


def irregular(path: str | os.PathLike[str]) -> str | None:
    """Return what ``path`` is if it is neither a regular file nor a folder, such as "a named pipe (FIFO)", else None.

    Raises:
        OSError: there is no such file, or it cannot be looked at.
    """
    return _kind(os.stat(path).st_mode)


def _kind(mode: int) -> str | None:
    return next((name for check, name in _KINDS if check(mode)), None)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading bytes.

    Raises:
        OSError: as ``open`` does; also for a pipe, a socket or a device, whose ``strerror`` says what it is.
    """
    if kind := irregular(path):  # before it is opened, which would let a writer to the pipe go on
        raise _irregular(path, kind)
    descriptor = os.open(path, _FLAGS)
    try:
        if kind := _kind(os.fstat(descriptor).st_mode):  # exchanged meanwhile
            raise _irregular(path, kind)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file_or_pipe(path: str | os.PathLike[str], most: int) -> bytes:
    """Read a regular file, or a pipe that somebody writes to: ``<(command)`` of a shell, or /dev/stdin.

    Args:
        path: of the file.
        most: bytes that are read; the rest is left.

    Raises:
        OSError: as ``open_regular``; also for a pipe that has no writer.
    """
    if not stat.S_ISFIFO(os.stat(path).st_mode):
        with open_regular(path) as file:
            return file.read(most)
    descriptor = os.open(path, _FLAGS)
    try:
        return _read_pipe(descriptor, Path(path), most)
    finally:
        os.close(descriptor)


def _read_pipe(descriptor: int, path: Path, most: int) -> bytes:
    content = b""
    told = False
    while len(content) < most:
        try:
            part = os.read(descriptor, 1 << 16)
        except BlockingIOError:  # it has a writer, who has not written
            if not select.select([descriptor], [], [], _PATIENCE)[0] and not told:
                log.warning("Waiting for somebody to write to %s, which is a pipe (Ctrl-C stops it).", path)
                told = True
            continue
        if not part and not content:
            raise OSError(errno.EPIPE, "it is a pipe that nothing is written to", str(path))
        if not part:
            break
        content += part
    return content[:most]


def _irregular(path: str | os.PathLike[str], kind: str) -> OSError:
    return OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))
