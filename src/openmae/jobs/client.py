"""``Client``: submit, watch and cancel jobs from Python."""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import platformdirs

from openmae.errors import OpenMAEError, RunError, SpecError
from openmae.jobs import artifacts
from openmae.jobs.artifacts import Artifact
from openmae.jobs.job import FINAL, STATES, Job, Record, now
from openmae.jobs.logs import follow_log, read_log
from openmae.jobs.outcome import FailureAnalysis, JobOutcome, analyse
from openmae.jobs.platforms import PLATFORMS, open_platform
from openmae.jobs.platforms.common import Platform, grace_seconds
from openmae.jobs.platforms.local.queue import orphans
from openmae.jobs.prepare import JobRequest, prepare
from openmae.jobs.store import JobStore
from openmae.storage import layout
from openmae.storage.atomic import disk_error, write_durably

TRAININGS = "jobs"  # folder in the results of a search with the roots of its trials, one per machine
_POLL = 0.1
_WRITERS = 16

log = logging.getLogger("openmae")


class Client:
    """Submits, watches and cancels jobs. Jobs continue without a client, and several clients may share a root.

    Args:
        platform: Where new jobs run: ``local``, ``slurm`` or ``ray``. Existing jobs stay on their platform.
        root: Local folder for records, logs and (unless set in the spec) results. None: the environment variable
            OPENMAE_JOBS, or else a folder in the user's data directory.

    Raises:
        SpecError: The platform is unknown, or the root cannot be used.
    """

    def __init__(self, platform: str = "local", root: str | Path | None = None) -> None:
        if platform not in PLATFORMS:
            raise SpecError(f"platform: there is no {platform!r}.", f"Use one of: {', '.join(PLATFORMS)}.")
        self.platform = platform
        if root is None:
            root = os.environ.get("OPENMAE_JOBS") or platformdirs.user_data_path("openmae") / "jobs"
        self.store = JobStore(root)
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
        """Check a request, infer missing values, and start or queue the job.

        Args:
            action: train, evaluate, inference, export or gen_trt_engine.
            specs: Nested sections, dotted keys or shorthands (num_epochs, batch_size, ...).
            spec_overrides: The same; takes precedence over ``specs``.
            parent_job_id: A train, export or gen_trt_engine job, or a trial of a search, whose model this job uses.
            automl_policy: For train: auto or on (a hyperparameter search, see `mae automl`), or off (train once).
                None means auto.
            image: A container image; recorded only, since no platform runs containers.
            gpu_count: GPUs per node. None: the number in the spec. 0: run without GPUs.
            num_nodes: Number of nodes. None: the number in the spec.
            env_vars: Variables for the job's environment. Their values are never stored unencrypted.
            name: A display name. None: the action.

        Returns:
            The job, in the state PENDING or a later one.

        Raises:
            UserError: The request is invalid; nothing was started.
            RunError: The platform could not start the job.
        """
        request = JobRequest(
            action, self.platform, specs, spec_overrides, automl_policy, image, gpu_count, num_nodes, env_vars, name
        )
        parent = self._find_parent(parent_job_id) if parent_job_id else None
        job_id = str(uuid.uuid4())
        folder = self.store.folder(job_id)
        prepared = prepare(request, parent, job_id, folder)
        platform = self._platform(self.platform)
        platform.check(prepared.record.gpus, prepared.record.nodes)
        grace_seconds()  # raises now, and not when the job is canceled, if it is invalid
        for notice in prepared.record.notices:
            log.warning("%s", notice)
        self.store.create(prepared.record)
        try:
            write_durably(folder / layout.JOB_SPEC, prepared.spec_text)
            platform.submit(job_id, prepared.environment)
        except RunError as error:
            try:
                with self.store.update(job_id) as record:
                    record.move("ERROR", f"could not be started: {error.problem}")
            except RunError:  # the disk is full
                self.store.discard(job_id)
            raise
        return self.store.read(job_id).to_job()

    def get_job_status(self, job_id: str) -> Job:
        """Return the current state of a job. If its processes have died, this is detected and recorded.

        Raises:
            SpecError: There is no such job.
        """
        return self._refresh(self.store.find(job_id))

    def list_jobs(self, status: str | None = None, action: str | None = None) -> list[Job]:
        """Return all jobs of the root with this status and action (None: any), oldest first.

        Raises:
            SpecError: There is no such state.
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
        outcomes = [self._observe(record) for record in records]
        with ThreadPoolExecutor(_WRITERS) as pool:  # writing small files in parallel takes as long as writing one
            jobs = list(pool.map(self._apply, records, outcomes))
        return [job for job in jobs if status in (None, job.status) and action in (None, job.action)]

    @overload
    def get_job_logs(self, job_id: str, tail: int | None = None, follow: Literal[False] = False) -> str: ...
    @overload
    def get_job_logs(self, job_id: str, tail: int | None = None, *, follow: Literal[True]) -> Iterator[str]: ...
    def get_job_logs(self, job_id: str, tail: int | None = None, follow: bool = False) -> str | Iterator[str]:
        """Return the output of a job, or its last ``tail`` lines.

        With ``follow``, return an iterator over lines, without line ends, that waits for new lines until the job ends.

        Raises:
            SpecError: There is no such job, or ``tail`` is negative.
        """
        path = self.store.folder(self.get_job_status(job_id).id) / layout.JOB_LOG
        if follow:
            return follow_log(path, tail, lambda: self._refresh(path.parent.name).finished)
        return "".join(read_log(path, tail))

    def cancel_job(self, job_id: str) -> Job:
        """Ask a job to stop. Training writes a checkpoint; a job that does not stop in time is killed.

        A job that has ended is not changed.

        Returns:
            The job right after the request: CANCELED if it had not started, otherwise usually still RUNNING.

        Raises:
            SpecError: There is no such job.
            RunError: Its record cannot be read, or its platform cannot be reached or used from this machine.
        """
        job = self.get_job_status(job_id)
        if job.finished:
            return job
        try:
            with self.store.update(job.id) as record:
                record.cancel_requested = record.cancel_requested or now()
        except RunError as error:  # a full disk or a held lock must not keep a job running
            log.warning("The cancellation of job %s could not be recorded; it is stopped anyway. %s", job.id, error)
        try:
            platform = self._platform(job.platform)
        except SpecError as error:  # a program or a package is missing
            raise RunError(
                f"Job {job.id} cannot be canceled from this machine. {error.problem}",
                "Install what is missing, or cancel the job on the machine on which it was submitted.",
            ) from error
        platform.cancel(job.id)
        return self._refresh(job.id)

    def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """Wait until a job has ended, and return it. ``timeout`` is in seconds; None waits forever.

        Raises:
            SpecError: There is no such job.
            RunError: The job has not ended in time; it is not stopped.
        """
        job_id = self.store.find(job_id)
        deadline = time.monotonic() + timeout if timeout is not None else None
        while not (job := self._refresh(job_id)).finished:
            if deadline is not None and time.monotonic() > deadline:
                raise RunError(f"Job {job_id} is still {job.status} after {timeout:g} s.", "It continues; wait again.")
            time.sleep(_POLL)
        return job

    def get_failure_analysis(self, job_id: str) -> FailureAnalysis | None:
        """Return why a job failed, or None if it did not fail.

        Raises:
            SpecError: There is no such job.
            DataError: Its results are in a remote store that cannot be read.
        """
        job = self.get_job_status(job_id)
        if job.status != "ERROR":
            return None
        return analyse(self.store.read(job.id), self.store.folder(job.id) / layout.JOB_LOG)

    def explain_job(self, job_id: str) -> list[dict[str, Any]]:
        """Return the origin of each value in a job's spec, as dicts with ``key``, ``value``, ``function`` and ``why``.

        Raises:
            SpecError: There is no such job.
        """
        return self._record(job_id).explanation

    def list_results(self, job_id: str) -> list[Artifact]:
        """Return the files that a job has written so far, local or in a remote store.

        Raises:
            SpecError: There is no such job.
            DataError: The remote store cannot be read.
        """
        record = self._record(job_id)
        folder = record.results_dir if record.own_results else record.results_folder
        return artifacts.list_outputs(folder, record.outputs)

    def delete_job_artifacts(self, job_id: str) -> list[Artifact]:
        """Delete the results of a job, but not its record and log.

        The job's default results folder is deleted completely. In a folder set in the spec, only files of the kinds
        that jobs write are deleted.

        Returns:
            The deleted files.

        Raises:
            SpecError: There is no such job, it has not ended, or an unfinished job uses its model.
            DataError: A file cannot be deleted.
        """
        job = self.get_job_status(job_id)
        children = [other for other in self.list_jobs() if other.parent_job_id == job.id]
        if busy := [other for other in (job, *children) if not other.finished]:
            raise SpecError(
                f"The artifacts of {job.id} are in use: job {busy[0].id} ({busy[0].action}) is {busy[0].status}.",
                "Wait until it has ended, or cancel it.",
            )
        own = self.store.read(job.id).own_results
        deleted = [item for item in self.list_results(job.id) if own or item.kind != "other"]
        artifacts.remove(deleted)
        if own:  # a local folder, whose hidden files are not listed
            shutil.rmtree(job.results_dir, ignore_errors=True)
        return deleted

    def _platform(self, name: str) -> Platform:
        if name not in self._platforms:
            self._platforms[name] = open_platform(name, self.store)
        return self._platforms[name]

    def _find_parent(self, job_id: str) -> Record:
        """Return the record of a job in this root, or of a trial of a search in this root."""
        try:
            return self._record(job_id)
        except SpecError:
            for search in (record for record in self.store.records() if record.is_search):
                for root in sorted((Path(search.results_folder) / TRAININGS).glob("*/")):
                    with suppress(SpecError):
                        return Client(self.platform, root)._record(job_id)
            raise

    def _record(self, job_id: str) -> Record:
        return self.store.read(self.get_job_status(job_id).id)

    def _refresh(self, job_id: str) -> Job:
        record = self.store.read(job_id)
        return self._apply(record, self._observe(record))

    def _apply(self, record: Record, outcome: JobOutcome | None) -> Job:
        """Return a job with the observed outcome; record only a change of state, and only if the disk is writable."""
        if outcome is not None and outcome.state not in ("UNKNOWN", record.state):
            with suppress(RunError), self.store.update(record.id) as record:
                outcome = self._observe(record)  # its supervisor may have written in the meantime
                if outcome is not None and outcome.state not in ("UNKNOWN", record.state):
                    record.move(*outcome)
        job = record.to_job()
        return job if outcome is None else replace(job, status=outcome.state, message=outcome.message)

    def _observe(self, record: Record) -> JobOutcome | None:
        if record.state in FINAL:
            return None
        try:
            return self._platform(record.platform).observe(record)
        except OpenMAEError as error:  # for example, the platform cannot be used from this machine
            return JobOutcome("UNKNOWN", error.problem)
        except OSError as error:
            return JobOutcome("UNKNOWN", disk_error(error, self.store.folder(record.id), verb="read").problem)
