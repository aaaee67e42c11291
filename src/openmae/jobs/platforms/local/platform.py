"""Jobs on this machine: a session of processes each, and a supervisor that outlives the client."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime

from openmae.errors import RunError, SpecError
from openmae.jobs.job import Record, moment, move, state_of
from openmae.jobs.outcome import ending
from openmae.jobs.platforms.base import Observation, inherited_environment
from openmae.jobs.platforms.local.queue import this_machine
from openmae.jobs.platforms.supervisor import grace_seconds
from openmae.jobs.processes import alive, living_sessions, signal_session, stop_session, stopped
from openmae.jobs.store import JobStore
from openmae.storage import layout
from openmae.storage.atomic import disk_errors

_PATIENCE = 60.0  # seconds until a supervisor has to have shown itself
_LAST_SIGNALS = 30.0  # seconds after the grace: SIGTERM and SIGKILL have had their time
_FRESH = 1.0  # seconds that a look at all processes is good for

log = logging.getLogger("openmae")


class LocalPlatform:
    """This machine, shared by a queue: each job has GPUs of its own, or a slot where there are none."""

    name = "local"

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self._sessions: tuple[float, set[int]] = (-_FRESH, set())

    def check(self, gpus: int, nodes: int) -> None:
        """See ``Platform``."""
        machine = this_machine()
        if nodes > 1:
            raise SpecError(f"num_nodes: local is one machine, got {nodes}.", "Use platform slurm, or one node.")
        if machine.gpus and gpus > len(machine.gpus):
            raise SpecError(
                f"gpu_count: {gpus} GPUs are asked for, but this machine shows {len(machine.gpus)}.",
                f"Ask for {len(machine.gpus)} or fewer.",
            )

    def submit(self, job_id: str, environment: Mapping[str, str]) -> None:
        """See ``Platform``."""
        with (
            disk_errors(self.store.folder(job_id) / layout.JOB_LOG),
            (self.store.folder(job_id) / layout.JOB_LOG).open("ab") as log,
        ):
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "openmae.jobs.platforms.supervisor", str(self.store.root), job_id],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**inherited_environment(), **environment},
                start_new_session=True,
            )
        # a client that lives long must not gather zombies
        threading.Thread(target=supervisor.wait, daemon=True, name=f"supervisor of {job_id}").start()
        deadline = time.monotonic() + _PATIENCE
        while "supervisor" not in self.store.read(job_id)["handle"]:
            if supervisor.poll() is not None or time.monotonic() > deadline:
                self.store.try_to_write(job_id)  # a full disk keeps its error from the log
                raise RunError(
                    f"The supervisor of job {job_id} did not start (exit code {supervisor.returncode}).",
                    f"See {self.store.folder(job_id) / layout.JOB_LOG}.",
                )
            time.sleep(0.02)

    def observe(self, record: Record) -> Observation | None:
        """See ``Platform``."""
        if record["host"] != socket.gethostname():
            return Observation("UNKNOWN", f"its processes are on {record['host']}, which this machine cannot see")
        handle = record["handle"]
        if alive(handle.get("supervisor")):
            return self._overdue(record)
        if "supervisor" not in handle:
            if alive(record["submitter"]):
                return None
            return Observation("ERROR", "the client died before the job was started")
        if "process" not in handle:
            return Observation("ERROR", "its supervisor was killed before the job was started")
        if alive(handle["process"]):
            return None
        if handle["process"]["pid"] in self._living_sessions():
            signal_session(handle["process"], signal.SIGKILL)  # its workers
        if ending(record) in ("SUCCESS", "SKIPPED"):
            return Observation("COMPLETE", "finished; its supervisor had been killed", 0)
        if record["cancel_requested"]:
            return Observation("CANCELED", "canceled; its supervisor had been killed")
        return Observation("ERROR", "its processes died with their supervisor, so that no exit code is known")

    def cancel(self, job_id: str) -> None:
        """See ``Platform``."""
        record = self.store.read(job_id)
        if record["host"] != socket.gethostname():
            return
        supervisor = record["handle"].get("supervisor")
        if stopped(supervisor):
            os.kill(supervisor["pid"], signal.SIGCONT)
            log.warning(
                "The supervisor of job %s (process %d) was stopped, as by SIGSTOP or Ctrl-Z. It was continued, so that "
                "it can end the job.",
                *(job_id, supervisor["pid"]),
            )
        try:
            with self.store.update(job_id) as record:
                if state_of(record) == "PENDING":
                    move(record, "CANCELED", "canceled before it started")
                    return
        except RunError:  # the client has told why
            record = self.store.read(job_id)
        handle = record["handle"]
        unheard = record["cancel_requested"] is None or not alive(supervisor)
        if unheard and "process" in handle:
            stop_session(handle["process"], grace_seconds())
        elif unheard and alive(supervisor):
            os.kill(supervisor["pid"], signal.SIGTERM)  # nothing but a supervisor that waits for the job's turn

    def _overdue(self, record: Record) -> Observation | None:
        """End a canceled job in place of a supervisor that has not done so long after the last signal was due."""
        if record["cancel_requested"] is None or state_of(record) != "RUNNING":
            return None
        patience = grace_seconds() + _LAST_SIGNALS
        if (datetime.now(UTC) - moment(record["cancel_requested"])).total_seconds() < patience:
            return None
        handle = record["handle"]
        with suppress(ProcessLookupError):
            os.kill(handle["supervisor"]["pid"], signal.SIGKILL)
        if "process" in handle:
            signal_session(handle["process"], signal.SIGKILL)
        log.warning(
            "The supervisor of job %s (process %d) did not respond within %g s of the cancellation. It was killed, and "
            "the job with it.",
            *(record["id"], handle["supervisor"]["pid"], patience),
        )
        return Observation("CANCELED", "canceled; its supervisor did not respond and was killed")

    def _living_sessions(self) -> set[int]:
        """As of a second ago at most: a look at all processes for each of a thousand dead jobs would take long."""
        when, found = self._sessions
        if time.monotonic() - when > _FRESH:
            found = living_sessions()
            self._sessions = (time.monotonic(), found)
        return found
