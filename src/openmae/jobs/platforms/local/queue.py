"""The queue in which the jobs of one root wait for GPUs or slots on this machine, oldest first."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openmae.errors import OpenMAEError, SpecError
from openmae.jobs.job import Time, from_json, parse_time
from openmae.jobs.platforms.common import read_number
from openmae.jobs.processes import session_members
from openmae.jobs.store import JobStore, LockHeldError, locked, read_json
from openmae.machine import Identity, is_running, is_stopped
from openmae.storage import layout
from openmae.storage.atomic import disk_errors, write_durably

SLOTS = "OPENMAE_JOB_SLOTS"
FOLDER = ".queue"

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class Machine:
    """The resources that jobs share: GPUs, as named in CUDA_VISIBLE_DEVICES, and slots for jobs without a GPU."""

    gpus: tuple[str, ...]
    slots: int


@dataclass
class QueueEntry:
    """A waiting or running job in the queue.

    Attributes:
        created_at: Determines the position in the queue.
        gpus: Number of GPUs that the job needs.
        claim: GPUs assigned to the job; empty if it has a slot, None while it waits.
        process: Its first process, whose session keeps the claim even if the supervisor dies.
    """

    id: str
    created_at: Time
    gpus: int
    supervisor: Identity
    claim: list[str] | None = None
    process: Identity | None = None

    @classmethod
    def from_dict(cls, values: Any, job_id: str) -> QueueEntry:
        """Validate the content of a queue file and return an entry.

        Raises:
            ValueError: The file is damaged; the message has the reason.
        """
        entry: QueueEntry = from_json(values, cls, "the entry")
        if entry.id != job_id:
            raise ValueError(f"it is not an entry of job {job_id}")
        return entry


def this_machine() -> Machine:
    """Return the GPUs in CUDA_VISIBLE_DEVICES (or else of nvidia-smi), and OPENMAE_JOB_SLOTS (default: 1) slots.

    Raises:
        SpecError: OPENMAE_JOB_SLOTS is not a positive integer.
    """
    slots = read_number(SLOTS, "jobs")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = tuple(part.strip() for part in visible.split(",") if part.strip() not in ("", "-1"))
    else:
        gpus = _nvidia_smi()
    return Machine(gpus, slots)


def _nvidia_smi() -> tuple[str, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):  # installed without a driver
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip().isdecimal())


class Queue:
    """The queue of one root, with a file for each waiting or running job."""

    def __init__(self, store: JobStore, machine: Machine) -> None:
        self.folder = store.root / FOLDER
        self.machine = machine
        self._store = store

    def claim(self, job_id: str) -> list[str] | None:
        """Assign GPUs or a slot (an empty list) to a job, and return them; None if the job must wait in the queue.

        The oldest waiting job comes first, even if a later one would fit. A job whose supervisor is stopped (SIGSTOP)
        is skipped until the supervisor continues.
        """
        try:
            return self._claim(job_id)
        except (FileNotFoundError, SpecError):  # the folder has just been deleted
            return None
        except LockHeldError as error:  # keep waiting
            log.warning("%s", error)
            return None

    def _claim(self, job_id: str) -> list[str] | None:
        with self._locked():
            if not self._path(job_id).exists():  # the first call, or its file was deleted
                self._create_entry(job_id)
            entries = [entry for entry in self._entries() if self._holds(entry)]
            waiting = [entry for entry in entries if entry.claim is None and not is_stopped(entry.supervisor)]
            if not waiting or waiting[0].id != job_id:
                return None
            mine = waiting[0]
            claims = [entry.claim for entry in entries if entry.claim is not None]
            free = [gpu for gpu in self.machine.gpus if not any(gpu in claim for claim in claims)]
            if self._needs_gpus(mine.gpus):
                if len(free) < mine.gpus:
                    return None
                mine.claim = free[: mine.gpus]
            elif sum(not claim for claim in claims) >= self.machine.slots:
                return None
            else:
                mine.claim = []
            self._write(mine)
            return mine.claim

    def started(self, job_id: str, process: Identity) -> None:
        """Record the first process of a job that has started."""
        with self._locked():
            entry = self._entry(job_id)
            if entry is not None:
                entry.process = process
                self._write(entry)

    def leave(self, job_id: str) -> None:
        """Remove a job and its claim from the queue."""
        with suppress(OSError):  # if it cannot be removed, an entry without living processes has no effect
            self._path(job_id).unlink(missing_ok=True)

    def _needs_gpus(self, gpus: int) -> bool:
        return bool(self.machine.gpus) and gpus > 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with disk_errors(self.folder):
            self.folder.mkdir(mode=0o700, exist_ok=True)
        with locked(self.folder / ".lock"):
            yield

    def _holds(self, entry: QueueEntry) -> bool:
        if is_running(entry.supervisor) or (entry.process is not None and session_members(entry.process)):
            return True
        self.leave(entry.id)
        return False

    def _entries(self) -> list[QueueEntry]:
        found = [entry for path in self.folder.glob("*.json") if (entry := self._entry(path.stem)) is not None]
        return sorted(found, key=lambda entry: (parse_time(entry.created_at), entry.id))

    def _entry(self, job_id: str) -> QueueEntry | None:
        """Return an entry; a damaged one is created again from the job's record."""
        path = self._path(job_id)
        try:
            return QueueEntry.from_dict(read_json(path), job_id)
        except FileNotFoundError:  # it has just left
            return None
        except (ValueError, OSError) as error:
            entry, aside = self._create_entry(job_id), path.with_suffix(".broken")
            if entry is None:
                with suppress(OSError):
                    os.replace(path, aside)
            done = f"renamed to {aside.name}" if entry is None else "created again from the job's record"
            log.warning("The queue entry %s cannot be read (%s): it was %s.", path, error, done)
            return entry

    def _create_entry(self, job_id: str) -> QueueEntry | None:
        """Create an entry from a job's record. A running job claims all GPUs, as the record does not list its GPUs."""
        try:
            record = self._store.read(job_id)
        except OpenMAEError:
            return None
        if record.handle.supervisor is None:
            return None
        entry = QueueEntry(
            job_id, record.created_at, record.gpus, record.handle.supervisor, process=record.handle.process
        )
        if entry.process is not None:
            entry.claim = list(self.machine.gpus) if self._needs_gpus(record.gpus) else []
        self._write(entry)
        return entry

    def _path(self, job_id: str) -> Path:
        return self.folder / f"{job_id}.json"

    def _write(self, entry: QueueEntry) -> None:
        write_durably(self._path(entry.id), json.dumps(asdict(entry)))


def orphans(store: JobStore) -> list[tuple[str, list[int]]]:
    """Return the jobs whose folder was deleted while they were running, with the ids of their living processes."""
    found = []
    for path in sorted((store.root / FOLDER).glob("*.json")):
        if os.path.lexists(store.folder(path.stem) / layout.JOB_RECORD):
            continue
        with suppress(ValueError, OSError):
            process = QueueEntry.from_dict(read_json(path), path.stem).process
            if process and (pids := session_members(process)):
                found.append((path.stem, pids))
    return found
