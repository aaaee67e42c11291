"""The process that runs a job of a Ray cluster: it decrypts the environment, stops the job, and writes its exit code.

``python -m openmae.jobs.platforms.ray_runner ROOT JOB_ID``. The job's environment is encrypted in a file in the job's
folder, since Ray shows what it is given in its dashboard and logs. The key is in the variable OPENMAE_JOB_KEY.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from cryptography.fernet import Fernet

from openmae.errors import OpenMAEError, Preempted, SpecError
from openmae.jobs.outcome import EXIT
from openmae.jobs.platforms.common import wait
from openmae.jobs.processes import signal_session
from openmae.jobs.store import LOG, JobStore, write_durably
from openmae.machine import identify

SEALED = "environment.sealed"
KEY, THREADS = "OPENMAE_JOB_KEY", "OMP_NUM_THREADS"
NOT_STARTED = 125
_INTERRUPTED = 130


def seal(folder: Path, environment: Mapping[str, str]) -> str:
    """Write the encrypted environment of a job, and return the key."""
    key = Fernet.generate_key()
    write_durably(folder / SEALED, Fernet(key).encrypt(json.dumps(dict(environment)).encode()).decode())
    return key.decode()


def withdraw(folder: Path) -> bool:
    """Keep a job from starting, and return whether it had not started: only one process can take the environment."""
    try:
        (folder / SEALED).unlink()
    except FileNotFoundError:
        return False
    return True


def main(root: str, job_id: str) -> int:
    """Run one job to its end, and return its exit code.

    Ray kills the process group that it started when its own part of the job dies. As on the other platforms, the job
    runs in its own session. So a second process supervises it, and ends it if the first one has been killed.
    """
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # with handlers, since a job would inherit that they are ignored
        signal.signal(number, lambda number, frame: signals.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray's processes block it
    first = os.getpid()
    second = os.fork()
    if second:
        _, status = os.waitpid(second, 0)
        return _as_shell(os.waitstatus_to_exitcode(status))
    os.setsid()
    folder = Path(root, job_id)
    if not _take_environment(folder):
        return _INTERRUPTED
    code = _run(JobStore(root), job_id, first, signals)
    if code is None:
        return NOT_STARTED
    if signals and code not in (0, Preempted.exit_code):
        code = _INTERRUPTED
    write_durably(folder / EXIT, f"{code}\n")
    return _as_shell(code)


def _as_shell(code: int) -> int:
    return code if code >= 0 else 128 - code


def _take_environment(folder: Path) -> bool:
    """Apply the job's environment to this process; return False if the job was canceled before."""
    taken = folder / f"{SEALED}.taken"
    try:
        os.rename(folder / SEALED, taken)
    except FileNotFoundError:
        if not folder.is_dir():
            raise SpecError(
                f"{folder} cannot be seen on {socket.gethostname()}.",
                "Use a root of jobs that all nodes of the Ray cluster see.",
            ) from None
        return False
    sealed = taken.read_text(encoding="utf-8")
    taken.unlink()
    os.environ.pop(THREADS, None)  # Ray sets it to all CPUs of the job; the encrypted one is for one process
    os.environ.update(json.loads(Fernet(os.environ.pop(KEY)).decrypt(sealed)))
    os.environ["PYTHONUNBUFFERED"] = "1"
    return True


def _run(store: JobStore, job_id: str, first: int, signals: list[int]) -> int | None:
    """Return the job's exit code, or None if the process ``first`` was killed; pass on a signal that came before."""
    record = store.read(job_id)
    with Path(store.folder(job_id), LOG).open("ab") as log:
        job = subprocess.Popen(
            record.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=record.cwd,
            start_new_session=True,
        )
    identity = identify(job.pid)
    if identity is None:
        return job.wait()
    try:
        if signals:
            signal_session(identity, signal.SIGTERM)
        return wait(store, job_id, job, identity, lambda: os.getppid() != first)
    finally:
        signal_session(identity, signal.SIGKILL)  # processes that the job left behind would hold its GPU


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except (OpenMAEError, OSError) as error:
        # the last line of Ray's log is shown with the job
        print("The job could not start:", *str(error).split(), file=sys.stderr)
        sys.exit(NOT_STARTED)
