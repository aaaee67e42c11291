"""The C library's allocator during a run on the CPU."""

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
    """Let the process keep freed memory for its next step; return whether the C library supports it.

    glibc returns large blocks to the kernel when they are freed. The next step needs as much, and gets it zeroed page
    by page: a tenth to a quarter of a step on the CPU (docs/benchmarks.md). Without separately mapped blocks and
    trimming (mallopt(3)) the memory stays in the heap. This applies only to glibc, and not if ``MALLOC_...`` or
    ``GLIBC_TUNABLES`` configures the allocator; a preloaded allocator ignores it.
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
