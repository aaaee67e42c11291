"""A SLURM cluster of two nodes on this machine, in a temporary folder: munged, slurmctld, slurmd."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo")
NODES = ("n1", "n2")


def missing() -> str:
    """Return why no cluster can be started here; empty if it can."""
    absent = [name for name in PROGRAMS if _which(name) is None]
    if absent:
        return f"{', '.join(absent)} is not installed (Debian: slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "only root can start slurmd"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Run a cluster; yield the environment that its commands need.

    Raises:
        RuntimeError: It did not start in time.
    """
    folder.chmod(0o755)
    key, munge = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    ports = free_ports(2 + len(NODES))
    config = folder / "slurm.conf"
    config.write_text(_config(folder, munge, ports), encoding="utf-8")
    environment = {"SLURM_CONF": str(config)}
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with (folder / f"{command[0]}.out").open("ab") as out:
            program = [_which(command[0]) or command[0], *command[1:]]
            started.append(subprocess.Popen(program, stdout=out, stderr=out, env={**os.environ, **environment}))

    try:
        start(
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}"),
            *(f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"),
        )
        _until(munge.exists, "munged", folder)
        start("slurmctld", "-D", "-f", str(config))
        for node in NODES:
            start("slurmd", "-D", "-N", node, "-f", str(config))
        _until(lambda: _idle(environment) == len(NODES), "the nodes", folder)
        yield environment
        # jobs that a failed test left running would outlive the daemons
        subprocess.run(["scancel", "--partition=test"], env={**os.environ, **environment}, check=True)
        _until(lambda: _idle(environment) == len(NODES), "the end of all jobs", folder)
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
            process.wait()


def _config(folder: Path, munge: Path, ports: list[int]) -> str:
    host = socket.gethostname()
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN"
        for node, port in zip(NODES, ports[2:], strict=True)
    )
    return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={munge}
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
KillWait=1
MinJobAge=300
{nodes}
PartitionName=test Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP
"""


def _idle(environment: dict[str, str]) -> int:
    asked = ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"]
    done = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    return len(done.stdout.split())


def _until(ready: object, what: str, folder: Path) -> None:
    assert callable(ready)
    deadline = time.monotonic() + 30
    while not ready():
        if time.monotonic() > deadline:
            logs = {
                path.name: path.read_text(errors="replace")[-1500:] for path in folder.glob("*.*o*") if path.is_file()
            }
            raise RuntimeError(f"{what} did not start: {logs}")
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Return free ports of this machine."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
