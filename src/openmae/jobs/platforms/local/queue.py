"""Who may run on this machine: jobs of one root take turns, oldest first, over GPUs or slots."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmae.errors import OpenMAEError, SpecError
from openmae.jobs.job import check_identity, moment
from openmae.jobs.processes import Identity, alive, session_of, stopped
from openmae.jobs.store import JobStore, LockHeldError, locked, read_json
from openmae.storage import layout
from openmae.storage.atomic import disk_errors, write_durably

SLOTS = "OPENMAE_JOB_SLOTS"
FOLDER = ".queue"

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class Machine:
    """What jobs share.

    Attributes:
        gpus: as CUDA_VISIBLE_DEVICES names them.
        slots: jobs without a GPU that run at once.
    """

    gpus: tuple[str, ...]
    slots: int


def this_machine() -> Machine:
    """The GPUs that CUDA_VISIBLE_DEVICES or nvidia-smi names, and OPENMAE_JOB_SLOTS slots (1).

    Raises:
        SpecError: OPENMAE_JOB_SLOTS is no number.
    """
    text = os.environ.get(SLOTS, "1")
    if not text.isdecimal() or int(text) < 1:
        raise SpecError(f"{SLOTS} must be a number of jobs, 1 or more, got {text!r}.", f"Set {SLOTS}=1.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = tuple(part.strip() for part in visible.split(",") if part.strip() not in ("", "-1"))
    else:
        gpus = _nvidia_smi()
    return Machine(gpus, int(text))


def _nvidia_smi() -> tuple[str, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    asked = [program, "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):  # the program without a driver
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip().isdecimal())


class Queue:
    """The turn-taking of one root: an entry a waiting or running job, in files.

    Args:
        store: of the jobs' records.
        machine: to share.
    """

    def __init__(self, store: JobStore, machine: Machine) -> None:
        self.folder = store.root / FOLDER
        self.machine = machine
        self._store = store

    def enter(self, job_id: str, created_at: str, gpus: int, supervisor: Identity) -> None:
        """Stand in line."""
        entry = {"id": job_id, "created_at": created_at, "gpus": gpus, "supervisor": supervisor}
        with self._locked():
            self._write(entry | {"claim": None, "process": None})

    def claim(self, job_id: str) -> list[str] | None:
        """Take what the job needs where it is its turn; the GPUs (none: a slot), or None: it has to wait.

        The oldest waiting job goes first, even where a younger one would find room. One whose supervisor is stopped
        (SIGSTOP) is left out until it continues.
        """
        try:
            return self._claim(job_id)
        except (FileNotFoundError, SpecError):  # somebody deleted the folder at this moment
            return None
        except LockHeldError as error:  # the job waits until the holder continues
            log.warning("%s", error)
            return None

    def _claim(self, job_id: str) -> list[str] | None:
        with self._locked():
            entries = [entry for entry in self._entries() if self._holds(entry)]
            waiting = [entry for entry in entries if entry["claim"] is None and not stopped(entry["supervisor"])]
            if not waiting or waiting[0]["id"] != job_id:
                if not any(entry["id"] == job_id for entry in entries):
                    self._rebuild(job_id)  # somebody removed it
                return None
            mine = waiting[0]
            running = [entry for entry in entries if entry["claim"] is not None]
            taken = {gpu for entry in running for gpu in entry["claim"]}
            free = [gpu for gpu in self.machine.gpus if gpu not in taken]
            if self.needs_gpus(mine["gpus"]):
                if len(free) < mine["gpus"]:
                    return None
                mine["claim"] = free[: mine["gpus"]]
            elif sum(not entry["claim"] for entry in running) >= self.machine.slots:
                return None
            else:
                mine["claim"] = []
            self._write(mine)
            claim: list[str] = mine["claim"]
            return claim

    def started(self, job_id: str, process: Identity) -> None:
        """Note the process, which keeps the claim even if its supervisor dies."""
        with self._locked():
            entry = self._entry(job_id)
            if entry is not None:
                self._write(entry | {"process": process})

    def leave(self, job_id: str) -> None:
        """Give back what the job had."""
        with suppress(OSError):  # a disk that is read-only now; an entry without living processes counts for nothing
            self._path(job_id).unlink(missing_ok=True)

    def needs_gpus(self, gpus: int) -> bool:
        """Whether a job takes GPUs here; without any, jobs take slots."""
        return bool(self.machine.gpus) and gpus > 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with disk_errors(self.folder):
            self.folder.mkdir(mode=0o700, exist_ok=True)
        with locked(self.folder / ".lock"):
            yield

    def _holds(self, entry: dict[str, Any]) -> bool:
        process = entry["process"]
        if alive(entry["supervisor"]) or (process and session_of(process)):
            return True
        self.leave(entry["id"])
        return False

    def _entries(self) -> list[dict[str, Any]]:
        found = [entry for path in self.folder.glob("*.json") if (entry := self._entry(path.stem)) is not None]
        return sorted(found, key=lambda entry: (moment(entry["created_at"]), entry["id"]))

    def _entry(self, job_id: str) -> dict[str, Any] | None:
        """An entry; a damaged one is made anew from the job's record, so that other jobs are not affected."""
        try:
            return _checked(read_json(self._path(job_id)), job_id)
        except FileNotFoundError:  # it has just left
            return None
        except (ValueError, OSError) as error:
            entry = self._rebuild(job_id)
            path, aside = self._path(job_id), self._path(job_id).with_suffix(".broken")
            if entry is None:
                with suppress(OSError):
                    os.replace(path, aside)
            done = f"renamed to {aside.name}" if entry is None else "made anew from the job's record"
            log.warning("The entry %s of the queue cannot be read (%s): it was %s.", path, error, done)
            return entry

    def _rebuild(self, job_id: str) -> dict[str, Any] | None:
        """An entry from a job's record; which GPUs a running one has is not in there, so it holds them all."""
        try:
            record = self._store.read(job_id)
        except OpenMAEError:
            return None
        handle = record["handle"]
        if "supervisor" not in handle:
            return None
        process = handle.get("process")
        claim = None if process is None else list(self.machine.gpus) if self.needs_gpus(record["gpus"]) else []
        entry = {"id": job_id, "created_at": record["created_at"], "gpus": record["gpus"], "process": process}
        entry |= {"supervisor": handle["supervisor"], "claim": claim}
        self._write(entry)
        return entry

    def _path(self, job_id: str) -> Path:
        return self.folder / f"{job_id}.json"

    def _write(self, entry: dict[str, Any]) -> None:
        write_durably(self._path(entry["id"]), json.dumps(entry))


def orphans(store: JobStore) -> list[tuple[str, list[int]]]:
    """Jobs whose folder was deleted while they ran, each with its living processes."""
    found = []
    for path in sorted((store.root / FOLDER).glob("*.json")):
        if os.path.lexists(store.folder(path.stem) / layout.JOB_RECORD):
            continue
        with suppress(ValueError, OSError):
            process = _checked(read_json(path), path.stem)["process"]
            if process and (pids := session_of(process)):
                found.append((path.stem, pids))
    return found


def _checked(entry: Any, job_id: str) -> dict[str, Any]:
    """Return an entry of the queue that has all its parts.

    Raises:
        ValueError: it has not; the text says which.
    """
    if not isinstance(entry, dict) or entry.get("id") != job_id:
        raise ValueError(f"it is no entry of job {job_id}")
    gpus, claim = entry.get("gpus"), entry.get("claim")
    if not isinstance(gpus, int) or not isinstance(claim, list | None):
        raise ValueError("gpus or claim is of a wrong type")
    if not isinstance(entry.get("created_at"), str):
        raise ValueError("created_at is no text")
    moment(entry["created_at"])
    check_identity("supervisor", entry.get("supervisor"))
    if entry.setdefault("process", None) is not None:
        check_identity("process", entry["process"])
    return entry
