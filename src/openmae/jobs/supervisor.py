"""The process that stays with a local job: waits for its turn, starts it, and writes down how it ended.

``python -m openmae.jobs.supervisor ROOT JOB_ID``; the job's secrets are in the environment alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from openmae.errors import Preempted
from openmae.jobs.job import FINAL, Record, State, move, state_of
from openmae.jobs.processes import Identity, identify, signal_session
from openmae.jobs.queue import Queue, this_machine
from openmae.jobs.store import LOG, RECORD, JobStore

PREEMPTED = Preempted.exit_code
GRACE = "OPENMAE_JOB_GRACE"  # seconds from Ctrl-C to SIGTERM
_POLL = 0.1
# The job begins only when a line arrives, and that is sent when its record says RUNNING: a supervisor killed in between
# leaves no process that nobody knows.
_GATE = ["/bin/sh", "-c", 'read -r go || exit 125; exec "$@" </dev/null', "job"]


def main(root: str, job_id: str) -> None:
    """Supervise one job to its end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it, and so would the action
    store = JobStore(root)
    me = identify(os.getpid())
    assert me is not None
    with store.update(job_id) as record:
        record["handle"]["supervisor"] = me
    queue = Queue(store.root, this_machine())
    queue.enter(job_id, record["created_at"], record["gpus"], me)
    try:
        _run(store, queue, job_id)
    except BaseException as error:
        with store.update(job_id) as record:
            move(record, "ERROR", f"the supervisor failed: {type(error).__name__}: {error}")
        raise
    finally:
        queue.leave(job_id)


def grace_seconds() -> float:
    """How long a job may take to write its checkpoint after a cancellation: OPENMAE_JOB_GRACE, else 60."""
    return float(os.environ.get(GRACE, "60"))


def conclude(record: Record, code: int) -> tuple[State, str]:
    """The state and the message of a job whose process ended with ``code`` (minus a signal's number)."""
    if code == 0:
        return "COMPLETE", "finished"
    how = f"ended by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
    if record["cancel_requested"]:
        return "CANCELED", f"canceled ({how})"
    if code in (130, -signal.SIGINT):
        return "CANCELED", f"interrupted from outside ({how})"
    if code == PREEMPTED:
        same = f"a request with results_dir={record['results_dir']}"
        return "CANCELED", f"preempted: {same} goes on from its checkpoint ({how})"
    meaning = {1: "the run failed", 2: "the request was wrong"}.get(code, "it failed")
    return "ERROR", f"{meaning} ({how})"


def _run(store: JobStore, queue: Queue, job_id: str) -> None:
    claim = queue.claim(job_id)
    while claim is None:
        time.sleep(_POLL)
        if state_of(store.read(job_id)) in FINAL:  # canceled while it waited
            return
        claim = queue.claim(job_id)
    started = _start(store, queue, job_id, claim)
    if started is None:
        return
    job, identity = started
    code = wait(store, job_id, job, identity)
    assert code is not None  # nothing gives it up
    signal_session(identity, signal.SIGKILL)  # what a dead job leaves behind would hold its GPU
    with store.update(job_id) as record:
        state, message = conclude(record, code)
        move(record, state, message, code)


def _start(
    store: JobStore, queue: Queue, job_id: str, claim: list[str]
) -> tuple[subprocess.Popen[bytes], Identity] | None:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if queue.machine.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(claim)
    with store.update(job_id) as record:
        if state_of(record) != "PENDING":
            return None
        with Path(store.folder(job_id), LOG).open("ab") as log:
            job = subprocess.Popen(
                [*_GATE, *record["command"]],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=record["cwd"],
                env=environment,
                start_new_session=True,
            )
        identity = identify(job.pid)
        assert identity is not None
        record["handle"]["process"] = identity
        place = f"on GPU {', '.join(claim)}" if claim else "without a GPU"
        move(record, "RUNNING", f"process {job.pid} {place}")
    queue.started(job_id, identity)
    assert job.stdin is not None
    with suppress(BrokenPipeError):  # it was killed meanwhile; its exit code says so
        job.stdin.write(b"go\n")
        job.stdin.flush()
    with suppress(BrokenPipeError):
        job.stdin.close()
    return job, identity


def wait(
    store: JobStore,
    job_id: str,
    job: subprocess.Popen[bytes],
    identity: Identity,
    given_up: Callable[[], bool] = lambda: False,
) -> int | None:
    """The exit code; None as soon as the job is ``given_up``. A cancellation is looked for when the record changes."""
    path, seen = store.folder(job_id) / RECORD, 0
    while True:
        with suppress(subprocess.TimeoutExpired):
            return job.wait(timeout=_POLL)
        if given_up():
            return None
        changed = path.stat().st_mtime_ns
        if changed != seen:
            seen = changed
            if store.read(job_id)["cancel_requested"]:
                stop(job, identity)
                return job.wait()


def stop(job: subprocess.Popen[bytes], identity: Identity) -> None:
    """Ctrl-C to a job of this process, then SIGTERM, then SIGKILL, each when the one before had its time."""
    grace = grace_seconds()
    for number, patience in ((signal.SIGINT, grace), (signal.SIGTERM, min(grace, 5.0)), (signal.SIGKILL, 10.0)):
        signal_session(identity, number)
        try:
            job.wait(timeout=patience)
            return
        except subprocess.TimeoutExpired:
            continue


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    main(*sys.argv[1:])
