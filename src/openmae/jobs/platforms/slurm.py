"""Run jobs on a SLURM cluster, through its commands. The jobs' root and the data must be visible on all nodes.

Partition, account and time limit are set by SLURM's variables SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from openmae.errors import Preempted, RunError, SpecError
from openmae.jobs.job import Record
from openmae.jobs.outcome import EXIT, JobOutcome, conclude, conclude_without_code, read_exit_code
from openmae.jobs.platforms.common import (
    Fresh,
    Platform,
    before_submission,
    cancel_pending,
    cluster_name,
    grace_seconds,
    inherited_environment,
)
from openmae.jobs.processes import start_session
from openmae.jobs.store import JobStore
from openmae.storage import layout
from openmae.storage.atomic import write_durably

SCRIPT = "job.sh"
_NEEDED = ("sbatch", "squeue", "scancel", "sinfo")
_PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
_WARNING = 60  # seconds before the time limit at which SLURM sends a signal, so that training writes a checkpoint
_PATIENCE = 30.0  # seconds for SLURM to answer

_RANK = 'export NODE_RANK="$SLURM_NODEID"; '
_ONE_NODE = _RANK + 'exec "$@"'
# srun kills the other nodes as soon as one has ended. So a preempted node waits before it exits: node 0 a few seconds
# for the others to stop, and the others until node 0 has written and uploaded the checkpoint.
_NODES = (
    f'{_RANK}trap : INT TERM USR1; "$@"; code=$?; '
    f"[ $code = {Preempted.exit_code} ] && sleep $((SLURM_NODEID ? 60 : 3)); exit $code"
)
# The address of the first node, on which the script runs; other nodes may not be able to resolve its name.
_FIRST_NODE = r"""scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'"""
# SLURM requeues preempted jobs. A job that has reached its time limit is requeued here; scontrol then ends the script.
_REQUEUE = f'[ $code = {Preempted.exit_code} ] && scontrol requeue "$SLURM_JOB_ID" && exit $code'


class SlurmPlatform(Platform):
    """A SLURM cluster, used from a login node."""

    def __init__(self, store: JobStore) -> None:
        missing = [name for name in _NEEDED if shutil.which(name) is None]
        if missing:
            raise SpecError(
                f"platform: slurm needs SLURM's commands, but {', '.join(missing)} is not on the PATH.",
                "Run this on a login node, or use platform local.",
            )
        super().__init__(store)
        self._answers: Fresh[list[str]] = Fresh()

    def check(self, gpus: int, nodes: int) -> None:
        """Raise an error for more nodes than the cluster has; sbatch itself checks the GPUs."""
        names = set(_run(["sinfo", "-h", "-N", "-o", "%N"]).split())
        if nodes > len(names):
            raise SpecError(
                f"num_nodes: {nodes} are requested, but the cluster has {len(names)}.",
                f"Request {len(names)} or fewer.",
            )

    def submit(self, job_id: str, environment: Mapping[str, str]) -> None:
        """Write the batch script and submit it."""
        record, folder = self.store.read(job_id), self.store.folder(job_id)
        gpus = record.gpus if "gpu" in _run(["sinfo", "-h", "-o", "%G"]) else 0
        write_durably(folder / SCRIPT, _script(record, folder))
        options = [
            *("--parsable", f"--job-name={cluster_name(job_id)}", f"--nodes={record.nodes}", "--ntasks-per-node=1"),
            *(f"--output={folder / layout.JOB_LOG}", f"--chdir={record.cwd}", "--open-mode=append", "--export=ALL"),
            *([f"--gpus-per-node={gpus}"] if gpus else []),
            *(["--requeue", f"--signal=USR1@{_WARNING}"] if _is_resumable(record) else []),
        ]
        # secrets are passed by the environment, which SLURM exports to the job, not by arguments or the script
        number = _run(["sbatch", *options, str(folder / SCRIPT)], {**inherited_environment(), **environment}).strip()
        with self.store.update(job_id) as record:
            record.handle.slurm_job = number.partition(";")[0]

    def observe(self, record: Record) -> JobOutcome | None:
        """Return the outcome from the exit code, else the state in SLURM."""
        code = read_exit_code(self.store.folder(record.id))
        if code == 0:
            return conclude(record, code)
        answer = self._find(record.id)  # by name, since a client killed after sbatch has not recorded the number
        if not answer and code is None:
            if record.handle.slurm_job is None:
                return before_submission(record, "submitted to SLURM")
            return conclude_without_code(record, f"SLURM no longer knows job {record.handle.slurm_job}")
        number, word, reason = (answer or [record.handle.slurm_job or "?", "ended", ""])[:3]
        report = f"SLURM job {number}: {word}" + (f" ({reason})" if reason not in ("", "None") else "")
        if word in _PENDING:
            return JobOutcome("PENDING", report)
        if word in _RUNNING and code is None:
            return JobOutcome("RUNNING", report)
        if code is not None and word not in ("TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED"):
            outcome = conclude(record, code)
            return outcome._replace(message=f"{outcome.message}; {report}")
        if record.cancel_requested or word == "CANCELLED":
            return JobOutcome("CANCELED", report, code)
        return JobOutcome("COMPLETE" if word == "COMPLETED" else "ERROR", report, code)

    def cancel(self, job_id: str) -> None:
        """Cancel a waiting job at once; send SIGINT to a running one, and cancel it after the grace period."""
        self._answers.forget(job_id)
        answer, name = self._find(job_id), f"--jobname={cluster_name(job_id)}"
        if answer and answer[1] in _RUNNING:
            _run(["scancel", "--signal=INT", name])
            later = f"sleep {grace_seconds()}; exec scancel {shlex.quote(name)}"
            start_session(["/bin/sh", "-c", later], Path(os.devnull))
            return
        _run(["scancel", name])
        if not answer or answer[1] in _PENDING:
            cancel_pending(self.store, job_id)

    def _find(self, job_id: str) -> list[str]:
        """Return the number, state and reason of a job in SLURM, or [] if the job is unknown to SLURM."""
        return self._answers.get(job_id, lambda: _look_up(cluster_name(job_id)))


def _look_up(name: str) -> list[str]:
    text = _run(["squeue", "-h", "-t", "all", f"--name={name}", "-o", "%A|%T|%r"])
    if not text.strip() and shutil.which("sacct"):
        try:
            text = _run(["sacct", "-nXP", f"--name={name}", "-o", "JobID,State,Reason"])
        except RunError:  # a cluster without accounting
            text = ""
    lines = text.strip().splitlines()
    if not lines:
        return []
    number, word, *rest = lines[-1].split("|")
    return [number, word.split(" ")[0], *rest]  # "CANCELLED by 1000"


def _is_resumable(record: Record) -> bool:
    """Return whether SLURM may start the same command again to resume. A search is excluded: its trials are jobs."""
    return record.action == "train" and not record.is_search


def _script(record: Record, folder: Path) -> str:
    nodes = record.nodes
    lines = ["#!/bin/sh", "export PYTHONUNBUFFERED=1"]
    if nodes > 1:
        lines += [
            f"MASTER_ADDR=$({_FIRST_NODE})",
            "MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
            f"WORLD_SIZE={nodes}",
            f"NUM_GPU_PER_NODE={record.processes}",
            "export MASTER_ADDR MASTER_PORT WORLD_SIZE NUM_GPU_PER_NODE",
        ]
    task = shlex.join(["/bin/sh", "-c", _NODES if nodes > 1 else _ONE_NODE, "job", *record.command])
    done = shlex.quote(str(folder / EXIT))
    lines += [
        f"rm -f {done}",  # left by an earlier start of a requeued job
        f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --kill-on-bad-exit=1 {task}",
        "code=$?",
        *([_REQUEUE] if _is_resumable(record) else []),
        f"echo $code > {done}.tmp && mv {done}.tmp {done}",
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, env=environment, check=False)
    except subprocess.TimeoutExpired:
        raise RunError(f"SLURM did not answer {command[0]} within {_PATIENCE:g} s.", "Try again later.") from None
    if done.returncode:
        text = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RunError(f"SLURM refused {command[0]}: {text}.", "`sinfo` shows the resources of the cluster.")
    return done.stdout
