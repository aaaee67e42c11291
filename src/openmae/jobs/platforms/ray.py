"""Run jobs on a Ray cluster, through its job API. The jobs' root and the data must be visible on all nodes.

RAY_API_SERVER_ADDRESS or RAY_ADDRESS selects the cluster. The entry point of a job is
``openmae.jobs.platforms.ray_runner``; Ray queues it until its CPUs and GPUs are free.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from openmae.errors import RunError, SpecError
from openmae.jobs.job import Record
from openmae.jobs.outcome import JobOutcome, conclude, conclude_without_code, read_exit_code, signal_as_minus
from openmae.jobs.platforms.common import (
    Fresh,
    Platform,
    before_submission,
    cancel_pending,
    cluster_name,
    grace_seconds,
    inherited_environment,
    read_number,
)
from openmae.jobs.platforms.ray_runner import KEY, THREADS, seal, withdraw
from openmae.jobs.store import JobStore

CPUS = "OPENMAE_JOB_CPUS"  # CPUs that Ray reserves for each process of a job
_DEFAULT = "http://127.0.0.1:8265"
_OF_THE_NODE = ("RAY_", "CUDA_VISIBLE_DEVICES")  # variables that Ray sets on the node, so not taken from the client
_PATIENCE = 30.0  # seconds for Ray to answer
_LAST_SECONDS = 5.0  # time for a job's processes to write an exit code after Ray has reported its end

_Answer = TypeVar("_Answer")


class RayPlatform(Platform):
    """A Ray cluster whose dashboard can be reached from this machine."""

    def __init__(self, store: JobStore) -> None:
        try:
            import ray.job_submission
        except ImportError as error:
            raise SpecError("platform: ray needs the package ray.", "pip install 'openmae[ray]'") from error
        super().__init__(store)
        self._make: Callable[[str], Any] = ray.job_submission.JobSubmissionClient
        self._connection: Any = None
        self._answers: Fresh[Any] = Fresh()

    def check(self, gpus: int, nodes: int) -> None:
        """Raise an error for more than one node, or more GPUs than the largest node has."""
        if nodes > 1:
            raise SpecError(
                f"num_nodes: a Ray job runs on one node of the cluster, got {nodes}.",
                "Use one node with more GPUs, or platform slurm.",
            )
        _, most = self._largest()
        if most and gpus > most:
            raise SpecError(
                f"gpu_count: {gpus} GPUs are requested, but the largest node of the Ray cluster has {most}.",
                f"Request {most} or fewer.",
            )
        read_number(CPUS, "CPUs")

    def submit(self, job_id: str, environment: Mapping[str, str]) -> None:
        """Encrypt the job's environment and submit the job."""
        record, folder = self.store.read(job_id), self.store.folder(job_id)
        most_cpus, most_gpus = self._largest()
        cpus = read_number(CPUS, "CPUs") * record.processes
        cpus = min(cpus, most_cpus or cpus)  # a job runs on one node
        gpus = record.gpus if most_gpus else 0
        own = {THREADS: str(max(1, cpus // record.processes))} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
        if record.is_search:  # a search itself needs no resources: its trials are separate jobs
            cpus, own = 0, {"CUDA_VISIBLE_DEVICES": ""}
        given = {name: value for name, value in inherited_environment().items() if not name.startswith(_OF_THE_NODE)}
        key = seal(folder, own | given | dict(environment))
        command = [sys.executable, "-m", "openmae.jobs.platforms.ray_runner", str(self.store.root), job_id]
        try:
            self._ask(
                lambda ray: ray.submit_job(
                    entrypoint=f"exec {shlex.join(command)}",
                    submission_id=cluster_name(job_id),
                    entrypoint_num_cpus=cpus,
                    entrypoint_num_gpus=gpus,
                    # so that training can write a checkpoint after `ray job stop`
                    runtime_env={"env_vars": {KEY: key, "RAY_JOB_STOP_WAIT_TIME_S": str(grace_seconds() + 5)}},
                )
            )
        except RunError:
            withdraw(folder)
            raise
        with self.store.update(job_id) as record:
            record.handle.ray = _address()

    def observe(self, record: Record) -> JobOutcome | None:
        """Return the outcome from the exit code, else the state in Ray."""
        code = read_exit_code(self.store.folder(record.id))
        if code is not None:
            return conclude(record, code)
        details = self._details(record.id)
        if details is None:
            return self._conclude_unknown(record)
        report = f"Ray job {cluster_name(record.id)}: {details.status.value}"
        if details.status.value == "PENDING":
            return JobOutcome("PENDING", report)
        if details.status.value == "RUNNING":
            return JobOutcome("RUNNING", report)
        return self._conclude(record, details, report)

    def cancel(self, job_id: str) -> None:
        """Cancel a waiting job. The runner of a running job finds the request in the record."""
        if not withdraw(self.store.folder(job_id)):
            return
        cancel_pending(self.store, job_id)
        with suppress(RunError):  # if Ray starts the job later, it ends at once
            self._ask(lambda ray: ray.stop_job(cluster_name(job_id)))

    def _conclude(self, record: Record, details: Any, report: str) -> JobOutcome | None:
        """Return the outcome of a job that has ended in Ray, perhaps without writing its exit code."""
        folder = self.store.folder(record.id)
        withdraw(folder)
        code = read_exit_code(folder)
        if code is None and details.driver_exit_code is not None:
            code = signal_as_minus(details.driver_exit_code)
        lines = [line for line in (details.message or "").splitlines() if line.strip()]
        if code is not None:
            outcome = conclude(record, code)
            return outcome._replace(
                message=f"{outcome.message}; {report}" + (f": {lines[-1]}" if lines and code else "")
            )
        if time.time() < (details.end_time or 0) / 1000 + _LAST_SECONDS:
            return None
        found = conclude_without_code(record, report, stopped=details.status.value == "STOPPED")
        return found._replace(message=f"{report}: {lines[0]}") if lines and found.state != "COMPLETE" else found

    def _conclude_unknown(self, record: Record) -> JobOutcome | None:
        submitted_to = record.handle.ray
        if submitted_to is None:
            return before_submission(record, "submitted to Ray")
        if submitted_to != _address():
            return JobOutcome("UNKNOWN", f"it was submitted to the Ray cluster at {submitted_to}, not at {_address()}")
        withdraw(self.store.folder(record.id))
        return conclude_without_code(record, f"Ray no longer knows {cluster_name(record.id)}, as after a restart")

    def _details(self, job_id: str) -> Any:
        """Return Ray's details of a job, or None if the job is unknown to Ray."""

        def find(ray: Any) -> Any:
            try:
                return ray.get_job_info(cluster_name(job_id))
            except RuntimeError as error:
                if "does not exist" in str(error):
                    return None
                raise

        details = self._answers.get(job_id, lambda: self._ask(find))
        if details is None:  # not cached, since the job may be being submitted
            self._answers.forget(job_id)
        return details

    def _largest(self) -> tuple[int, int]:
        """Return the maximum number of CPUs, and of GPUs, of a node, whether free or in use."""
        from ray.util.state import list_nodes

        nodes = self._ask(lambda ray: list_nodes(ray.get_address(), [("state", "=", "ALIVE")], 10_000, int(_PATIENCE)))
        cpus, gpus = ([int(node.resources_total.get(name, 0)) for node in nodes] for name in ("CPU", "GPU"))
        return max(cpus, default=0), max(gpus, default=0)

    def _ask(self, question: Callable[[Any], _Answer]) -> _Answer:
        """Return Ray's answer. A separate thread waits for it, since Ray's client may never return."""
        answer: Future[_Answer] = Future()

        def ask() -> None:
            try:
                if self._connection is None:
                    self._connection = self._make(_address())
                answer.set_result(question(self._connection))
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=ask, daemon=True, name="Ray's answer").start()
        fix = "Start a cluster with `ray start --head`, or set RAY_ADDRESS=http://HOST:8265."
        try:
            return answer.result(_PATIENCE)
        except TimeoutError as error:
            raise RunError(
                f"platform: the Ray cluster at {_address()} did not answer within {_PATIENCE:g} s.", fix
            ) from error
        except OSError as error:
            raise RunError(f"platform: there is no Ray cluster at {_address()}.", fix) from error
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip(" .")]
            reason = lines[-1].strip() if lines else type(error).__name__
            raise RunError(
                f"The Ray cluster at {_address()} refused: {reason}", "`ray status` shows the resources of the cluster."
            ) from error


def _address() -> str:
    return os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or _DEFAULT
