"""A Ray cluster of one node on this machine, in a temporary folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.helpers.slurm_node import free_ports

CPUS = GPUS = 2  # the GPUs are FAKE: Ray believes what it is told
_MARK = "OPENMAE_TESTS_OF_RAY"


class Cluster:
    """A cluster that can be stopped and restarted on the same ports.

    Attributes:
        address: Address of its dashboard.
        folder: Folder that it writes to; its path is short, since it has sockets.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = free_ports(4)
        self._session = -1
        self.address = f"http://127.0.0.1:{self._ports[1]}"

    def start(self) -> None:
        """Start it, and wait until it accepts jobs.

        Raises:
            RuntimeError: It did not start in time.
        """
        port, dashboard, agent, server = self._ports
        with (self.folder / "out").open("ab") as out:
            head = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--num-cpus={CPUS}"),
                    *(
                        f"--num-gpus={GPUS}",
                        "--node-ip-address=127.0.0.1",
                        f"--port={port}",
                        f"--dashboard-port={dashboard}",
                    ),
                    *(
                        "--include-dashboard=true",
                        f"--ray-client-server-port={server}",
                        f"--dashboard-agent-listen-port={agent}",
                    ),
                    *(f"--temp-dir={self.folder}/ray", "--object-store-memory=80000000", "--disable-usage-stats"),
                ],
                stdout=out,
                stderr=out,
                env={**_plain(), "RAY_USAGE_STATS_ENABLED": "0", _MARK: str(self.folder)},
                start_new_session=True,
            )
        self._session = head.pid
        deadline = time.monotonic() + 90
        while not self._answers():
            if head.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"Ray did not start: {(self.folder / 'out').read_text()[-3000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Kill all its processes. `ray stop` would stop every cluster of this machine."""
        deadline = time.monotonic() + 20
        while ours := self._processes():
            assert time.monotonic() < deadline, f"processes of Ray do not end: {ours}"
            for pid in ours:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def _answers(self) -> bool:
        """Return whether jobs can be submitted: the dashboard responds, and so does the agent of a node."""
        try:
            with urllib.request.urlopen(f"{self.address}/api/jobs/", timeout=5) as answer:
                if answer.status != 200:
                    return False
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self._ports[2]}/api/local_raylet_healthz", timeout=5
            ) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def _processes(self) -> list[int]:
        """Return the processes of its session, and those of its jobs, which inherit a variable."""
        mark, found = f"{_MARK}={self.folder}".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                state, _, _, session = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:4]
                ours = session == str(self._session) or mark in (entry / "environ").read_bytes().split(b"\0")
                if ours and state not in "ZX":
                    found.append(int(entry.name))
        return found


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Run a cluster, and remove everything at the end."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="ray"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        one = Cluster(folder)
        stack.callback(one.stop)
        one.start()
        yield one


def _plain() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_", "CUDA_"))}
