"""Opening files that a user names: regular files, and pipes where they make sense.

Opening a named pipe blocks until a program writes to it, and a device such as /dev/zero never ends. A data set may
contain both under any name, so readers use these functions instead of ``open``.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
from typing import BinaryIO

log = logging.getLogger("openmae")

_FLAGS = os.O_RDONLY | os.O_NONBLOCK
_KINDS = (
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_PATIENCE = 3  # seconds of waiting for a pipe before a message names it


def irregular(path: str | os.PathLike[str]) -> str | None:
    """Return the kind of ``path``, such as "a named pipe (FIFO)"; None for a regular file or a folder.

    Raises:
        OSError: the file does not exist or its status cannot be read.
    """
    return _kind(os.stat(path).st_mode)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading bytes.

    Raises:
        OSError: the file cannot be opened, or is a pipe, a socket or a device; ``strerror`` then names the kind.
    """
    if kind := irregular(path):  # checked before opening, which would unblock a writer to the pipe
        raise _not_regular(path, kind)
    descriptor = os.open(path, _FLAGS)
    try:
        if kind := _kind(os.fstat(descriptor).st_mode):  # replaced after the check above
            raise _not_regular(path, kind)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file_or_pipe(path: str | os.PathLike[str], most: int) -> bytes:
    """Read up to ``most`` bytes of a regular file, or of a pipe with a writer: ``<(command)`` in a shell, /dev/stdin.

    Raises:
        OSError: as ``open_regular``; also for a pipe without a writer.
    """
    if not stat.S_ISFIFO(os.stat(path).st_mode):
        with open_regular(path) as file:
            return file.read(most)
    descriptor = os.open(path, _FLAGS)
    content, logged = b"", False
    try:
        while len(content) < most:
            try:
                part = os.read(descriptor, 1 << 16)
            except BlockingIOError:  # there is a writer, but no data yet
                if not select.select([descriptor], [], [], _PATIENCE)[0] and not logged:
                    log.warning("Waiting for data from %s, which is a pipe (Ctrl-C stops).", os.fspath(path))
                    logged = True
                continue
            if not part and not content:
                raise OSError(errno.EPIPE, "it is a pipe without a writer", os.fspath(path))
            if not part:
                break
            content += part
        return content[:most]
    finally:
        os.close(descriptor)


def _kind(mode: int) -> str | None:
    return next((name for check, name in _KINDS if check(mode)), None)


def _not_regular(path: str | os.PathLike[str], kind: str) -> OSError:
    return OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))
