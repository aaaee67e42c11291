"""Advisory locks on files and folders (``flock``), released by the system when their holder dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def acquire(path: Path, flags: int = os.O_RDONLY, *, shared: bool = False) -> int | None:
    """Open a file or folder and lock it until the returned descriptor is closed.

    A ``shared`` lock permits other shared locks, and waits while another process holds an exclusive one. An exclusive
    lock is taken at once or not at all.

    Returns:
        The descriptor; None if another process holds the lock, or if the path is gone or was replaced meanwhile.

    Raises:
        OSError: the path cannot be opened, or its file system has no locks.
    """
    try:
        descriptor = os.open(path, flags, 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
