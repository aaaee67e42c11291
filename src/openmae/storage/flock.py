"""Advisory locks on open files and folders (``flock``), released by the system when their holder dies."""

from __future__ import annotations

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

AVAILABLE = fcntl is not None


def lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file or folder until its descriptor is closed; do nothing on systems without ``flock``.

    A ``shared`` lock permits shared locks of other processes.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is not set.
        OSError: the file system has no locks.
    """
    if fcntl is not None:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
