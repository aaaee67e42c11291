"""A local folder and its copy in an object store: uploaded as it grows, and brought back to go on from."""

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
from openmae.storage.atomic import write_atomically
from openmae.storage.download import download
from openmae.storage.filesystem import ask, is_transient, open_filesystem
from openmae.storage.listing import Found, list_files
from openmae.storage.transfer import ChangedError
from openmae.storage.urls import join, redact, scheme_of

STATUS_SECONDS = 20.0  # between two uploads of the status
GROWING_SECONDS = 30.0  # between two uploads of another file that goes on changing
_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 15.0
_PATIENCE_SECONDS = 180.0  # at the end, with a store that answers no more
_STOP_SECONDS = 5.0  # at the end, for an upload under way when a run is to stop at once
_TRIES = 5
_PART = 8 << 20  # bytes of a part of a large upload
_PARTS_AT_ONCE = 4

log = logging.getLogger("openmae")


class Mirror:
    """Uploads what appears or changes in a folder, for as long as it is entered, by a thread of its own.

    A file has its name at the destination only when it is there as a whole: an upload in one piece or in parts that
    become an object together. Files whose name begins with a dot are under way and not for others. What is removed here
    after it was uploaded is removed there. At the end everything is uploaded, the status last.

    Args:
        local: the folder.
        url: of its copy.
        excludes: patterns of relative names that are not uploaded, such as ``*.pth`` or ``wandb/*``.

    Attributes:
        complete: it has ended, and all is uploaded.
    """

    def __init__(self, local: Path, url: str, excludes: Sequence[str] = ()) -> None:
        self.local = local
        self.url = url
        self._excludes = tuple(excludes)
        self._filesystem: Any = open_filesystem(url)
        self._record = _Record(local)
        self._sent: dict[str, float] = {}  # when, in this process
        self._failed: dict[str, tuple[float, DataError]] = {}
        self._answered: float | None = None  # the store, last; None until the end: only then is it waited for
        self.complete = False
        self._abandoned = False
        self._stop = threading.Event()
        self._busy = threading.RLock()
        self._thread = threading.Thread(target=self._watch, name="openmae-upload", daemon=True)

    def __enter__(self) -> Self:
        """Upload the status, which shows that the destination can be written.

        Raises:
            DataError: it cannot.
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
                log.warning("What was not uploaded yet to %s is in %s.", redact(self.url), self.local)
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
        """Upload all but the status.

        Args:
            patiently: wait some minutes for a store that answers no more.

        Raises:
            RunError: something could not be uploaded; the text names it.
        """
        self._halt()
        self._answered = time.monotonic() if patiently else None
        with self._busy:
            self._failed.clear()
            self._send_changed(name for name in self._names() if name != layout.STATUS)
            self._forget_removed()
        if self._failed:
            raise self._failure()

    def abandon(self) -> None:
        """Change nothing there any more: another run writes to it."""
        self._abandoned = True
        self._stop.set()

    def _failure(self) -> RunError:
        names = sorted(self._failed)
        reason = self._failed[names[0]][1]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return RunError(
            f"{', '.join(names[:3])}{more} could not be uploaded to {redact(self.url)}: {reason.problem}",
            f"{reason.fix} Everything is still in {self.local}: run the command again, or copy it from there.",
        )

    def _halt(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            with self._busy:
                try:
                    self._send_changed(self._due())
                    self._forget_removed()  # afterwards: an older checkpoint stays until the newer one is there
                except DataError as error:
                    log.debug("%s", error)
                except OSError as error:  # a file that went away, a disk that is full: the next look sees
                    log.debug("Looking for files to upload: %s", error)

    def _due(self) -> list[str]:
        """What to upload now; with a checkpoint, whatever else has changed as well, however short ago it was sent."""
        names = self._names()
        due = [name for name in names if self._is_due(name) and self._has_changed(name)]
        if any(name.endswith(layout.WEIGHTS_SUFFIX) for name in due):
            return [name for name in names if name in due or not name.endswith(layout.WEIGHTS_SUFFIX)]
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
        """The files of the folder in the order of their upload: the rows of a checkpoint before it, links last.

        Who resumes from the copy drops rows that are newer than its checkpoint; rows that are missing stay missing.
        """
        found = []
        for place, folders, files in os.walk(self.local):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            below = Path(place).relative_to(self.local).as_posix()
            found += [name if below == "." else f"{below}/{name}" for name in files if not name.startswith(".")]
        wanted = [name for name in found if not any(fnmatch(name, pattern) for pattern in self._excludes)]
        return sorted(
            wanted,
            key=lambda name: ((self.local / name).is_symlink(), bool(name.endswith(layout.WEIGHTS_SUFFIX)), name),
        )

    def _send_changed(self, names: Iterable[str]) -> None:
        gone: DataError | None = None  # the store answers no more: no other file is tried
        failed: DataError | None = None
        for name in names:
            if self._abandoned:
                return
            if not self._has_changed(name):
                continue
            try:
                if gone is not None:
                    raise gone
                if failed is not None and name.endswith(layout.WEIGHTS_SUFFIX):
                    raise failed  # a checkpoint must not be there without its rows
                self._send(name, tries=_TRIES)
            except DataError as error:
                failed = failed or (error if "/" not in name else None)
                if gone is None and name not in self._failed:
                    log.warning("%s was not uploaded, and is tried again: %s", name, error.problem)
                if gone is None and _is_passing(error) and not self._answers():
                    gone = error
                self._failed[name] = (time.monotonic(), error)

    def _send(self, name: str, tries: int) -> None:
        """Upload one file.

        Raises:
            DataError: that failed.
        """
        path = self.local / name
        for attempt in itertools.count():
            if (mark := _mark(path)) is None:
                return
            try:
                watch = None if name == layout.STATUS else self._send_status_if_due
                version = ask(self.url, self._put(name, path, mark), limit=math.inf, watch=watch)
                self._record.keep(name, mark, version)
                break
            except DataError as error:
                if not path.exists():
                    return  # removed while it was read
                waits = self._answered is not None and time.monotonic() < self._answered + _PATIENCE_SECONDS
                if not _is_passing(error) or (attempt + 1 >= tries and not waits):
                    raise
                time.sleep(min(0.5 * 2 ** min(attempt, 10), 5.0))
        self._sent[name] = time.monotonic()
        if self._answered is not None:
            self._answered = self._sent[name]
        self._failed.pop(name, None)

    def _answers(self) -> bool:
        """Whether the store does, or it is but one file that fails."""
        try:
            ask(self.url, self._filesystem._info(self._there(layout.STATUS)))
        except DataError as error:
            return not _is_passing(error)
        return True

    def _send_status_if_due(self) -> None:
        """Called while a large file is on its way."""
        mark = _mark(self.local / layout.STATUS)
        if self._stop.is_set() or mark is None or not self._is_due(layout.STATUS):
            return
        if self._record.marks.get(layout.STATUS, {}).get("mark") != mark:
            self._send_changed([layout.STATUS])

    async def _put(self, name: str, path: Path, mark: list[int]) -> str:
        """Upload a file and return its version there; a second name of what is there already is copied by the store."""
        there = self._there(name)
        twin = self._record.twin(name, mark)
        if twin is not None:
            await self._filesystem._cp_file(self._there(twin), there)
        else:
            options = {"max_concurrency": _PARTS_AT_ONCE} if scheme_of(self.url) == "s3" else {}
            await self._filesystem._put_file(str(path), there, chunksize=_PART, **options)
        info = await self._filesystem._info(there)
        return str(info.get("ETag") or info.get("etag") or info.get("mtime") or "").strip('"')

    def _forget_removed(self) -> None:
        """Remove there what was removed here, and what is older of its series: a resumed run has not seen that."""
        for name in [name for name in self._record.marks if not (self.local / name).exists()]:
            if self._abandoned:
                return
            set_aside = any(self.local.glob(f"{glob.escape(name)}.*"))  # renamed, not rotated away
            older = [other for other in self._record.left if _is_older(other, name) and not set_aside]
            for gone in (name, *older):
                try:
                    ask(self.url, self._filesystem._rm_file(self._there(gone)))
                except DataError as error:
                    if not isinstance(error.__cause__, FileNotFoundError):
                        log.warning("%s could not be removed: %s", gone, error.problem)
            self._record.drop(name, older)

    def _there(self, name: str) -> str:
        return self._filesystem._strip_protocol(join(self.url, name))


def pull(url: str, local: Path, wanted: Callable[[Collection[str]], Collection[str]]) -> None:
    """Bring a folder up to date with its copy in a store, before a run goes on in it.

    What was written here and not uploaded yet stays. What somebody else has changed there since replaces what is here.

    Args:
        url: of the copy.
        local: the folder.
        wanted: which of the names there are needed.

    Raises:
        DataError: the store fails.
    """
    for last in (False, True):
        try:
            return _pull(url, local, wanted)
        except ChangedError:
            if last:
                raise
    return None


def _pull(url: str, local: Path, wanted: Callable[[Collection[str]], Collection[str]]) -> None:
    record, there = _Record(local), {file.name: file for file in list_files(url) if file.name != layout.LOCK_HOLDER}
    for name in [name for name in record.marks if name not in there]:
        (local / name).unlink(missing_ok=True)
        record.drop(name, ())
    chosen = [there[name] for name in wanted(there)]
    known = {name: facts["version"] for name, facts in record.marks.items() if (local / name).is_file()}
    missing = [file for file in chosen if known.get(file.name) != file.version]
    for file in missing:
        (local / file.name).unlink(missing_ok=True)
    if missing:
        download(Found(url, tuple(missing), folder=True), local)
    for file in missing:
        record.keep(file.name, _mark(local / file.name) or [], file.version)
    record.leave([name for name in there if name not in record.marks])


class _Record:
    """What of a folder is at its destination, in a file of the folder.

    Attributes:
        marks: name -> what the file looked like when it was uploaded, and its version there.
        left: names there that were not brought here.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / layout.UPLOAD_RECORD
        try:
            facts = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            facts = {}
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
        """Another name of the very same file, which is uploaded."""
        same = (other for other, facts in self.marks.items() if other != name and facts["mark"] == mark)
        return next(same, None)

    def _write(self) -> None:
        write_atomically(self._path, json.dumps({"marks": self.marks, "left": self.left}))


def _is_passing(error: DataError) -> bool:
    return is_transient(error.__cause__ or error)


def _mark(path: Path) -> list[int] | None:
    """What tells a file and its content from others: of a link, those of its target; None where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return [facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns]


def _is_older(name: str, than: str) -> bool:
    """Whether two names differ in their numbers alone, and the first has the lower ones."""
    if re.split(r"\d+", name) != re.split(r"\d+", than):
        return False
    return [int(number) for number in re.findall(r"\d+", name)] < [int(number) for number in re.findall(r"\d+", than)]
