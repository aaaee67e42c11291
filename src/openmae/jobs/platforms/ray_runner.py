"""The process that stays with a job that Ray has started: opens its environment, stops it, writes down its exit code.

``python -m openmae.jobs.platforms.ray_runner ROOT JOB_ID``, in an environment where OPENMAE_JOB_KEY opens the job's
own. That one is sealed in a file of the job's folder, since Ray shows what it is given in its dashboard
and logs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography.fernet import Fernet

from openmae.errors import OpenMAEError, SpecError
from openmae.jobs.outcome import EXIT
from openmae.jobs.platforms.supervisor import PREEMPTED, wait
from openmae.jobs.processes import identify, signal_session
from openmae.jobs.store import JobStore
from openmae.storage import layout
from openmae.storage.atomic import write_durably

SEALED = "environment.sealed"
KEY, THREADS = "OPENMAE_JOB_KEY", "OMP_NUM_THREADS"
NOT_BEGUN = 125
_INTERRUPTED = 130


def seal(folder: Path, environment: Mapping[str, str]) -> str:
    """Write a job's environment so that only the key, which is returned, opens it."""
    key = Fernet.generate_key()
    write_durably(folder / SEALED, Fernet(key).encrypt(json.dumps(dict(environment)).encode()).decode())
    return key.decode()


def withdraw(folder: Path) -> bool:
    """Whether a job was kept from starting: who takes its environment, here or in ``main``, has it alone."""
    try:
        (folder / SEALED).unlink()
    except FileNotFoundError:
        return False
    return True


def main(root: str, job_id: str) -> int:
    """Run one job to its end, and return its exit code.

    What Ray started is in a process group that Ray kills when its own part of the job dies. The job is in a session of
    its own, as on the other platforms, so a second process looks after it, and ends it when this one has been killed.
    """
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # by handlers: a job would inherit that they are ignored
        signal.signal(number, lambda number, frame: told.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray's processes block it
    me = os.getpid()
    keeper = os.fork()
    if keeper:
        _, status = os.waitpid(keeper, 0)
        return _as_shell(os.waitstatus_to_exitcode(status))
    os.setsid()
    folder = Path(root, job_id)
    if not _take_environment(folder):
        return _INTERRUPTED
    code = _run(JobStore(root), job_id, me, told)
    if code is None:
        return NOT_BEGUN
    if told and code not in (0, PREEMPTED):
        code = _INTERRUPTED
    write_durably(folder / EXIT, f"{code}\n")
    return _as_shell(code)


def _as_shell(code: int) -> int:
    return code if code >= 0 else 128 - code


def _take_environment(folder: Path) -> bool:
    """Make the job's environment this process's; False where it was canceled before."""
    taken = folder / f"{SEALED}.taken"
    try:
        os.rename(folder / SEALED, taken)
    except FileNotFoundError:
        if not folder.is_dir():
            raise SpecError(
                f"{folder} cannot be seen on {socket.gethostname()}.",
                "Use a root of jobs that all nodes of the Ray see.",
            ) from None
        return False
    sealed = taken.read_text(encoding="utf-8")
    taken.unlink()
    os.environ.pop(THREADS, None)  # Ray's, of all CPUs of the job; the sealed one is of a process
    os.environ.update(json.loads(Fernet(os.environ.pop(KEY)).decrypt(sealed)))
    os.environ["PYTHONUNBUFFERED"] = "1"
    return True


def _run(store: JobStore, job_id: str, parent: int, told: Sequence[int]) -> int | None:
    """The job's exit code; None where ``parent`` was killed. What was ``told`` before it began, it is told at once."""
    record = store.read(job_id)
    with Path(store.folder(job_id), layout.JOB_LOG).open("ab") as log:
        job = subprocess.Popen(
            record["command"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=record["cwd"],
            start_new_session=True,
        )
    identity = identify(job.pid)
    if not identity:
        return job.wait()
    try:
        if told:
            signal_session(identity, signal.SIGTERM)
        return wait(store, job_id, job, identity, lambda: os.getppid() != parent)
    finally:
        signal_session(identity, signal.SIGKILL)  # what a dead job leaves behind would hold its GPU


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except (OpenMAEError, OSError) as error:
        # into Ray's log, whose last line is shown with the job
        print("The job could not begin:", *str(error).split(), file=sys.stderr)
        sys.exit(NOT_BEGUN)
