"""From a URL to a local path: looked up each time, downloaded once for each version."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from openmae.errors import DataError
from openmae.storage import cache
from openmae.storage.listing import Found, look
from openmae.storage.transfer import ChangedError, Transfer
from openmae.storage.urls import name_of, redact

_VERSIONS = 3  # a source that changes more often while it is read is given up

log = logging.getLogger("openmae")


def fetch(url: str, suffixes: Sequence[str] = (), *, quiet: bool = False) -> Path:
    """Return a local copy of what lies at a URL, in its present version, held by this process.

    Args:
        url: of a file, or of a folder.
        suffixes: files named after the one, such as ``.json`` for ``<file>.json``: they come along where they exist.
        quiet: show nothing, since something else is shown meanwhile.

    Returns:
        The file or folder in the cache, under its own name.

    Raises:
        DataError: it cannot be had, or does not fit into the cache.
    """
    return fetch_with(url, partial(local_copy, quiet=quiet), suffixes)


def fetch_with(url: str, make: Callable[[Found], Path], suffixes: Sequence[str] = ()) -> Path:
    """Look a URL up and ``make`` something of it; both once more where it changed in the meantime.

    Raises:
        DataError: it cannot be had, does not fit into the cache, or goes on changing.
    """
    for _ in range(_VERSIONS - 1):
        try:
            return make(look(url, suffixes))
        except ChangedError as error:
            log.info("%s Starting over.", error.problem)
    return make(look(url, suffixes))


def local_copy(found: Found, *, quiet: bool = False) -> Path:
    """The path in the cache of what was found, downloaded unless it is there already.

    Raises:
        ChangedError: it has another version by now.
        DataError: it cannot be had, or does not fit into the cache.
    """
    entry = cache.root() / cache.REMOTE / found.key
    name = name_of(found.url) if found.folder else found.files[0].name

    def build(part: Path) -> None:
        download(found, part / name if found.folder else part, quiet=quiet)

    try:
        cache.obtain(entry, redact(found.url), build, size=found.size, resumes=True)
    except OSError as error:
        raise DataError(
            f"{redact(found.url)} could not be stored in {cache.root()}: {error.strerror or error}.",
            f"Make room and see to its permissions, or set {cache.CACHE_VARIABLE} to another folder.",
        ) from error
    return entry / name


def download(found: Found, folder: Path, *, quiet: bool = False) -> None:
    """Download files into a folder, with a progress bar on a terminal; goes on where an earlier call stopped.

    Args:
        found: the files.
        folder: is made.
        quiet: no bar, no message.

    Raises:
        DataError: they cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = redact(found.url)
    count = f"{len(found.files):,} files, " if len(found.files) > 1 else ""
    level = logging.DEBUG if quiet else logging.INFO
    log.log(level, "Downloading %s (%s%s).", shown, count, cache.gigabytes(found.size))
    with _bar(name_of(found.url), found.size, quiet) as (arrived, watch):
        Transfer(found.url, found.files, folder, arrived).run(watch)
    for leftover in folder.glob(".*.part"):
        leftover.unlink()


@contextmanager
def _bar(name: str, size: int, quiet: bool) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """What counts bytes, in any thread, and what shows them, in this one."""
    console = Console(stderr=True)
    counted, lock = [0], threading.Lock()

    def arrived(count: int) -> None:
        with lock:
            counted[0] += count

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet or not console.is_terminal
    ) as progress:
        task = progress.add_task(name[: shutil.get_terminal_size().columns // 3], total=size or None)
        yield arrived, lambda: progress.update(task, completed=counted[0])
