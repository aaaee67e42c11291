"""The supervisor of a local job: it waits in the queue, starts the job, and records its outcome.

``python -m openmae.jobs.platforms.local.supervisor ROOT JOB_ID``; the job's secrets are only in the environment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

from openmae.errors import OpenMAEError, SpecError
from openmae.jobs.job import FINAL
from openmae.jobs.outcome import conclude
from openmae.jobs.platforms.common import grace_seconds, wait
from openmae.jobs.platforms.local.queue import Queue, this_machine
from openmae.jobs.processes import signal_session, start_session, stop_session
from openmae.jobs.store import JobStore
from openmae.machine import Identity, identify
from openmae.storage import layout

_POLL = 0.1
# The process runs the command only after it has read a line, which is sent once the record contains the process. So a
# supervisor that is killed in between leaves no unrecorded process behind.
_GATE = ["/bin/sh", "-c", 'read -r go || exit 125; exec "$@" </dev/null', "job"]


def main(root: str, job_id: str) -> None:
    """Run one job to its end."""
    # background jobs of a shell ignore SIGINT, and the action would inherit this
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    store = JobStore(root)
    me = identify(os.getpid())
    assert me is not None
    with store.update(job_id) as record:
        record.handle.supervisor = me
    store.keep_reserve(job_id)
    queue = Queue(store, this_machine())
    try:
        _run(store, queue, job_id)
    except BaseException as error:
        text = error.problem if isinstance(error, OpenMAEError) else f"{type(error).__name__}: {error}"
        with suppress(OpenMAEError), store.update(job_id) as record:
            record.move("ERROR", f"the supervisor failed: {text}")
        raise
    finally:
        queue.leave(job_id)


def _run(store: JobStore, queue: Queue, job_id: str) -> None:
    while (claim := queue.claim(job_id)) is None:
        time.sleep(_POLL)
        if store.read(job_id).state in FINAL:  # canceled while it waited
            return
    started = _start(store, queue, job_id, claim)
    if started is None:
        return
    job, identity = started
    try:
        queue.started(job_id, identity)
        _open_gate(job)
        code = wait(store, job_id, job, identity)
    except BaseException:
        stop_session(identity, grace_seconds())  # the job must not run without a supervisor
        raise
    finally:
        signal_session(identity, signal.SIGKILL)  # processes left behind by the job would keep its GPU in use
    assert code is not None
    with suppress(SpecError), store.update(job_id) as record:  # SpecError: its folder was deleted
        record.move(*conclude(record, code))


def _start(
    store: JobStore, queue: Queue, job_id: str, claim: list[str]
) -> tuple[subprocess.Popen[bytes], Identity] | None:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if queue.machine.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(claim)
    with store.update(job_id) as record:
        if record.state != "PENDING":
            return None
        log = store.folder(job_id) / layout.JOB_LOG
        job = start_session([*_GATE, *record.command], log, subprocess.PIPE, cwd=record.cwd, environment=environment)
        identity = identify(job.pid)
        assert identity is not None
        record.handle.process = identity
        place = f"on GPU {', '.join(claim)}" if claim else "without a GPU"
        record.move("RUNNING", f"process {job.pid} {place}")
    return job, identity


def _open_gate(job: subprocess.Popen[bytes]) -> None:
    assert job.stdin is not None
    with suppress(BrokenPipeError):  # the process was killed; its exit code is handled later
        job.stdin.write(b"go\n")
        job.stdin.flush()
    with suppress(BrokenPipeError):
        job.stdin.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
