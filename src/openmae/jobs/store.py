"""Store the records of jobs in a folder: one JSON file per job, replaced atomically and updated under a lock."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from openmae.errors import RunError, SpecError
from openmae.inputs import open_regular
from openmae.jobs.job import FINAL, Record, parse_time
from openmae.storage import layout
from openmae.storage.atomic import FULL, UNWRITTEN, disk_error, disk_errors, write_durably

PATIENCE = 30.0  # seconds to wait for a lock that is normally held for milliseconds
_RETRY = 0.01  # seconds
_RESERVE, _RESERVED = ".reserve", 64 * 1024  # bytes: enough for the last versions of a record
_ID = re.compile(r"[0-9a-f][0-9a-f-]*")
_LIST = "`mae jobs list` shows all jobs."

log = logging.getLogger("openmae")


class LockHeldError(RunError):
    """Another process, which is probably stopped (SIGSTOP), has held a lock for too long."""


class JobStore:
    """The records of all jobs in a folder. Several processes may use it at the same time.

    Args:
        root: A local folder. If it does not exist, it is created and is accessible only to this user.

    Raises:
        SpecError: The folder is not local or cannot be created.
        RunError: Its disk is full or faulty.
    """

    def __init__(self, root: str | Path) -> None:
        if "://" in str(root):
            raise SpecError(
                f"root: the records of jobs are kept in a local folder, got {str(root)!r}.",
                "Use a local folder as the root, and set results_dir in the spec to the remote location.",
            )
        self.root = Path(root).expanduser().absolute()
        try:
            with disk_errors(self.root, UNWRITTEN - {errno.EACCES, errno.EPERM}):
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(
                f"root: {self.root} cannot be created ({error.strerror}).", "Use a folder that you may write to."
            ) from error

    def folder(self, job_id: str) -> Path:
        """Return the folder with a job's record, spec and log."""
        return self.root / job_id

    def create(self, record: Record) -> None:
        """Write the first version of a record.

        Raises:
            RunError: The disk is full or faulty, or not writable. No part of the job is left behind.
        """
        folder = self.folder(record.id)
        with disk_errors(folder):
            folder.mkdir(mode=0o700)
        try:
            self._write(record)
        except RunError:
            self.discard(record.id)
            raise

    def discard(self, job_id: str) -> None:
        """Remove the folder of a job that was not started."""
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def read(self, job_id: str) -> Record:
        """Return the current record of a job.

        Raises:
            SpecError: There is no such job.
            RunError: The file is damaged, belongs to another job, or was written by a newer version.
        """
        path = self.folder(job_id) / layout.JOB_RECORD
        try:
            return Record.from_dict(read_json(path), job_id)
        except (FileNotFoundError, NotADirectoryError):
            raise self._no_job(job_id) from None
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            newer = "newer version" in str(reason)
            fix = "Use that version for this job." if newer else f"Restore it, or remove {path.parent}."
            raise RunError(
                f"The record {path} cannot be read ({reason}).", f"{fix} Other jobs are not affected."
            ) from error

    def find(self, text: str) -> str:
        """Return the job id that begins with ``text``.

        Raises:
            SpecError: No id, or more than one, begins with it.
        """
        if _ID.fullmatch(text) and (self.folder(text) / layout.JOB_RECORD).is_file():
            return text
        found = [job_id for job_id in self.ids() if text and job_id.startswith(text)]
        if len(found) == 1:
            return found[0]
        if found:
            raise SpecError(
                f"{len(found)} jobs begin with {text!r}: {', '.join(found[:4])}.", "Give more characters of the id."
            )
        raise self._no_job(text)

    def ids(self) -> list[str]:
        """Return the ids of all jobs, in any order.

        Raises:
            RunError: The root cannot be read.
        """
        try:
            names = os.listdir(self.root)
        except OSError as error:
            raise disk_error(error, self.root, verb="read") from error
        return [name for name in names if os.path.lexists(self.root / name / layout.JOB_RECORD)]

    def records(self) -> list[Record]:
        """Return all records, oldest first. Records that cannot be read are skipped with a warning."""
        found = []
        for job_id in self.ids():
            try:
                found.append(self.read(job_id))
            except RunError as error:
                log.warning("%s", error)
            except SpecError:  # removed a moment ago
                continue
        return sorted(found, key=lambda record: (parse_time(record.created_at), record.id))

    @contextmanager
    def update(self, job_id: str) -> Iterator[Record]:
        """Lock a record and yield it for changes, which are written if the block ends without an error.

        Raises:
            ValueError: The block has changed or removed a transition.
            SpecError: There is no such job.
            RunError: The record cannot be read or written, or another process holds its lock.
        """
        with locked(self.folder(job_id) / ".lock"):
            record = self.read(job_id)
            before = list(record.transitions)
            yield record
            if record.transitions[: len(before)] != before:
                raise ValueError(f"transitions of job {job_id} are append-only")
            self._write(record)

    def try_to_write(self, job_id: str) -> None:
        """Write a temporary file, to raise the ``RunError`` that writing a record would raise."""
        path = self.folder(job_id) / ".probe"
        write_durably(path, " " * _RESERVED)
        path.unlink(missing_ok=True)

    def keep_reserve(self, job_id: str) -> None:
        """Reserve disk space, so that the end of a job can be recorded even if the job fills the disk."""
        with suppress(OSError):
            (self.folder(job_id) / _RESERVE).write_bytes(os.urandom(_RESERVED))

    def _write(self, record: Record) -> None:
        text = json.dumps(record.to_dict(), indent=1) + "\n"
        path, reserve = self.folder(record.id) / layout.JOB_RECORD, self.folder(record.id) / _RESERVE
        try:
            write_durably(path, text)
        except RunError as error:
            full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
            if not full or not reserve.exists():
                raise
            reserve.unlink()
            write_durably(path, text)
        if record.state in FINAL:
            reserve.unlink(missing_ok=True)

    def _no_job(self, job_id: str) -> SpecError:
        return SpecError(f"There is no job {job_id!r} in {self.root}.", _LIST)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` during the block. The system releases it if this process dies.

    Raises:
        SpecError: The folder of the lock, normally that of a job, does not exist.
        RunError: Another process held the lock for ``PATIENCE`` seconds, or it cannot be created.
    """
    if not path.parent.is_dir():  # FileLock would create it
        raise SpecError(f"There is no job {path.parent.name!r}.", _LIST)
    lock = FileLock(path, timeout=PATIENCE, mode=0o600)
    try:
        with disk_errors(path):
            lock.acquire(poll_interval=_RETRY)
    except Timeout:
        raise LockHeldError(
            f"Another process has held the lock {path} for {PATIENCE:g} s.",
            f"Find it with `fuser -v {path}`. If it is stopped (state T), run `kill -CONT PID`, or kill it.",
        ) from None
    try:
        yield
    finally:
        lock.release()


def read_json(path: Path) -> Any:
    """Return the content of a small JSON file.

    Raises:
        ValueError: The file is not JSON.
        OSError: The file cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        text = file.read().decode("utf-8")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
