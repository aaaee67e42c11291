"""``Client``: the actions as jobs, from Python."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

from openmae.errors import OpenMAEError, RunError, SpecError
from openmae.jobs import artifacts
from openmae.jobs.artifacts import Artifact
from openmae.jobs.failures import FailureAnalysis, analyse
from openmae.jobs.job import FINAL, STATES, Job, Record, as_job, move, now, state_of
from openmae.jobs.logs import follow_log, read_log
from openmae.jobs.platforms import PLATFORMS, open_platform
from openmae.jobs.platforms.base import Observation, Platform
from openmae.jobs.platforms.local.queue import orphans
from openmae.jobs.prepare import Request, make_request
from openmae.jobs.processes import identify
from openmae.jobs.store import JobStore
from openmae.storage import layout
from openmae.storage.atomic import disk_error, write_durably
from openmae.storage.urls import is_remote

ROOT = "OPENMAE_JOBS"
TRAININGS = "jobs"  # in the results folder of a search: the roots of its trainings, one a machine
_POLL = 0.1
_WRITERS = 16

log = logging.getLogger("openmae")


def default_root() -> Path:
    """OPENMAE_JOBS, else a folder of this user."""
    import platformdirs

    return Path(os.environ.get(ROOT) or platformdirs.user_data_path("openmae") / "jobs")


class Client:
    """Submits, watches and cancels jobs. Any number of clients may share a root; none of them has to stay alive.

    Args:
        platform: where new jobs run, ``local``, ``slurm`` or ``ray``; jobs in the root keep the one that they were
            made with.
        root: local folder of records, logs and (unless the spec says otherwise) results; None: OPENMAE_JOBS, else a
            folder of this user.

    Raises:
        SpecError: the platform is unknown, or the root cannot be used.
    """

    def __init__(self, platform: str = "local", root: str | Path | None = None) -> None:
        if platform not in PLATFORMS:
            raise SpecError(f"platform: there is no {platform!r}.", f"Use one of: {', '.join(PLATFORMS)}.")
        self.platform = platform
        self.store = JobStore(root if root is not None else default_root())
        self._platforms: dict[str, Platform] = {}

    def create_job(
        self,
        action: str,
        specs: Mapping[str, Any] | None = None,
        spec_overrides: Mapping[str, Any] | None = None,
        parent_job_id: str | None = None,
        automl_policy: str | None = None,
        image: str | None = None,
        gpu_count: int | None = None,
        num_nodes: int | None = None,
        env_vars: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> Job:
        """Check a request, fill in what the parent and this job decide, and start it or queue it.

        Args:
            action: train, evaluate, inference, export or gen_trt_engine.
            specs: nested sections, as a spec file has them.
            spec_overrides: dotted keys, nested sections or shorthands (num_epochs, batch_size, ...); they win over
                ``specs``.
            parent_job_id: a train, export or gen_trt_engine job, or a training of a search, whose model this one takes.
            automl_policy: auto (or on): a training becomes a search for the best values (`mae automl`); off: it trains
                once; None: auto. Acts on train alone.
            image: of a container; noted, since no platform of this version runs containers.
            gpu_count: GPUs per node; None: what the spec says. 0: none, even where there are some.
            num_nodes: machines; None: what the spec says.
            env_vars: for the job's environment. Their values are written nowhere.
            name: for people.

        Returns:
            The job, PENDING or further.

        Raises:
            UserError: anything in the request that can be known to be wrong before it starts; nothing was started.
            RunError: the platform could not start it.
        """
        request = Request(
            action, specs, spec_overrides, automl_policy, image, gpu_count, num_nodes, dict(env_vars or {}), name,
            self.platform,
        )  # fmt: skip
        parent = self._parent(parent_job_id) if parent_job_id else None
        job_id = str(uuid.uuid4())
        prepared = make_request(request, parent, str(self.store.folder(job_id) / "results"))
        platform = self._platform(self.platform)
        platform.check(prepared.gpus, prepared.nodes)
        for notice in prepared.facts["notices"]:
            log.warning("%s", notice)
        folder = self.store.folder(job_id)
        command = command_of(prepared.facts["command"], folder / layout.JOB_SPEC)
        if prepared.facts["command"] == "automl":
            command += ["--platform", self.platform]
        self.store.create(_new_record(job_id, self.platform, prepared.facts, command))
        try:
            write_durably(folder / layout.JOB_SPEC, prepared.spec_text)
            platform.submit(job_id, prepared.environment)
        except RunError as error:
            try:
                with self.store.update(job_id) as record:
                    move(record, "ERROR", f"could not be started: {error.problem}")
            except RunError:  # the disk is full
                self.store.discard(job_id)
            raise
        return as_job(self.store.read(job_id))

    def get_job_status(self, job_id: str) -> Job:
        """How a job stands now; one whose process died unseen is found out and noted.

        Raises:
            SpecError: there is no such job.
        """
        return self._shown(self.store.find(job_id))

    def list_jobs(self, status: str | None = None, action: str | None = None) -> list[Job]:
        """All jobs of the root, oldest first; only those of a state or an action where one is given.

        Raises:
            SpecError: there is no such state.
        """
        if status is not None and status not in STATES:
            raise SpecError(f"status: there is no state {status!r}.", f"Use one of: {', '.join(STATES)}.")
        for job_id, pids in orphans(self.store):
            log.warning(
                "The folder of job %s was deleted while it ran. Its supervisor ends its processes: %s. If they stay, "
                "end them with `kill PID`.",
                *(job_id, ", ".join(map(str, pids))),
            )
        records = self.store.records()
        seen = [self._look(record) for record in records]
        with ThreadPoolExecutor(_WRITERS) as pool:  # a disk writes many small files at once as fast as one
            jobs = list(pool.map(self._noted, records, seen))
        return [job for job in jobs if status in (None, job.status) and action in (None, job.action)]

    @overload
    def get_job_logs(self, job_id: str, tail: int | None = None, follow: Literal[False] = False) -> str: ...
    @overload
    def get_job_logs(self, job_id: str, tail: int | None = None, *, follow: Literal[True]) -> Iterator[str]: ...
    def get_job_logs(self, job_id: str, tail: int | None = None, follow: bool = False) -> str | Iterator[str]:
        """What a job printed.

        Args:
            job_id: the job.
            tail: only the last lines.
            follow: give an iterator of lines (without their ends) that waits for more until the job has ended.

        Raises:
            SpecError: there is no such job, or ``tail`` is negative.
        """
        path = self.store.folder(self._record(job_id)["id"]) / layout.JOB_LOG
        if follow:
            return follow_log(path, tail, lambda: self._shown(path.parent.name).finished)
        return "".join(read_log(path, tail))

    def cancel_job(self, job_id: str) -> Job:
        """Ask a job to stop: training writes a checkpoint; what does not stop in time is killed. One that has ended
        stays as it is.

        Returns:
            The job as it stands at once: CANCELED where it had not started, else still RUNNING for a moment.

        Raises:
            SpecError: there is no such job.
            RunError: its record cannot be read, or its platform cannot be reached.
        """
        job = self.get_job_status(job_id)
        if job.finished:
            return job
        try:
            with self.store.update(job.id) as record:
                record["cancel_requested"] = record["cancel_requested"] or now()
        except RunError as error:  # a full disk, or a lock that is not given back, must not keep a job running
            log.warning("The cancellation of job %s could not be recorded; it is stopped anyway. %s", job.id, error)
        self._platform(job.platform).cancel(job.id)
        return self._shown(job.id)

    def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """Return the job when it has ended.

        Args:
            job_id: the job.
            timeout: seconds; None: as long as it takes.

        Raises:
            SpecError: there is no such job.
            RunError: it has not ended in time; it goes on.
        """
        job_id = self.store.find(job_id)
        deadline = time.monotonic() + timeout if timeout is not None else None
        while not (job := self._shown(job_id)).finished:
            if deadline is not None and time.monotonic() > deadline:
                raise RunError(f"Job {job_id} is still {job.status} after {timeout:g} s.", "It goes on; wait again.")
            time.sleep(_POLL)
        return job

    def get_failure_analysis(self, job_id: str) -> FailureAnalysis | None:
        """Why a job failed; None where it did not.

        Raises:
            SpecError: there is no such job.
            DataError: its results are in a remote store that cannot be read.
        """
        job = self.get_job_status(job_id)
        if job.status != "ERROR":
            return None
        return analyse(self.store.read(job.id), self.store.folder(job.id) / layout.JOB_LOG)

    def explain_job(self, job_id: str) -> list[dict[str, Any]]:
        """Where every value of a job's spec came from: ``key``, ``value``, ``function``, ``why``, by key.

        Raises:
            SpecError: there is no such job.
        """
        explanation: list[dict[str, Any]] = self._record(job_id)["explanation"]
        return explanation

    def list_results(self, job_id: str) -> list[Artifact]:
        """The files that a job has written so far, here or in its remote store.

        Raises:
            SpecError: there is no such job.
            DataError: the remote store cannot be read.
        """
        record = self._record(job_id)
        found = artifacts.list_folder(record["results_dir" if record["own_results"] else "results_folder"])
        listed = {item.path for item in found}
        for path in record["outputs"]:
            if path not in listed:
                found += [item for item in artifacts.list_folder(path.rpartition("/")[0]) if item.path == path]
        return found

    def delete_job_artifacts(self, job_id: str) -> list[Artifact]:
        """Delete what a job wrote: all of a results folder of its own; of one that the spec named, only the files of a
        kind that jobs write. The record and the log stay.

        Returns:
            What was deleted.

        Raises:
            SpecError: there is no such job, it has not ended, or a job that has not ended takes its model from it.
            DataError: a file cannot be deleted.
        """
        job = self.get_job_status(job_id)
        users = [other for other in self.list_jobs() if other.parent_job_id == job.id and not other.finished]
        if busy := [other for other in (job, *users) if not other.finished]:
            raise SpecError(
                f"The artifacts of {job.id} are in use: job {busy[0].id} ({busy[0].action}) is {busy[0].status}.",
                "Wait until it has ended, or cancel it.",
            )
        own = self.store.read(job.id)["own_results"]
        gone = [item for item in self.list_results(job.id) if own or item.kind != "other"]
        artifacts.remove(gone)
        if own and not is_remote(job.results_dir):
            for parent, _, _ in os.walk(job.results_dir, topdown=False):
                if not os.listdir(parent):
                    os.rmdir(parent)
        return gone

    def _platform(self, name: str) -> Platform:
        if name not in self._platforms:
            self._platforms[name] = open_platform(name, self.store)
        return self._platforms[name]

    def _parent(self, job_id: str) -> Record:
        """The record of a job of this root, or of a training that a search of this root has started."""
        try:
            return self._record(job_id)
        except SpecError:
            searches = [record for record in self.store.records() if "automl" in record["command"]]
            for folder in (Path(record["results_folder"]) / TRAININGS for record in searches):
                for root in sorted(folder.glob("*/")):
                    with suppress(SpecError):
                        return Client(self.platform, root)._record(job_id)
            raise

    def _record(self, job_id: str) -> Record:
        record_id = self.store.find(job_id)
        self._shown(record_id)  # notes what has happened
        return self.store.read(record_id)

    def _shown(self, job_id: str) -> Job:
        """The job after a look at what runs."""
        record = self.store.read(job_id)
        return self._noted(record, self._look(record))

    def _noted(self, record: Record, seen: Observation | None) -> Job:
        """The job after what was ``seen`` of it. A change of state is noted where the disk can be written; a platform's
        news within a state, and that a job cannot be seen now, are shown only."""
        if seen is not None and seen.state not in ("UNKNOWN", state_of(record)):
            with suppress(RunError), self.store.update(record["id"]) as record:
                seen = self._look(record)  # its supervisor may have had the last word meanwhile
                if seen is not None and seen.state not in ("UNKNOWN", state_of(record)):
                    move(record, seen.state, seen.message, seen.exit_code)
        job = as_job(record)
        return job if seen is None else replace(job, status=seen.state, message=seen.message)

    def _look(self, record: Record) -> Observation | None:
        if state_of(record) in FINAL:
            return None
        try:
            return self._platform(record["platform"]).observe(record)
        except OpenMAEError as error:  # also where its platform cannot be used from here
            return Observation("UNKNOWN", error.problem)
        except OSError as error:
            return Observation("UNKNOWN", disk_error(error, self.store.folder(record["id"]), verb="read").problem)


def command_of(action: str, spec: Path) -> list[str]:
    """What runs an action, in any process that has this environment."""
    return [sys.executable, "-m", "openmae", action, "-e", str(spec)]


def _new_record(job_id: str, platform: str, facts: Record, command: list[str]) -> Record:
    return {
        "version": 1,
        "id": job_id,
        "platform": platform,
        "created_at": now(),
        **facts,
        "cwd": os.getcwd(),
        "command": command,
        "host": socket.gethostname(),
        "submitter": identify(os.getpid()),
        "handle": {},
        "cancel_requested": None,
        "exit_code": None,
        "transitions": [{"at": now(), "state": "PENDING", "message": "waiting for its turn"}],
    }
