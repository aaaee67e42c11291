"""The C library's allocator during a run on the CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_MIB = 2**20


@contextmanager
def kept_memory() -> Iterator[None]:
    """``keep_freed_memory``, until the end of the block."""
    kept = keep_freed_memory()
    try:
        yield
    finally:
        if kept:
            return_freed_memory()


def keep_freed_memory() -> bool:
    """Let the process keep what it frees, for its next step; returns whether the C library does.

    glibc gives large blocks back to the kernel as they are freed, and in the next step, which needs as much, gets them
    again, zeroed page by page: a tenth to a quarter of a step on the CPU (docs/benchmarks.md). With no block mapped on
    its own and no trimming (mallopt(3)) they stay in the heap. It acts with glibc alone, and not where ``MALLOC_...``
    or ``GLIBC_TUNABLES`` says how the process is to allocate; a preloaded allocator ignores it.
    """
    glibc = _glibc()
    return glibc is not None and all(glibc.mallopt(*option) for option in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))


def return_freed_memory() -> None:
    """Give the kernel what is free, and from now on what is freed, in the sizes that glibc's own rule comes to."""
    glibc = _glibc()
    if glibc is not None:
        for option in ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 * _MIB), (_TRIM_THRESHOLD, 64 * _MIB)):
            glibc.mallopt(*option)
        glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc and nobody else has a say in it."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return None
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: Windows
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None
