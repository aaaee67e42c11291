"""Temporary folders in memory whose content is gone when their process is, however it ends.

Two things remove a folder that its process cannot: a shell that waits for the process to end, and, where the shell was
killed as well, the next run. A process holds a lock on its folder, so that no other one takes it for abandoned.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MEMORY = Path("/dev/shm")  # a file system without a disk, on Linux
_PREFIX = "openmae-"
_WAIT_AND_REMOVE = ["/bin/sh", "-c", 'read -r _; exec rm -rf -- "$1"', "openmae-cleanup"]


@contextmanager
def memory_folder() -> Iterator[Path]:
    """Make a folder below ``MEMORY`` that only this user may read, and remove it at the end."""
    folder, lock = _locked_folder()
    cleanup = subprocess.Popen(
        [*_WAIT_AND_REMOVE, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # what kills this process's group does not kill it
    )
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        cleanup.communicate()


def remove_abandoned() -> None:
    """Remove the folders of processes that were killed together with what waited for them to end."""
    with suppress(OSError):
        for folder in MEMORY.glob(f"{_PREFIX}*"):
            if (lock := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _locked_folder() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=MEMORY))
        lock = _lock(folder)
        if lock is not None and folder.is_dir():  # else another process took it for abandoned before it was locked
            return folder, lock
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder of this user, without waiting; None where another process holds it, or it is gone."""
    import fcntl  # Linux has it, and MEMORY

    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_uid == os.getuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None
