"""Records of jobs: one JSON file each, whole or not at all, changed under a lock that dies with its holder."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from openmae.errors import RunError, SpecError
from openmae.jobs.job import Record

try:
    import fcntl
except ImportError:  # Windows, and some sandboxes
    fcntl = None  # type: ignore[assignment]

RECORD, SPEC, LOG = "job.json", "spec.yaml", "log.txt"
_ID = re.compile(r"[0-9a-f][0-9a-f-]*")

log = logging.getLogger("openmae")


class JobStore:
    """The jobs below a folder, which any number of processes may use at once.

    Args:
        root: a local folder, created when it does not exist; nobody else may read it.

    Raises:
        SpecError: the folder cannot be made, or is not local.
    """

    def __init__(self, root: str | Path) -> None:
        if "://" in str(root):
            raise SpecError(
                f"root: the records of jobs are kept in a local folder, got {str(root)!r}.",
                "Give a local root; set results_dir in the spec to a remote place.",
            )
        self.root = Path(root).expanduser().absolute()
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(
                f"root: {self.root} cannot be made ({error.strerror}).", "Name a folder that you may write to."
            ) from error

    def folder(self, job_id: str) -> Path:
        """Of a job's record, spec and log."""
        return self.root / job_id

    def create(self, record: Record) -> None:
        """Write the first version of a record; a folder without one is no job."""
        self.folder(record["id"]).mkdir(mode=0o700)
        self._write(record)

    def read(self, job_id: str) -> Record:
        """A record as it is now.

        Raises:
            SpecError: there is no such job.
            RunError: the file was damaged from outside.
        """
        path = self.folder(job_id) / RECORD
        try:
            if not _ID.fullmatch(job_id):
                raise FileNotFoundError
            record: Record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SpecError(f"There is no job {job_id!r} in {self.root}.", "`mae jobs list` shows all jobs.") from None
        except (ValueError, OSError) as error:
            raise RunError(
                f"The record {path} cannot be read ({error}).", f"Restore it, or remove {path.parent}."
            ) from error
        return record

    def find(self, text: str) -> str:
        """The id that ``text`` begins.

        Raises:
            SpecError: none or several begin with it.
        """
        if _ID.fullmatch(text) and (self.folder(text) / RECORD).is_file():
            return text
        found = [job_id for job_id in self.ids() if text and job_id.startswith(text)]
        if len(found) == 1:
            return found[0]
        if found:
            raise SpecError(f"{len(found)} jobs begin with {text!r}: {', '.join(found[:4])}.", "Give more of the id.")
        raise SpecError(f"There is no job {text!r} in {self.root}.", "`mae jobs list` shows all jobs.")

    def ids(self) -> list[str]:
        """All jobs, in no order."""
        return [path.parent.name for path in self.root.glob(f"*/{RECORD}")]

    def records(self) -> list[Record]:
        """All records, oldest first; one that is damaged is left out with a warning."""
        found = []
        for job_id in self.ids():
            try:
                found.append(self.read(job_id))
            except (RunError, SpecError) as error:  # SpecError: removed by hand a moment ago
                log.warning("%s", error)
        return sorted(found, key=lambda record: (record["created_at"], record["id"]))

    @contextmanager
    def update(self, job_id: str) -> Iterator[Record]:
        """Give a record to change, alone; it is on the disk when the block ends without an error.

        Raises:
            ValueError: a transition was changed or removed.
        """
        with locked(self.folder(job_id) / ".lock"):
            record = self.read(job_id)
            before = json.dumps(record["transitions"])
            count = len(record["transitions"])
            yield record
            if json.dumps(record["transitions"][:count]) != before:
                raise ValueError(f"transitions of job {job_id} are append-only")
            self._write(record)

    def _write(self, record: Record) -> None:
        text = json.dumps(record, indent=1, allow_nan=False)
        write_durably(self.folder(record["id"]) / RECORD, text + "\n")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; the kernel frees it when the holder dies, however it dies."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise SpecError(f"There is no job {path.parent.name!r}.", "`mae jobs list` shows all jobs.") from None
    try:
        if fcntl is None:
            with FileLock(f"{path}.file"):
                yield
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write ``path`` so that it is there whole after a power cut; only the user may read it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
