"""Jobs on this machine: a session of processes each, and a supervisor that outlives the client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

from openmae.errors import RunError, SpecError
from openmae.jobs.evidence import ending
from openmae.jobs.job import Record, move, state_of
from openmae.jobs.platforms.base import Observation
from openmae.jobs.processes import alive, signal_session, stop_session
from openmae.jobs.queue import this_machine
from openmae.jobs.store import LOG, JobStore
from openmae.jobs.supervisor import grace_seconds

_PATIENCE = 60.0  # seconds until a supervisor has to have shown itself


class LocalPlatform:
    """This machine, shared by a queue: each job has GPUs of its own, or a slot where there are none."""

    name = "local"

    def __init__(self, store: JobStore) -> None:
        self.store = store

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
        with (self.store.folder(job_id) / LOG).open("ab") as log:
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "openmae.jobs.supervisor", str(self.store.root), job_id],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        # a client that lives long must not gather zombies
        threading.Thread(target=supervisor.wait, daemon=True, name=f"supervisor of {job_id}").start()
        deadline = time.monotonic() + _PATIENCE
        while "supervisor" not in self.store.read(job_id)["handle"]:
            if supervisor.poll() is not None or time.monotonic() > deadline:
                raise RunError(
                    f"The supervisor of job {job_id} did not start (exit code {supervisor.returncode}).",
                    f"See {self.store.folder(job_id) / LOG}.",
                )
            time.sleep(0.02)

    def observe(self, record: Record) -> Observation | None:
        """See ``Platform``."""
        if record["host"] != socket.gethostname():
            return Observation("UNKNOWN", f"its processes are on {record['host']}, which this machine cannot see")
        handle = record["handle"]
        if alive(handle.get("supervisor")):
            return None
        if "supervisor" not in handle:
            if alive(record["submitter"]):
                return None
            return Observation("ERROR", "the client died before the job was started")
        if "process" not in handle:
            return Observation("ERROR", "its supervisor was killed before the job was started")
        if alive(handle["process"]):
            return None
        signal_session(handle["process"], signal.SIGKILL)  # its workers
        if ending(record) in ("SUCCESS", "SKIPPED"):
            return Observation("COMPLETE", "finished; its supervisor had been killed", 0)
        if record["cancel_requested"]:
            return Observation("CANCELED", "canceled; its supervisor had been killed")
        return Observation("ERROR", "its processes died with their supervisor, so that no exit code is known")

    def cancel(self, job_id: str) -> None:
        """See ``Platform``."""
        with self.store.update(job_id) as record:
            if state_of(record) == "PENDING":
                move(record, "CANCELED", "canceled before it started")
                return
        handle = record["handle"]
        if not alive(handle.get("supervisor")) and "process" in handle and record["host"] == socket.gethostname():
            stop_session(handle["process"], grace_seconds())
