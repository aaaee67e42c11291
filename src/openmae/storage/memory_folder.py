"""Temporary folders in memory, removed when their process ends, even if it is killed.

If the process cannot remove its folder, a shell that waits for its end does, or, if the shell was killed too, the next
run. The process holds a lock on its folder, which shows other processes that it is in use.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from openmae.storage import flock

MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
_PREFIX = "openmae-"
_WAIT_AND_REMOVE = ["/bin/sh", "-c", 'read -r _; exec rm -rf -- "$1"', "openmae-cleanup"]


@contextmanager
def memory_folder() -> Iterator[Path]:
    """Yield a new folder in ``MEMORY`` that only this user can read; it is removed when the block ends."""
    lock = None
    while lock is None:  # another process may remove the folder as abandoned before it is locked
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=MEMORY))
        lock = flock.acquire(folder)
    cleanup = subprocess.Popen(
        [*_WAIT_AND_REMOVE, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that it survives a signal to this process's group
    )
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        cleanup.communicate()


def remove_abandoned() -> None:
    """Remove the folders of processes that were killed together with their cleanup shell."""
    for folder in MEMORY.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's
            if (lock := flock.acquire(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)) is not None:
                if os.fstat(lock).st_uid == os.getuid():
                    shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
