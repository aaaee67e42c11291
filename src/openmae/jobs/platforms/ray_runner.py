"""The entry point of a job on a Ray cluster: it decrypts the environment, supervises the job, and writes its exit code.

``python -m openmae.jobs.platforms.ray_runner ROOT JOB_ID``. The job's environment is in an encrypted file in the job's
folder, since Ray shows environment variables in its dashboard and logs. OPENMAE_JOB_KEY has the key.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from cryptography.fernet import Fernet

from openmae.errors import OpenMAEError, Preempted, SpecError
from openmae.jobs.outcome import EXIT
from openmae.jobs.platforms.common import wait
from openmae.jobs.processes import signal_session, start_session
from openmae.jobs.store import JobStore
from openmae.machine import identify
from openmae.storage import layout
from openmae.storage.atomic import write_durably

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
    """Delete the environment of a job, so that it cannot start; return False if it has started already."""
    try:
        (folder / SEALED).unlink()
    except FileNotFoundError:
        return False
    return True


def main(root: str, job_id: str) -> int:
    """Run one job to its end, and return its exit code.

    When Ray's supervisor of a job dies, Ray kills the process group that it has started. But the job runs in its own
    session, as on the other platforms. So a forked second process supervises the job, and stops it if the first
    process was killed.
    """
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # not SIG_IGN, which the job would inherit
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
    """Apply the job's environment to this process; return False if the job was canceled before it started."""
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
    os.environ.pop(THREADS, None)  # Ray sets it to all CPUs of the job; the encrypted value is per process
    os.environ.update(json.loads(Fernet(os.environ.pop(KEY)).decrypt(sealed)))
    os.environ["PYTHONUNBUFFERED"] = "1"
    return True


def _run(store: JobStore, job_id: str, first: int, signals: list[int]) -> int | None:
    """Return the job's exit code, or None if the process ``first`` was killed; forward an earlier signal to the job."""
    record = store.read(job_id)
    job = start_session(record.command, store.folder(job_id) / layout.JOB_LOG, cwd=record.cwd)
    identity = identify(job.pid)
    if identity is None:
        return job.wait()
    try:
        if signals:
            signal_session(identity, signal.SIGTERM)
        return wait(store, job_id, job, identity, lambda: os.getppid() != first)
    finally:
        signal_session(identity, signal.SIGKILL)  # processes left behind by the job would keep its GPU in use


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except (OpenMAEError, OSError) as error:
        # on one line, since the last line of Ray's log is shown with the job
        print("The job could not start:", *str(error).split(), file=sys.stderr)
        sys.exit(NOT_STARTED)
