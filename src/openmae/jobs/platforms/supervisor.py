"""The process that stays with a local job: waits for its turn, starts it, and writes down how it ended.

``python -m openmae.jobs.platforms.supervisor ROOT JOB_ID``; the job's secrets are in the environment alone.
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

from openmae.errors import OpenMAEError, Preempted, RunError, SpecError
from openmae.jobs.job import FINAL, Record, State, move, state_of
from openmae.jobs.platforms.local.queue import Queue, this_machine
from openmae.jobs.processes import Identity, identify, signal_session
from openmae.jobs.store import JobStore
from openmae.storage import layout

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
    store.keep_reserve(job_id)
    queue = Queue(store, this_machine())
    try:
        queue.enter(job_id, record["created_at"], record["gpus"], me)
        _run(store, queue, job_id)
    except BaseException as error:
        text = error.problem if isinstance(error, OpenMAEError) else f"{type(error).__name__}: {error}"
        with suppress(OpenMAEError), store.update(job_id) as record:
            move(record, "ERROR", f"the supervisor failed: {text}")
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
    try:
        queue.started(job_id, identity)
        _open_gate(job)
        code = wait(store, job_id, job, identity)
    except BaseException:
        stop(job, identity)  # nobody would look after it
        raise
    finally:
        signal_session(identity, signal.SIGKILL)  # what a dead job leaves behind would hold its GPU
    assert code is not None  # nothing gives it up
    with suppress(SpecError), store.update(job_id) as record:  # SpecError: its folder was deleted
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
        with Path(store.folder(job_id), layout.JOB_LOG).open("ab") as log:
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
    return job, identity


def _open_gate(job: subprocess.Popen[bytes]) -> None:
    assert job.stdin is not None
    with suppress(BrokenPipeError):  # it was killed meanwhile; its exit code says so
        job.stdin.write(b"go\n")
        job.stdin.flush()
    with suppress(BrokenPipeError):
        job.stdin.close()


def wait(
    store: JobStore,
    job_id: str,
    job: subprocess.Popen[bytes],
    identity: Identity,
    given_up: Callable[[], bool] = lambda: False,
) -> int | None:
    """The exit code; None as soon as the job is ``given_up``. A cancellation is looked for when the record changes.

    A job whose record was deleted is stopped as well: nobody could see or cancel it any more.
    """
    path, seen = store.folder(job_id) / layout.JOB_RECORD, 0
    while True:
        with suppress(subprocess.TimeoutExpired):
            return job.wait(timeout=_POLL)
        if given_up():
            return None
        try:
            changed = path.stat().st_mtime_ns
            if changed == seen:
                continue
            canceled = store.read(job_id)["cancel_requested"] is not None
        except (FileNotFoundError, NotADirectoryError, SpecError):
            canceled = True
        except (OSError, RunError):  # a disk that does not answer, or a record damaged from outside: the job can go on
            continue
        seen = changed
        if canceled:
            stop(job, identity)
            return job.wait()


def stop(job: subprocess.Popen[bytes], identity: Identity) -> None:
    """Ctrl-C to a job of this process, then SIGTERM, then SIGKILL, each when the one before had its time."""
    grace = grace_seconds()
    for number, patience in ((signal.SIGINT, grace), (signal.SIGTERM, min(grace, 5.0)), (signal.SIGKILL, 10.0)):
        signal_session(identity, number)
        signal_session(identity, signal.SIGCONT)  # a stopped process hears nothing else
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
