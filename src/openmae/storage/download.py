"""Local copies of remote files and folders: each version is downloaded once and kept in the cache."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from openmae.errors import DataError
from openmae.storage import cache
from openmae.storage.listing import Found, look
from openmae.storage.transfer import ChangedError, Transfer
from openmae.storage.urls import name_of, redact

_VERSIONS = 3  # attempts to read a source that keeps changing

log = logging.getLogger("openmae")


def fetch(url: str, suffixes: Sequence[str] = (), *, quiet: bool = False) -> Path:
    """Return the current version of a remote file or folder, kept in the cache while this process uses it.

    Files named ``<file><suffix>`` are fetched too if they exist. A message and, on a terminal, a progress bar are shown
    unless ``quiet``.

    Raises:
        DataError: it cannot be downloaded, or does not fit into the cache.
    """
    return fetch_with(url, partial(local_copy, quiet=quiet), suffixes)


def fetch_with(url: str, make: Callable[[Found], Path], suffixes: Sequence[str] = ()) -> Path:
    """Call ``make`` with the file or folder at a URL; start over if it changes meanwhile.

    Raises:
        DataError: it cannot be downloaded, does not fit into the cache, or keeps changing.
    """
    for _ in range(_VERSIONS - 1):
        try:
            return make(look(url, suffixes))
        except ChangedError as error:
            log.info("%s Starting over.", error.problem)
    return make(look(url, suffixes))


def local_copy(found: Found, *, quiet: bool = False) -> Path:
    """Return the path of a copy in the cache, which is downloaded if it is missing.

    Raises:
        ChangedError: it has changed since it was looked up.
        DataError: it cannot be downloaded, or does not fit into the cache.
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
            f"Free some space and check its permissions, or set {cache.CACHE_VARIABLE} to another folder.",
        ) from error
    return entry / name


def download(found: Found, folder: Path, *, quiet: bool = False) -> None:
    """Download files into ``folder``, which is created if missing; files that it already has are skipped.

    A message and, on a terminal, a progress bar are shown unless ``quiet``.

    Raises:
        DataError: the files cannot be downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = f"{len(found.files):,} files, " if len(found.files) > 1 else ""
    level = logging.DEBUG if quiet else logging.INFO
    log.log(level, "Downloading %s (%s%s).", redact(found.url), count, cache.gigabytes(found.size))
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    description = TextColumn("{task.description}", markup=False)
    hidden = quiet or not console.is_terminal
    with Progress(description, *columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(
            name_of(found.url)[: shutil.get_terminal_size().columns // 3], total=found.size or None
        )
        Transfer(found.url, found.files, folder, partial(progress.advance, task)).run()
    for leftover in folder.glob(".*.part"):
        leftover.unlink()
