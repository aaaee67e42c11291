"""Jobs of a Ray cluster, by its job API; root and data must be on a file system that all nodes see.

RAY_API_SERVER_ADDRESS or RAY_ADDRESS says where it is. A job is one entry point with CPUs and GPUs of its own, which
runs ``openmae.jobs.platforms.ray_runner``; where nothing is free, Ray queues it.
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
from openmae.jobs.job import Record, move
from openmae.jobs.outcome import exit_code, signal_as_minus, unseen_end
from openmae.jobs.platforms.base import Observation, inherited_environment
from openmae.jobs.platforms.ray_runner import KEY, THREADS, seal, withdraw
from openmae.jobs.platforms.supervisor import conclude, grace_seconds
from openmae.jobs.processes import alive
from openmae.jobs.store import JobStore

CPUS = "OPENMAE_JOB_CPUS"  # that Ray reserves for each process of a job
_DEFAULT = "http://127.0.0.1:8265"
_OF_THE_NODE = ("RAY_", "CUDA_VISIBLE_DEVICES")  # variables that a job has from Ray, not from who submits it
_PATIENCE = 30.0  # seconds for Ray to answer
_FRESH = 1.0  # seconds that an answer is good for
_LAST_BREATH = 5.0  # seconds until what Ray has lost is dead as well

_Answer = TypeVar("_Answer")


class RayPlatform:
    """A Ray cluster, from a machine that reaches its dashboard."""

    name = "ray"

    def __init__(self, store: JobStore) -> None:
        try:
            import ray.job_submission
        except ImportError as error:
            raise SpecError("platform: ray needs the package ray.", "pip install 'openmae[ray]'") from error
        self._make: Callable[[str], Any] = ray.job_submission.JobSubmissionClient
        self.store = store
        self._connection: Any = None
        self._answers: dict[str, tuple[float, Any]] = {}

    def check(self, gpus: int, nodes: int) -> None:
        """See ``Platform``."""
        if nodes > 1:
            raise SpecError(
                f"num_nodes: a job of Ray runs on one of its nodes, got {nodes}.",
                "Use one node with more GPUs, or platform slurm.",
            )
        _, most = self._largest()
        if most and gpus > most:
            raise SpecError(
                f"gpu_count: {gpus} GPUs are asked for, but the largest node of the Ray has {most}.",
                f"Ask for {most} or fewer.",
            )
        _cpus_each()

    def submit(self, job_id: str, environment: Mapping[str, str]) -> None:
        """See ``Platform``."""
        record, folder = self.store.read(job_id), self.store.folder(job_id)
        most_cpus, most_gpus = self._largest()
        cpus = _cpus_each() * record["processes"]
        cpus = min(cpus, most_cpus or cpus)  # a whole node is all that a job can have
        gpus = record["gpus"] if most_gpus else 0
        own = {THREADS: str(max(1, cpus // record["processes"]))} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
        if "automl" in record["command"]:  # no load: its trainings are jobs of their own
            cpus, own = 0, {"CUDA_VISIBLE_DEVICES": ""}
        given = {name: value for name, value in inherited_environment().items() if not name.startswith(_OF_THE_NODE)}
        key = seal(folder, own | given | dict(environment))
        command = [sys.executable, "-m", "openmae.jobs.platforms.ray_runner", str(self.store.root), job_id]
        try:
            self._ask(
                lambda ray: ray.submit_job(
                    entrypoint=f"exec {shlex.join(command)}",
                    submission_id=_name(job_id),
                    entrypoint_num_cpus=cpus,
                    entrypoint_num_gpus=gpus,
                    # `ray job stop` gives a training the time for its checkpoint
                    runtime_env={"env_vars": {KEY: key, "RAY_JOB_STOP_WAIT_TIME_S": str(int(grace_seconds()) + 5)}},
                )
            )
        except RunError:
            withdraw(folder)
            raise
        with self.store.update(job_id) as record:
            record["handle"]["ray"] = _address()

    def observe(self, record: Record) -> Observation | None:
        """See ``Platform``."""
        code = exit_code(self.store.folder(record["id"]))
        if code is not None:
            return Observation(*conclude(record, code), code)
        details = self._details(record["id"])
        if details is None:
            return self._forgotten(record)
        word = str(details.status.value)
        if word in ("PENDING", "RUNNING"):
            return Observation("PENDING" if word == "PENDING" else "RUNNING", f"Ray job {_name(record['id'])}: {word}")
        return self._ended(record, details)

    def cancel(self, job_id: str) -> None:
        """See ``Platform``. One that has started reads in its record that it is to stop."""
        if not withdraw(self.store.folder(job_id)):
            return
        with self.store.update(job_id) as record:
            move(record, "CANCELED", "canceled before it started")
        with suppress(RunError):  # unheard, Ray starts it in its turn, and it finds nothing to do
            self._ask(lambda ray: ray.stop_job(_name(job_id)))

    def _ended(self, record: Record, details: Any) -> Observation | None:
        """A job that Ray says has ended, and whose exit code was not there before Ray was asked."""
        folder = self.store.folder(record["id"])
        withdraw(folder)
        code = exit_code(folder)
        if code is None and details.driver_exit_code is not None:
            code = signal_as_minus(details.driver_exit_code)
        lines = [line for line in (details.message or "").splitlines() if line.strip()]
        told = f"Ray job {_name(record['id'])}: {details.status.value}"
        if code is not None:
            state, message = conclude(record, code)
            return Observation(state, f"{message}; {told}" + (f": {lines[-1]}" if lines and code else ""), code)
        if time.time() < (details.end_time or 0) / 1000 + _LAST_BREATH:
            return None
        canceled = record["cancel_requested"] or details.status.value == "STOPPED"
        found = Observation(*unseen_end(record, told, canceled=canceled))
        return found._replace(message=f"{told}: {lines[0]}") if lines and found.state != "COMPLETE" else found

    def _forgotten(self, record: Record) -> Observation | None:
        """A job that the Ray of this moment does not know."""
        there = record["handle"].get("ray")
        if there is None:
            if alive(record["submitter"]):
                return None
            return Observation("ERROR", "the client died before the job was handed to Ray")
        if there != _address():
            return Observation("UNKNOWN", f"it was handed to the Ray at {there}, and {_address()} is asked")
        told = f"Ray does not know {_name(record['id'])} any more, as after a new start"
        withdraw(self.store.folder(record["id"]))
        return Observation(*unseen_end(record, told, canceled=record["cancel_requested"]))

    def _details(self, job_id: str) -> Any:
        """What Ray says of a job; None where it knows no such job."""
        if job_id in self._answers:
            when, answer = self._answers[job_id]
            if time.monotonic() - when < _FRESH:
                return answer

        def find(ray: Any) -> Any:
            try:
                return ray.get_job_info(_name(job_id))
            except RuntimeError as error:
                if "does not exist" in str(error):
                    return None
                raise

        answer = self._ask(find)
        if answer is not None:  # else it may be on its way to Ray
            self._answers[job_id] = (time.monotonic(), answer)
        return answer

    def _largest(self) -> tuple[int, int]:
        """The most CPUs, and the most GPUs, that one node has, in use or not."""
        from ray.util.state import list_nodes

        nodes = self._ask(lambda ray: list_nodes(ray.get_address(), [("state", "=", "ALIVE")], 10_000, int(_PATIENCE)))
        cpus, gpus = ([int(node.resources_total.get(name, 0)) for node in nodes] for name in ("CPU", "GPU"))
        return max(cpus, default=0), max(gpus, default=0)

    def _ask(self, question: Callable[[Any], _Answer]) -> _Answer:
        """Ray's answer; its own client would wait for ever."""
        answer: Future[_Answer] = Future()

        def ask() -> None:
            try:
                if self._connection is None:
                    self._connection = self._make(_address())
                answer.set_result(question(self._connection))
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=ask, daemon=True, name="Ray's answer").start()
        fix = "`ray start --head` starts a Ray; RAY_ADDRESS=http://HOST:8265 names one."
        try:
            return answer.result(_PATIENCE)
        except TimeoutError as error:
            raise RunError(f"platform: the Ray at {_address()} did not answer in {_PATIENCE:g} s.", fix) from error
        except OSError as error:
            raise RunError(f"platform: there is no Ray at {_address()}.", fix) from error
        except RunError:
            raise
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip(" .")]
            reason = lines[-1].strip() if lines else type(error).__name__
            raise RunError(f"The Ray at {_address()} refused: {reason}", "`ray status` shows what it has.") from error


def _address() -> str:
    return os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or _DEFAULT


def _cpus_each() -> int:
    text = os.environ.get(CPUS, "1")
    if not text.isdecimal() or int(text) < 1:
        raise SpecError(f"{CPUS} must be a number of CPUs, 1 or more, got {text!r}.", f"Set {CPUS}=4, say.")
    return int(text)


def _name(job_id: str) -> str:
    return f"mae-{job_id}"
