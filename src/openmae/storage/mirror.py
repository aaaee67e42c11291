"""Mirror a local folder to an object store: upload files as they change, and download them to resume."""

from __future__ import annotations

import glob
import itertools
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from openmae.errors import DataError, RunError, StoppedAtOnce
from openmae.storage import layout
from openmae.storage.atomic import parse_object, write_atomically
from openmae.storage.download import download
from openmae.storage.filesystem import ask, is_missing, is_transient, open_filesystem
from openmae.storage.listing import Found, list_files, listed_file
from openmae.storage.printable import listed
from openmae.storage.transfer import ChangedError
from openmae.storage.urls import join, redact, scheme_of

STATUS_SECONDS = 20.0  # between two uploads of the status
GROWING_SECONDS = 30.0  # between two uploads of another file that keeps changing
_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 15.0
_PATIENCE_SECONDS = 180.0  # how long a run waits at its end for a store that stopped responding
_STOP_SECONDS = 5.0  # how long a run that must stop at once waits for the current upload
_TRIES = 5
_PART = 8 << 20  # bytes of a part of a large upload
_PARTS_AT_ONCE = 4

log = logging.getLogger("openmae")


class Mirror:
    """A context manager whose thread uploads the files of a folder as they appear and change.

    A file appears in the store only when its upload is complete. Files whose names begin with a dot are temporary and
    are not uploaded. Files that are deleted locally are deleted from the store. On exit, all remaining files are
    uploaded, the status last.

    Args:
        local: the folder.
        url: URL of its copy.
        excludes: patterns of relative names that are not uploaded, such as ``*.pth`` or ``wandb/*``.

    Attributes:
        complete: the mirror has ended, and everything is uploaded.
    """

    def __init__(self, local: Path, url: str, excludes: Sequence[str] = ()) -> None:
        self.local = local
        self.url = url
        self.complete = False
        self._excludes = tuple(excludes)
        self._filesystem: Any = open_filesystem(url)
        self._record = _Record(local)
        self._sent: dict[str, float] = {}  # when this process uploaded a file
        self._failed: dict[str, tuple[float, DataError]] = {}
        self._deadline = -math.inf  # until then, uploads to an unresponsive store are retried
        self._patience = 0.0  # seconds from a successful upload to the new deadline
        self._abandoned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="openmae-upload", daemon=True)

    def __enter__(self) -> Self:
        """Upload the status, to check that the destination can be written, and start the thread.

        Raises:
            DataError: the destination cannot be written.
        """
        if (self.local / layout.STATUS).exists():
            self._send(layout.STATUS, tries=1)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, StoppedAtOnce):
                self._stop.set()
                self._thread.join(_STOP_SECONDS)
                log.warning("Files that were not uploaded to %s yet are in %s.", redact(self.url), self.local)
                return
            self.finish(patiently=error is None)
            self._send_changed([layout.STATUS])
            if layout.STATUS in self._failed:
                raise self._failure()
            self.complete = not self._abandoned
        except (RunError, DataError) as failure:
            if error is None:
                raise
            log.error("%s", failure)

    def finish(self, *, patiently: bool = True) -> None:
        """Upload everything but the status.

        If ``patiently`` is set, wait up to ``_PATIENCE_SECONDS`` for a store that stopped responding.

        Raises:
            RunError: some files could not be uploaded; the message names them.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._patience = _PATIENCE_SECONDS if patiently else 0.0
        self._deadline = time.monotonic() + self._patience
        self._failed.clear()
        self._send_changed(name for name in self._names() if name != layout.STATUS)
        self._forget_removed()
        if self._failed:
            raise self._failure()

    def abandon(self) -> None:
        """Stop changing the copy, because another run writes to it."""
        self._abandoned = True
        self._stop.set()

    def _failure(self) -> RunError:
        names = sorted(self._failed)
        reason = self._failed[names[0]][1]
        return RunError(
            f"{listed(names)} could not be uploaded to {redact(self.url)}: {reason.problem}",
            f"{reason.fix} Everything is still in {self.local}: run the command again, or copy it from there.",
        )

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            try:
                self._send_changed(self._due())
                self._forget_removed()  # last: keeps an older checkpoint until the newer one is uploaded
            except (DataError, OSError) as error:  # OSError: a file was deleted, or the disk is full
                log.debug("Looking for files to upload: %s", error)

    def _due(self) -> list[str]:
        """Return the files to upload now. A checkpoint is accompanied by all other files, however recently sent."""
        names = self._names()
        due = [name for name in names if self._is_due(name) and self._has_changed(name)]
        if any(map(_is_checkpoint, due)):
            return [name for name in names if name in due or not _is_checkpoint(name)]
        return due

    def _has_changed(self, name: str) -> bool:
        mark = _mark(self.local / name)
        return mark is not None and self._record.marks.get(name, {}).get("mark") != mark

    def _is_due(self, name: str) -> bool:
        now = time.monotonic()
        if name in self._failed:
            return now - self._failed[name][0] > _RETRY_SECONDS
        interval = STATUS_SECONDS if name == layout.STATUS else GROWING_SECONDS
        return now - self._sent.get(name, -math.inf) > interval

    def _names(self) -> list[str]:
        """Return the files of the folder in upload order: metrics before checkpoints, links last.

        A run that resumes from the copy can drop metrics newer than its checkpoint, but cannot restore missing ones.
        """
        found = []
        for place, folders, files in os.walk(self.local):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            below = Path(place).relative_to(self.local)
            found += [(below / name).as_posix() for name in files if not name.startswith(".")]
        wanted = [name for name in found if not any(fnmatch(name, pattern) for pattern in self._excludes)]
        return sorted(wanted, key=lambda name: ((self.local / name).is_symlink(), _is_checkpoint(name), name))

    def _send_changed(self, names: Iterable[str]) -> None:
        gone: DataError | None = None  # the store does not respond, so no other file is tried
        failed: DataError | None = None
        for name in names:
            if self._abandoned:
                return
            if not self._has_changed(name):
                continue
            try:
                if gone is not None:
                    raise gone
                if failed is not None and _is_checkpoint(name):
                    raise failed  # a checkpoint must not be uploaded without its metrics
                self._send(name, tries=_TRIES)
            except DataError as error:
                failed = failed or (error if "/" not in name else None)
                if gone is None and name not in self._failed:
                    log.warning("%s could not be uploaded and will be tried again: %s", name, error.problem)
                if gone is None and _is_passing(error) and not self._responds():
                    gone = error
                self._failed[name] = (time.monotonic(), error)

    def _send(self, name: str, tries: int) -> None:
        path = self.local / name
        for attempt in itertools.count(1):
            if (mark := _mark(path)) is None:
                return
            try:
                watch = None if name == layout.STATUS else self._send_status_if_due
                version = ask(self.url, self._put(name, path, mark), limit=math.inf, watch=watch)
                self._record.keep(name, mark, version)
                break
            except DataError as error:
                if not path.exists():
                    return  # deleted while it was being read
                if not _is_passing(error) or (attempt >= tries and time.monotonic() >= self._deadline):
                    raise
                time.sleep(min(0.5 * 2 ** min(attempt - 1, 10), 5.0))
        self._sent[name] = time.monotonic()
        self._deadline = max(self._deadline, self._sent[name] + self._patience)
        self._failed.pop(name, None)

    def _responds(self) -> bool:
        """Return whether the store responds, so that the failure concerns a single file."""
        try:
            ask(self.url, self._filesystem._info(self._there(layout.STATUS)))
        except DataError as error:
            return not _is_passing(error)
        return True

    def _send_status_if_due(self) -> None:
        if not self._stop.is_set() and self._is_due(layout.STATUS):
            self._send_changed([layout.STATUS])

    async def _put(self, name: str, path: Path, mark: list[int]) -> str:
        """Upload a file and return its version; another name of an uploaded file is copied within the store."""
        there = self._there(name)
        twin = self._record.twin(name, mark)
        if twin is not None:
            await self._filesystem._cp_file(self._there(twin), there)
        else:
            options = {"max_concurrency": _PARTS_AT_ONCE} if scheme_of(self.url) == "s3" else {}
            await self._filesystem._put_file(str(path), there, chunksize=_PART, **options)
        info = await self._filesystem._info(there)
        return listed_file(name, info).version

    def _forget_removed(self) -> None:
        """Delete from the store what was deleted locally, and older files of the series that were not downloaded."""
        for name in [name for name in self._record.marks if not (self.local / name).exists()]:
            if self._abandoned:
                return
            set_aside = any(self.local.glob(f"{glob.escape(name)}.*"))  # renamed, so not deleted by rotation
            older = [other for other in self._record.left if _is_older(other, name) and not set_aside]
            for gone in (name, *older):
                try:
                    ask(self.url, self._filesystem._rm_file(self._there(gone)))
                except DataError as error:
                    if not is_missing(error):
                        log.warning("%s could not be removed: %s", gone, error.problem)
            self._record.drop(name, older)

    def _there(self, name: str) -> str:
        return self._filesystem._strip_protocol(join(self.url, name))


def pull(url: str, local: Path, wanted: Callable[[Collection[str]], Collection[str]]) -> None:
    """Update a folder from its copy in a store, before a run resumes in it.

    Local changes that were not uploaded yet are kept. Files that another run has changed or deleted in the store are
    replaced or deleted locally. ``wanted`` selects the files to download, given all names in the store.

    Raises:
        DataError: the store fails.
    """
    try:
        _pull(url, local, wanted)
    except ChangedError:
        _pull(url, local, wanted)


def _pull(url: str, local: Path, wanted: Callable[[Collection[str]], Collection[str]]) -> None:
    record = _Record(local)
    there = {file.name: file for file in list_files(url) if file.name != layout.LOCK_HOLDER}
    for name in [name for name in record.marks if name not in there]:
        (local / name).unlink(missing_ok=True)
        record.drop(name, ())
    known = {name: facts["version"] for name, facts in record.marks.items() if (local / name).is_file()}
    needed = [there[name] for name in wanted(there) if known.get(name) != there[name].version]
    for file in needed:
        (local / file.name).unlink(missing_ok=True)
    if needed:
        download(Found(url, tuple(needed), folder=True), local)
    for file in needed:
        record.keep(file.name, _mark(local / file.name) or [], file.version)
    record.leave([name for name in there if name not in record.marks])


class _Record:
    """A record of the uploaded files of a folder, stored in the folder.

    Attributes:
        marks: name -> the file's mark (see ``_mark``) when it was uploaded, and its version in the store.
        left: names in the store that were not downloaded.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / layout.UPLOAD_RECORD
        facts = parse_object(self._path.read_bytes() if self._path.exists() else b"")
        self.marks: dict[str, dict[str, Any]] = facts.get("marks", {})
        self.left: list[str] = facts.get("left", [])

    def keep(self, name: str, mark: list[int], version: str) -> None:
        self.marks[name] = {"mark": mark, "version": version}
        self._write()

    def drop(self, name: str, left: Collection[str]) -> None:
        self.marks.pop(name, None)
        self.left = [other for other in self.left if other not in left]
        self._write()

    def leave(self, names: list[str]) -> None:
        self.left = names
        self._write()

    def twin(self, name: str, mark: list[int]) -> str | None:
        """Return another uploaded name of the same file, such as a link."""
        return next((other for other, facts in self.marks.items() if other != name and facts["mark"] == mark), None)

    def _write(self) -> None:
        write_atomically(self._path, json.dumps({"marks": self.marks, "left": self.left}))


def _is_checkpoint(name: str) -> bool:
    return name.endswith(layout.WEIGHTS_SUFFIX)


def _is_passing(error: DataError) -> bool:
    return is_transient(error.__cause__ or error)


def _mark(path: Path) -> list[int] | None:
    """Return values that identify a file (for a link, its target) and change with its content; None if it is gone."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return [facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns]


def _is_older(name: str, than: str) -> bool:
    """Return whether two names differ only in their numbers, and those of the first are lower."""
    if re.split(r"\d+", name) != re.split(r"\d+", than):
        return False
    return [int(number) for number in re.findall(r"\d+", name)] < [int(number) for number in re.findall(r"\d+", than)]
