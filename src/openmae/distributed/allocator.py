"""Tune glibc's memory allocator for runs on the CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # from glibc's malloc.h
_MIB = 2**20


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Apply ``keep_freed_memory`` until the end of the block, if ``device`` is the CPU."""
    kept = device.type == "cpu" and keep_freed_memory()
    try:
        yield
    finally:
        if kept:
            return_freed_memory()


def keep_freed_memory() -> bool:
    """Keep freed memory in the process, for its next step; return False if this is not supported.

    By default, glibc returns large blocks to the kernel, and the next step gets them back zeroed page by page, which
    takes 10% to 25% of a step on the CPU (docs/benchmarks.md). Turning off mmap and trimming (mallopt(3)) keeps them in
    the heap. Does nothing without glibc, or if a variable ``MALLOC_...`` or ``GLIBC_TUNABLES`` is set.
    """
    glibc = _glibc()
    return glibc is not None and all(glibc.mallopt(*option) for option in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))


def return_freed_memory() -> None:
    """Return free memory to the kernel, and restore the thresholds that glibc adapts to by default."""
    glibc = _glibc()
    if glibc is not None:
        for option in ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 * _MIB), (_TRIM_THRESHOLD, 64 * _MIB)):
            glibc.mallopt(*option)
        glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc and no environment variable configures its allocator."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return None
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: Windows
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None
