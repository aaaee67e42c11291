"""Records of jobs: one JSON file each, whole or not at all, changed under a lock that dies with its holder."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from openmae.errors import RunError, SpecError
from openmae.jobs.job import FINAL, Record, checked, moment, state_of
from openmae.storage import layout
from openmae.storage.atomic import FULL, UNWRITTEN, disk_error, disk_errors, write_durably

try:
    import fcntl
except ImportError:  # Windows, and some sandboxes
    fcntl = None  # type: ignore[assignment]

PATIENCE = 30.0  # seconds for a lock that is held for milliseconds
_TURN = 0.01  # seconds between two tries
_RESERVE, _RESERVED = ".reserve", 64 * 1024  # bytes: a few versions of a record
_ID = re.compile(r"[0-9a-f][0-9a-f-]*")

log = logging.getLogger("openmae")


class LockHeldError(RunError):
    """Another process, which is probably stopped, keeps a lock that is held for milliseconds otherwise."""


class JobStore:
    """The jobs below a folder, which any number of processes may use at once.

    Args:
        root: a local folder, created when it does not exist; nobody else may read it.

    Raises:
        SpecError: the folder cannot be made, or is not local.
        RunError: its disk is full or faulty.
    """

    def __init__(self, root: str | Path) -> None:
        if "://" in str(root):
            raise SpecError(
                f"root: the records of jobs are kept in a local folder, got {str(root)!r}.",
                "Give a local root; set results_dir in the spec to a remote place.",
            )
        self.root = Path(root).expanduser().absolute()
        try:
            with disk_errors(self.root, UNWRITTEN - {errno.EACCES, errno.EPERM}):
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(
                f"root: {self.root} cannot be made ({error.strerror}).", "Name a folder that you may write to."
            ) from error

    def folder(self, job_id: str) -> Path:
        """Of a job's record, spec and log."""
        return self.root / job_id

    def create(self, record: Record) -> None:
        """Write the first version of a record; a folder without one is no job.

        Raises:
            RunError: the disk is full or faulty, or the user may not write there; nothing is left of the job.
        """
        folder = self.folder(record["id"])
        with disk_errors(folder):
            folder.mkdir(mode=0o700)
        try:
            self._write(record)
        except RunError:
            self.discard(record["id"])
            raise

    def discard(self, job_id: str) -> None:
        """Remove what a job that was not started has in the root."""
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def read(self, job_id: str) -> Record:
        """A record as it is now.

        Raises:
            SpecError: there is no such job.
            RunError: the file is damaged, belongs to another job, or was written by a newer version.
        """
        path = self.folder(job_id) / layout.JOB_RECORD
        if not _ID.fullmatch(job_id) or not path.parent.is_dir() or not os.path.lexists(path):
            raise SpecError(f"There is no job {job_id!r} in {self.root}.", "`mae jobs list` shows all jobs.")
        try:
            return checked(read_json(path), job_id)
        except FileNotFoundError:  # removed a moment ago
            raise SpecError(f"There is no job {job_id!r} in {self.root}.", "`mae jobs list` shows all jobs.") from None
        except (ValueError, OSError) as error:
            newer = "Use that version for this job. Other jobs are not affected."
            other = f"Restore it, or remove {path.parent}. Other jobs are not affected."
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise RunError(
                f"The record {path} cannot be read ({reason}).", newer if "newer version" in str(error) else other
            ) from error

    def find(self, text: str) -> str:
        """The id that ``text`` begins.

        Raises:
            SpecError: none or several begin with it.
        """
        if _ID.fullmatch(text) and (self.folder(text) / layout.JOB_RECORD).is_file():
            return text
        found = [job_id for job_id in self.ids() if text and job_id.startswith(text)]
        if len(found) == 1:
            return found[0]
        if found:
            raise SpecError(f"{len(found)} jobs begin with {text!r}: {', '.join(found[:4])}.", "Give more of the id.")
        raise SpecError(f"There is no job {text!r} in {self.root}.", "`mae jobs list` shows all jobs.")

    def ids(self) -> list[str]:
        """All jobs, in no order.

        Raises:
            RunError: the root cannot be read.
        """
        try:
            names = os.listdir(self.root)
        except OSError as error:
            raise disk_error(error, self.root, verb="read") from error
        return [name for name in names if os.path.lexists(self.root / name / layout.JOB_RECORD)]

    def records(self) -> list[Record]:
        """All records, oldest first; one that cannot be read is left out with a warning that names it."""
        found = []
        for job_id in self.ids():
            if not _ID.fullmatch(job_id):
                log.warning("%s is no job: the name of its folder is no id.", self.folder(job_id) / layout.JOB_RECORD)
                continue
            try:
                found.append(self.read(job_id))
            except RunError as error:
                log.warning("%s", error)
            except SpecError:  # removed a moment ago
                continue
        return sorted(found, key=lambda record: (moment(record["created_at"]), record["id"]))

    @contextmanager
    def update(self, job_id: str) -> Iterator[Record]:
        """Give a record to change, alone; it is on the disk when the block ends without an error.

        Raises:
            ValueError: a transition was changed or removed.
            SpecError: there is no such job.
            RunError: the record cannot be read or written, or another process keeps its lock.
        """
        with locked(self.folder(job_id) / ".lock"):
            record = self.read(job_id)
            before = json.dumps(record["transitions"])
            count = len(record["transitions"])
            yield record
            if json.dumps(record["transitions"][:count]) != before:
                raise ValueError(f"transitions of job {job_id} are append-only")
            self._write(record)

    def try_to_write(self, job_id: str) -> None:
        """Raise the ``RunError`` that writing a record would raise."""
        path = self.folder(job_id) / ".probe"
        write_durably(path, " " * _RESERVED)
        path.unlink(missing_ok=True)

    def keep_reserve(self, job_id: str) -> None:
        """Set aside the space for a job's last records: one that fills the disk can still be canceled and concluded."""
        with suppress(OSError):
            (self.folder(job_id) / _RESERVE).write_bytes(os.urandom(_RESERVED))

    def _write(self, record: Record) -> None:
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        path, reserve = self.folder(record["id"]) / layout.JOB_RECORD, self.folder(record["id"]) / _RESERVE
        try:
            write_durably(path, text)
        except RunError as error:
            full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
            if not full or not reserve.exists():
                raise
            reserve.unlink()
            write_durably(path, text)
        if state_of(record) in FINAL:
            reserve.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; the kernel frees it when the holder dies, however it dies.

    Raises:
        SpecError: its folder is not there.
        RunError: another process holds it for longer than ``PATIENCE`` seconds, or it cannot be made.
    """
    try:
        with disk_errors(path):
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise SpecError(f"There is no job {path.parent.name!r}.", "`mae jobs list` shows all jobs.") from None
    try:
        if fcntl is None:
            with FileLock(f"{path}.file"):
                yield
            return
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LockHeldError(
                        f"Another process has held the lock {path} for {PATIENCE:g} s.",
                        f"See which one with `fuser -v {path}`. If it is stopped (state T), continue it with "
                        "`kill -CONT PID`, or end it.",
                    ) from None
                time.sleep(_TURN)
        yield
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """The content of a small JSON file.

    Raises:
        ValueError: it is no regular file, or no JSON.
        OSError: it cannot be read.
    """
    if not path.is_file():
        path.stat()
        raise ValueError("it is no regular file")  # a pipe would never end
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")
