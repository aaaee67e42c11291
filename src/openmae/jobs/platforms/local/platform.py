"""Run jobs on this machine, each in its own session, with a supervisor that outlives the client."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime

from openmae.errors import RunError, SpecError
from openmae.jobs.job import Record, parse_time
from openmae.jobs.outcome import JobOutcome, conclude_without_code
from openmae.jobs.platforms.common import (
    Fresh,
    Platform,
    before_submission,
    cancel_pending,
    grace_seconds,
    inherited_environment,
)
from openmae.jobs.platforms.local.queue import this_machine
from openmae.jobs.processes import living_sessions, signal_session, start_session, stop_session
from openmae.jobs.store import JobStore
from openmae.machine import is_running, is_stopped
from openmae.storage import layout
from openmae.storage.atomic import disk_errors

_PATIENCE = 60.0  # seconds for a supervisor to start
_LAST_SIGNALS = 30.0  # seconds after the grace period by which the supervisor must have sent SIGTERM and SIGKILL

log = logging.getLogger("openmae")


class LocalPlatform(Platform):
    """This machine. Its jobs queue for GPUs, or for slots if they use none."""

    def __init__(self, store: JobStore) -> None:
        super().__init__(store)
        self._sessions: Fresh[set[int]] = Fresh()

    def check(self, gpus: int, nodes: int) -> None:
        """Raise an error for more than one node, or more GPUs than this machine has."""
        machine = this_machine()
        if nodes > 1:
            raise SpecError(f"num_nodes: local is one machine, got {nodes}.", "Use platform slurm, or one node.")
        if machine.gpus and gpus > len(machine.gpus):
            raise SpecError(
                f"gpu_count: {gpus} GPUs are requested, but this machine has {len(machine.gpus)}.",
                f"Request {len(machine.gpus)} or fewer.",
            )

    def submit(self, job_id: str, environment: Mapping[str, str]) -> None:
        """Start the job's supervisor, and wait until it has recorded itself."""
        path = self.store.folder(job_id) / layout.JOB_LOG
        command = [sys.executable, "-m", "openmae.jobs.platforms.local.supervisor", str(self.store.root), job_id]
        with disk_errors(path):
            supervisor = start_session(command, path, environment={**inherited_environment(), **environment})
        # reap the supervisor, so that a long-lived client does not accumulate zombies
        threading.Thread(target=supervisor.wait, daemon=True, name=f"supervisor of {job_id}").start()
        deadline = time.monotonic() + _PATIENCE
        while self.store.read(job_id).handle.supervisor is None:
            if supervisor.poll() is not None or time.monotonic() > deadline:
                self.store.try_to_write(job_id)  # on a full disk the log is empty; this raises the reason
                raise RunError(
                    f"The supervisor of job {job_id} did not start (exit code {supervisor.returncode}).", f"See {path}."
                )
            time.sleep(0.02)

    def observe(self, record: Record) -> JobOutcome | None:
        """Return the outcome of a job whose supervisor is dead or does not respond."""
        if record.host != socket.gethostname():
            return JobOutcome("UNKNOWN", f"its processes are on {record.host}, which cannot be seen from this machine")
        supervisor, process = record.handle.supervisor, record.handle.process
        if is_running(supervisor):
            return self._end_overdue(record)
        if supervisor is None:
            return before_submission(record)
        if process is None:
            return JobOutcome("ERROR", "its supervisor was killed before the job was started")
        if is_running(process):
            return None
        if process["pid"] in self._sessions.get("all", living_sessions):
            signal_session(process, signal.SIGKILL)  # its workers
        report = "its supervisor was killed"
        found = conclude_without_code(record, report)
        messages = {
            "CANCELED": f"canceled; {report}",
            "ERROR": "its processes died with their supervisor; the exit code is unknown",
        }
        return found._replace(message=messages.get(found.state, found.message))

    def cancel(self, job_id: str) -> None:
        """Cancel a waiting job. A running one is stopped by its supervisor, or from here if that is not possible."""
        record = self.store.read(job_id)
        if record.host != socket.gethostname():
            return
        supervisor = record.handle.supervisor
        if supervisor is not None and is_stopped(supervisor):
            os.kill(supervisor["pid"], signal.SIGCONT)
            log.warning(
                "The supervisor of job %s (process %d) was stopped, for example by SIGSTOP or Ctrl-Z. It was continued "
                "so that it can end the job.",
                *(job_id, supervisor["pid"]),
            )
        with suppress(RunError):  # already reported by the client
            if cancel_pending(self.store, job_id):
                return
        record = self.store.read(job_id)
        if record.cancel_requested is not None and is_running(supervisor):
            return  # the supervisor finds the request in the record
        if record.handle.process is not None:
            stop_session(record.handle.process, grace_seconds())
        elif supervisor is not None and is_running(supervisor):
            os.kill(supervisor["pid"], signal.SIGTERM)  # it has not started the job yet

    def _end_overdue(self, record: Record) -> JobOutcome | None:
        """Kill a canceled job and its supervisor if the supervisor should have killed the job long ago."""
        supervisor = record.handle.supervisor
        if record.cancel_requested is None or record.state != "RUNNING" or supervisor is None:
            return None
        patience = grace_seconds() + _LAST_SIGNALS
        if (datetime.now(UTC) - parse_time(record.cancel_requested)).total_seconds() < patience:
            return None
        with suppress(ProcessLookupError):
            os.kill(supervisor["pid"], signal.SIGKILL)
        if record.handle.process is not None:
            signal_session(record.handle.process, signal.SIGKILL)
        log.warning(
            "The supervisor of job %s (process %d) did not respond within %g s of the cancellation. It was killed, and "
            "the job with it.",
            *(record.id, supervisor["pid"], patience),
        )
        return JobOutcome("CANCELED", "canceled; its supervisor did not respond and was killed")
