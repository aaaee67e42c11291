"""The cache on the disk: entries that are whole or unfinished, held while a process uses them, and bounded in size."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from openmae.errors import DataError
from openmae.storage.atomic import write_atomically

try:
    import fcntl
except ImportError:  # Windows, and some sandboxes
    fcntl = None  # type: ignore[assignment]

CACHE_VARIABLE = "OPENMAE_CACHE"
SIZE_VARIABLE = "OPENMAE_CACHE_GB"
DEFAULT_GB = 50.0
MARKER = ".openmae-complete"
REMOTE, SOURCES, RESULTS = KINDS = ("remote", "sources", "results")
_PART = ".part"
_TRASH = ".trash-"

log = logging.getLogger("openmae")

_Holds = dict[Path, int]  # folder -> descriptor that carries the shared lock
_for_good: _Holds = {}


class _Blocks(threading.local):
    """The ``holding`` blocks that the thread is in."""

    def __init__(self) -> None:
        self.open: list[_Holds] = []


_blocks = _Blocks()


@dataclass(frozen=True)
class Entry:
    """What one source takes.

    Attributes:
        path: its folder.
        origin: the URL or path that it came from.
        size: in bytes.
        used: seconds since the epoch.
        complete: it is whole. An unfinished one is a download to go on with, or results that are not uploaded yet.
        in_use: a running process holds it.
    """

    path: Path
    origin: str
    size: int
    used: float
    complete: bool
    in_use: bool

    @property
    def kind(self) -> str:
        """``remote`` (downloaded), ``sources`` (extracted) or ``results`` (to be uploaded)."""
        return self.path.parent.name

    @property
    def removable(self) -> bool:
        """Whether it can be made again: results that were not uploaded cannot."""
        return not self.in_use and (self.complete or self.kind != RESULTS)


def root() -> Path:
    """Where the cache is: ``$OPENMAE_CACHE``, else the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(os.path.expanduser(chosen)) if chosen else platformdirs.user_cache_path("openmae")


def limit() -> int:
    """Bytes that the cache may take: ``$OPENMAE_CACHE_GB`` times 10^9.

    Raises:
        DataError: it is no number above 0.
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
    """Return a whole entry, held by this process; made by this process, or by another that was faster.

    Args:
        entry: its folder.
        origin: the URL or path that it comes from, as it may be shown.
        build: fills the folder that it is given.
        size: bytes that it is known to need; room is made for them.
        resumes: an unfinished folder is given to ``build`` again; otherwise it is emptied first, and after an error.

    Raises:
        DataError: there is no room.
        OSError: the cache cannot be written.
    """
    if use(entry):
        return entry
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _locked(entry, origin):
        if use(entry):
            return entry
        make_room(size, origin)
        part = entry.with_name(f"{entry.name}{_PART}")
        for leftover in {entry, *([] if resumes else entry.parent.glob(f"{entry.name}{_PART}*"))}:
            shutil.rmtree(leftover, ignore_errors=True)
        part.mkdir(exist_ok=True)
        _hold(part)
        try:
            build(part)
            _mark(part, origin)
            os.rename(part, entry)
            use(entry)
        except BaseException:
            if not resumes:
                shutil.rmtree(part, ignore_errors=True)
            raise
        finally:
            _release(part)
    make_room(0, origin)
    return entry


def use(entry: Path) -> bool:
    """Hold an entry for this process and note that it is used now; False: there is no whole one."""
    if not (entry / MARKER).is_file() or not _hold(entry):
        return False
    try:
        os.utime(entry / MARKER)
    except FileNotFoundError:  # removed between the two
        _release(entry)
        return False
    except OSError:  # somebody else's, in a shared cache
        log.debug("The time of use of %s could not be noted.", entry)
    return True


@contextmanager
def holding() -> Iterator[None]:
    """What this thread takes within the block is released at its end; without one, at the end of the process."""
    holds: _Holds = {}
    _blocks.open.append(holds)
    try:
        yield
    finally:
        _blocks.open.pop()
        for descriptor in holds.values():
            os.close(descriptor)


@contextmanager
def workspace(entry: Path, origin: str, patience: float = 0.0) -> Iterator[Path]:
    """A folder of results for this process alone; from ``mark_pending`` to ``mark_uploaded`` it is not removed.

    Args:
        entry: the folder.
        origin: of its content, for messages.
        patience: seconds to wait for another process, such as the children of one that was killed.

    Raises:
        DataError: another process works in it.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{entry}.lock")
    try:
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise DataError(
            f"{origin}: another process on this machine writes its results there.",
            "Wait for it to end, or set another results_dir.",
        ) from error
    try:
        with holding():
            if not entry.exists():
                entry.mkdir()
                _mark(entry, origin)
            _hold(entry)
            yield entry
    finally:
        lock.release()


def mark_pending(entry: Path, origin: str) -> None:
    """There are things in a workspace that are not at their destination."""
    (entry / "origin").write_text(origin, encoding="utf-8")
    (entry / MARKER).unlink(missing_ok=True)


def mark_uploaded(entry: Path, origin: str) -> None:
    """Everything in a workspace is at its destination: it may be removed when room is needed."""
    _mark(entry, origin)


def make_room(size: int, origin: str) -> None:
    """Remove what was not used for longest until ``size`` more bytes fit; what a process holds stays.

    Raises:
        DataError: they do not fit into the cache or onto its disk.
    """
    bound, found = limit(), entries()
    taken = sum(entry.size for entry in found)
    for entry in sorted(found, key=lambda entry: entry.used):
        if taken + size <= bound:
            break
        if entry.removable and remove(entry.path):
            log.info("Removed %s (%s) from the cache to make room.", entry.origin, gigabytes(entry.size))
            taken -= entry.size
    if size and taken + size > bound:
        in_use = f", of which {gigabytes(taken)} are in use" if taken else ""
        raise DataError(
            f"{origin} needs {gigabytes(size)} in the cache, which may take {gigabytes(bound)}{in_use}.",
            f"Set {SIZE_VARIABLE} to a larger number of gigabytes.",
        )
    folder = root()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(
            f"{origin} needs {gigabytes(size)}, but the disk of {folder} has {gigabytes(free)} left.",
            f"Make room, or set {CACHE_VARIABLE} to a folder on another disk.",
        )


def entries() -> list[Entry]:
    """All entries, those used last first; what was being removed when a process was killed is removed.

    Raises:
        DataError: the cache is no folder that can be read.
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
                f"See to its permissions, or set {CACHE_VARIABLE} to another folder.",
            ) from error
        for path in paths:
            if path.name.startswith(_TRASH):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir() and not path.is_symlink() and (entry := _entry(path)) is not None:
                found.append(entry)
    return sorted(found, key=lambda entry: -entry.used)


def clear() -> tuple[int, list[Entry]]:
    """Remove all that can be had again; returns the bytes freed, and the entries that stay."""
    freed, kept = 0, []
    for entry in entries():
        if entry.removable and remove(entry.path):
            freed += entry.size
        else:
            kept.append(entry)
    return freed, kept


def gigabytes(size: float) -> str:
    """``1.25 GB``, ``300 MB``, ``0.5 MB``."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.{0 if size >= 1e7 else 1}f} MB"


def _entry(path: Path) -> Entry | None:
    try:
        marker = path / MARKER
        complete = marker.is_file()
        facts = _read_marker(marker) if complete else {}
        used = (marker if complete else path).stat().st_mtime
        origin = facts.get("origin") or _origin_of(path)
        size = facts.get("size")
        size = size if isinstance(size, int) else _size_below(path)
        return Entry(path, str(origin), size, used, complete, not _is_free(path))
    except FileNotFoundError:  # removed in the meantime
        return None


def _origin_of(path: Path) -> str:
    try:
        return (path / "origin").read_text(encoding="utf-8")
    except OSError:
        return path.name


def _read_marker(marker: Path) -> dict:
    try:
        facts = json.loads(marker.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, PermissionError):  # damaged, or somebody else's in a shared cache
        return {}
    return facts if isinstance(facts, dict) else {}


def _mark(folder: Path, origin: str) -> None:
    text = json.dumps({"origin": origin, "size": _size_below(folder), "made": int(time.time())})
    write_atomically(folder / MARKER, text)


def _size_below(folder: Path) -> int:
    """Bytes on the disk, so that the holes of a file being downloaded do not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


@contextmanager
def _locked(entry: Path, origin: str) -> Iterator[None]:
    lock = FileLock(f"{entry}.lock")
    try:
        lock.acquire(timeout=0.2)
    except Timeout:
        log.info("Waiting for another process that fetches %s.", origin)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _hold(path: Path) -> bool:
    """Take the shared lock of a folder; False: it is gone."""
    if fcntl is None or any(path in holds for holds in (_for_good, *_blocks.open)):
        return path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not path.is_dir() or os.fstat(descriptor).st_ino != path.stat().st_ino:  # removed while we waited
        os.close(descriptor)
        return False
    (_blocks.open[-1] if _blocks.open else _for_good)[path] = descriptor
    return True


def _release(path: Path) -> None:
    for holds in (_for_good, *_blocks.open):
        if (descriptor := holds.pop(path, None)) is not None:
            os.close(descriptor)


def _is_free(path: Path) -> bool:
    if fcntl is None:  # nobody can say: `mae cache clear` removes it
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # somebody else's, and not for us to remove
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def remove(path: Path) -> bool:
    """Remove an entry unless a process holds it, and say whether it is gone; it disappears at once, its files after."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return True
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        trash = path.with_name(f"{_TRASH}{os.getpid()}-{path.name}")
        os.rename(path, trash)
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(descriptor)
    shutil.rmtree(trash, ignore_errors=True)
    return True
