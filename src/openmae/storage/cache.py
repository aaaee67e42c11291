"""A cache on disk: complete and unfinished entries, locked while processes use them, limited in total size.

An entry is a folder. A process that uses it holds a shared lock on the folder, which the operating system releases when
the process ends. An entry is deleted only if it can be locked exclusively, and is renamed first, so that no process
sees a partly deleted one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from filelock import AcquireReturnProxy, FileLock, Timeout

from openmae.errors import DataError
from openmae.storage import flock
from openmae.storage.atomic import parse_object, write_atomically

CACHE_VARIABLE = "OPENMAE_CACHE"
SIZE_VARIABLE = "OPENMAE_CACHE_GB"
DEFAULT_GB = 50.0
MARKER = ".openmae-complete"
REMOTE, SOURCES, RESULTS, COPIES = KINDS = ("remote", "sources", "results", "copies")
_PART, _TRASH = ".part", ".trash-"

log = logging.getLogger("openmae")

_process_locks: dict[Path, int] = {}  # folder -> descriptor of a lock that is held until the process ends


class _Locks(threading.local):
    """The locks of the innermost ``holding`` block that a thread is in; outside of any, those of the process."""

    held = _process_locks


_locks = _Locks()


@dataclass(frozen=True)
class Entry:
    """One source in the cache.

    Attributes:
        origin: URL or path of the source.
        size: bytes.
        used: time of last use, in seconds since 1970.
        complete: False for a download to be resumed, or results that are not uploaded yet.
        in_use: a running process holds its lock.
    """

    path: Path
    origin: str
    size: int
    used: float
    complete: bool
    in_use: bool

    @property
    def kind(self) -> str:
        """``remote`` (downloaded), ``sources`` (extracted), ``results`` (to be uploaded) or ``copies`` (of images)."""
        return self.path.parent.name

    @property
    def removable(self) -> bool:
        """True unless the entry is in use, or holds results that are not uploaded yet."""
        return not self.in_use and (self.complete or self.kind != RESULTS)


def root() -> Path:
    """Return the cache folder: ``$OPENMAE_CACHE``, or ``openmae`` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(os.path.expanduser(chosen)) if chosen else platformdirs.user_cache_path("openmae")


def limit() -> int:
    """Return the size limit of the cache in bytes, from ``$OPENMAE_CACHE_GB``.

    Raises:
        DataError: the variable is not a positive number.
    """
    text = os.environ.get(SIZE_VARIABLE, "").strip() or str(DEFAULT_GB)
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise DataError(f"{SIZE_VARIABLE} must be a number of gigabytes above 0, got {text!r}.", "Correct or unset it.")
    return int(size * 1e9)


def obtain(entry: Path, origin: str, build: Callable[[Path], None], *, size: int = 0, resumes: bool = False) -> Path:
    """Return a complete entry, locked by this process; build it if it does not exist.

    If another process is building the entry, wait for it.

    Args:
        entry: folder of the entry.
        origin: URL or path of the source, without secrets.
        build: fills the folder that it is given.
        size: bytes that the entry will need; other entries are deleted to make room.
        resumes: ``build`` can continue in an unfinished folder. Otherwise the folder is emptied first, and deleted if
            ``build`` fails.

    Raises:
        DataError: there is not enough room.
        OSError: the cache cannot be written.
    """
    if use(entry):
        return entry
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _lock_to_build(entry, origin):
        if use(entry):
            return entry
        make_room(size, origin)
        part = entry.with_name(f"{entry.name}{_PART}")
        for leftover in {entry, *([] if resumes else entry.parent.glob(f"{entry.name}{_PART}*"))}:
            shutil.rmtree(leftover, ignore_errors=True)
        lock = None
        while lock is None:  # another process may delete the unfinished entry before it is locked
            part.mkdir(exist_ok=True)
            lock = flock.acquire(part, shared=True)
        try:
            build(part)
            mark_complete(part, origin)
            os.rename(part, entry)
            use(entry)
        except BaseException:
            if not resumes:
                shutil.rmtree(part, ignore_errors=True)
            raise
        finally:
            os.close(lock)
    make_room(0, origin)
    return entry


def use(entry: Path) -> bool:
    """Lock a complete entry for this process and set its time of use; return False if there is none."""
    if not (entry / MARKER).is_file() or not _hold(entry):
        return False
    try:
        os.utime(entry / MARKER)
    except OSError:  # another user's, in a shared cache
        log.debug("The time of use of %s could not be noted.", entry)
    return True


@contextmanager
def holding() -> Iterator[None]:
    """Release the locks that this thread takes in the block when the block ends, not when the process ends."""
    outer, _locks.held = _locks.held, {}
    try:
        yield
    finally:
        for descriptor in _locks.held.values():
            os.close(descriptor)
        _locks.held = outer


@contextmanager
def workspace(entry: Path, origin: str, patience: float = 0.0) -> Iterator[Path]:
    """Yield a results folder for this process only; from ``mark_pending`` to ``mark_complete`` it is not deleted.

    ``origin`` is the URL that the results are uploaded to, for messages. ``patience`` is how many seconds to wait for
    another process, such as the children of a killed one.

    Raises:
        DataError: another process uses the folder.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(f"{entry}.lock").acquire(timeout=patience)
    except Timeout as error:
        raise DataError(
            f"{origin}: another process on this machine writes its results there.",
            "Wait for it to end, or set another results_dir.",
        ) from error
    with lock, holding():
        while not _hold(entry):
            entry.mkdir(exist_ok=True)
            mark_complete(entry, origin)
        yield entry


def mark_pending(entry: Path, origin: str) -> None:
    """Mark a workspace as holding files that are not uploaded yet."""
    (entry / "origin").write_text(origin, encoding="utf-8")
    (entry / MARKER).unlink(missing_ok=True)


def mark_complete(entry: Path, origin: str) -> None:
    """Mark an entry as complete; it may be deleted when room is needed."""
    facts = {"origin": origin, "size": _size_below(entry), "made": int(time.time())}
    write_atomically(entry / MARKER, json.dumps(facts))


def grow(entry: Path, origin: str, wanted: int) -> tuple[int, int]:
    """Lock an entry that grows while it is used, created if missing.

    The least recently used entries are deleted until it has room for ``wanted`` bytes.

    Returns:
        How many bytes may be added, and how many it has.

    Raises:
        DataError: the cache is not a readable folder.
        OSError: it cannot be written.
    """
    while not use(entry):
        entry.mkdir(mode=0o700, parents=True, exist_ok=True)
        mark_complete(entry, origin)
    found = entries()
    taken = next((known.size for known in found if known.path == entry), 0)
    left = limit() - _evict(max(0, wanted - taken), found)
    return max(0, min(left, shutil.disk_usage(entry).free)), taken


def room(entry: Path) -> int:
    """Return how many bytes ``entry`` may have if others that are not in use are deleted; 0 if the cache is unusable.

    Raises:
        DataError: ``$OPENMAE_CACHE_GB`` is not a positive number.
    """
    bound, kept, free = limit(), 0, 0
    with suppress(DataError, OSError):
        root().mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root()).free
        for other in entries():
            stays = not other.removable and other.path != entry
            kept += other.size if stays else 0
            free += 0 if stays else other.size
        return max(0, min(bound - kept, free))
    return 0


def make_room(size: int, origin: str) -> None:
    """Delete the least recently used entries until ``size`` more bytes fit; entries in use are kept.

    Raises:
        DataError: the bytes do not fit into the cache or onto its disk.
    """
    bound, taken = limit(), _evict(size, entries())
    if size and taken + size > bound:
        in_use = f", of which {gigabytes(taken)} are in use" if taken else ""
        raise DataError(
            f"{origin} needs {gigabytes(size)} in the cache, whose limit is {gigabytes(bound)}{in_use}.",
            f"Set {SIZE_VARIABLE} to a larger number of gigabytes.",
        )
    folder = root()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(
            f"{origin} needs {gigabytes(size)}, but the disk of {folder} has {gigabytes(free)} left.",
            f"Free some space, or set {CACHE_VARIABLE} to a folder on another disk.",
        )


def _evict(size: int, found: Sequence[Entry]) -> int:
    """Delete the least recently used entries until ``size`` more bytes fit; return how many bytes are taken."""
    bound, taken = limit(), sum(entry.size for entry in found)
    for entry in sorted(found, key=lambda entry: entry.used):
        if taken + size <= bound:
            break
        if entry.removable and remove(entry.path):
            log.info("Removed %s (%s) from the cache to make room.", entry.origin, gigabytes(entry.size))
            taken -= entry.size
    return taken


def entries() -> list[Entry]:
    """Return all entries, most recently used first; also finish the deletions of killed processes.

    Raises:
        DataError: the cache is not a readable folder.
    """
    found = []
    for kind in KINDS:
        try:
            paths = list((root() / kind).iterdir())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(
                f"The cache {root()} cannot be read: {error.strerror}.",
                f"Check its permissions, or set {CACHE_VARIABLE} to another folder.",
            ) from error
        for path in paths:
            if path.name.startswith(_TRASH):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir() and not path.is_symlink():
                with suppress(FileNotFoundError, PermissionError):  # deleted meanwhile, or another user's
                    found.append(_read_entry(path))
    return sorted(found, key=lambda entry: -entry.used)


def clear() -> tuple[int, list[Entry]]:
    """Delete all removable entries; return the number of bytes freed, and the entries that are left."""
    freed, kept = 0, []
    for entry in entries():
        if entry.removable and remove(entry.path):
            freed += entry.size
        else:
            kept.append(entry)
    return freed, kept


def remove(path: Path) -> bool:
    """Delete an entry unless a process uses it; return whether it is gone."""
    lock = flock.acquire(path)
    if lock is None:
        return not path.exists()
    trash = path.with_name(f"{_TRASH}{os.getpid()}-{path.name}")
    try:
        os.rename(path, trash)
    finally:
        os.close(lock)
    shutil.rmtree(trash, ignore_errors=True)
    return True


def gigabytes(size: float) -> str:
    """Format a size: ``1.25 GB``, ``300 MB``, ``0.5 MB``."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.{0 if size >= 1e7 else 1}f} MB"


def _lock_to_build(entry: Path, origin: str) -> AcquireReturnProxy:
    lock = FileLock(f"{entry}.lock")
    try:
        return lock.acquire(timeout=0.2)
    except Timeout:
        log.info("Waiting for another process that is downloading or extracting %s.", origin)
        return lock.acquire()


def _read_entry(path: Path) -> Entry:
    marker = path / MARKER
    complete = marker.is_file()
    facts: dict[str, Any] = {}
    with suppress(OSError):  # unfinished, or another user's in a shared cache
        facts = parse_object(marker.read_bytes())
    if "origin" not in facts:
        with suppress(OSError):
            facts["origin"] = (path / "origin").read_text(encoding="utf-8")
    used = (marker if complete else path).stat().st_mtime
    size = None if path.parent.name == COPIES else facts.get("size")  # copies are added after their folder is marked
    size = size if isinstance(size, int) else _size_below(path)
    return Entry(path, str(facts.get("origin") or path.name), size, used, complete, _is_in_use(path))


def _size_below(folder: Path) -> int:
    """Return the bytes used on disk, without the holes of files that are being downloaded."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def _hold(path: Path) -> bool:
    """Take the shared lock of a folder; return False if the folder is gone."""
    if path not in _locks.held:
        if (lock := flock.acquire(path, shared=True)) is None:
            return False
        _locks.held[path] = lock
    return True


def _is_in_use(path: Path) -> bool:
    try:
        lock = flock.acquire(path)
    except PermissionError:  # another user's
        return True
    if lock is not None:
        os.close(lock)
    return lock is None
