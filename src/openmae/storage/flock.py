"""Advisory locks on open files and folders (``flock``), which the system releases when their holder dies."""

from __future__ import annotations

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

AVAILABLE = fcntl is not None


def lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file or folder until its descriptor is closed. On systems without such locks, do nothing.

    Args:
        descriptor: of the open file or folder.
        shared: other processes may hold shared locks too.
        wait: wait for the lock, instead of raising an error.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file system has no locks.
    """
    if fcntl is not None:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
