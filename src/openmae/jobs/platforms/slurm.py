"""Jobs of a SLURM cluster, by its own commands; root and data must be on a file system that all nodes see.

Partition, account and time limit are SLURM's own variables (SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT).
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from openmae.errors import RunError, SpecError
from openmae.jobs.job import Record, State, move, state_of
from openmae.jobs.outcome import EXIT, exit_code, signal_as_minus, unseen_end
from openmae.jobs.platforms.base import Observation, inherited_environment
from openmae.jobs.platforms.supervisor import PREEMPTED, conclude, grace_seconds
from openmae.jobs.processes import alive
from openmae.jobs.store import JobStore
from openmae.storage import layout
from openmae.storage.atomic import write_durably

SCRIPT = "job.sh"
_NEEDED = ("sbatch", "squeue", "scancel", "sinfo")
_PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
_WARNING = 60  # seconds before the time is up: training writes a checkpoint
_PATIENCE = 30.0  # seconds for SLURM to answer
_FRESH = 1.0  # seconds that an answer is good for: a controller must not be asked at every turn

_NODE = 'export NODE_RANK="$SLURM_NODEID"; '
_ALONE = _NODE + 'exec "$@"'
# srun ends the other nodes as soon as one has ended: a preempted one gives them the time, and the first to upload
_TOGETHER = (
    f'{_NODE}trap : INT TERM USR1; "$@"; code=$?; '
    f"[ $code = {PREEMPTED} ] && sleep $((SLURM_NODEID ? 60 : 3)); exit $code"
)

# By SLURM's own address of the first node, where this script runs: its name need not be known to the others.
_FIRST_NODE = r"""scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'"""

# SLURM requeues by itself what it preempts. What has run out of time asks for it; scontrol ends this script.
_REQUEUE = f'[ $code = {PREEMPTED} ] && scontrol requeue "$SLURM_JOB_ID" && exit $code'


class SlurmPlatform:
    """A cluster that runs SLURM, from a machine where its commands are."""

    name = "slurm"

    def __init__(self, store: JobStore) -> None:
        missing = [name for name in _NEEDED if shutil.which(name) is None]
        if missing:
            raise SpecError(
                f"platform: slurm needs SLURM's commands, but {', '.join(missing)} is not on the PATH.",
                "Run this on a login node, or use platform local.",
            )
        self.store = store
        self._answers: dict[str, tuple[float, list[str]]] = {}

    def check(self, gpus: int, nodes: int) -> None:
        """See ``Platform``."""
        names = set(_ask(["sinfo", "-h", "-N", "-o", "%N"]).split())
        if nodes > len(names):
            raise SpecError(
                f"num_nodes: {nodes} are asked for, but the cluster shows {len(names)}.",
                f"Ask for {len(names)} or fewer.",
            )

    def submit(self, job_id: str, environment: Mapping[str, str]) -> None:
        """See ``Platform``."""
        record, folder = self.store.read(job_id), self.store.folder(job_id)
        gpus = record["gpus"] if "gpu" in _ask(["sinfo", "-h", "-o", "%G"]) else 0
        write_durably(folder / SCRIPT, _script(record, folder))
        options = [
            *("--parsable", f"--job-name={_name(job_id)}", f"--nodes={record['nodes']}", "--ntasks-per-node=1"),
            *(f"--output={folder / layout.JOB_LOG}", f"--chdir={record['cwd']}", "--open-mode=append", "--export=ALL"),
            *([f"--gpus-per-node={gpus}"] if gpus else []),
            *(["--requeue", f"--signal=USR1@{_WARNING}"] if _goes_on(record) else []),
        ]
        # secrets go by the environment, which SLURM hands on; not by arguments, not by the script
        number = _ask(["sbatch", *options, str(folder / SCRIPT)], {**inherited_environment(), **environment}).strip()
        with self.store.update(job_id) as record:
            record["handle"]["slurm_job"] = number.partition(";")[0]

    def observe(self, record: Record) -> Observation | None:
        """See ``Platform``."""
        # by name: a client killed right after sbatch has left no number
        code = exit_code(self.store.folder(record["id"]))
        code = None if code is None else signal_as_minus(code)
        if code == 0:
            return Observation("COMPLETE", "finished", 0)
        answer = self._answer(record["id"])
        if not answer and code is None:
            if "slurm_job" not in record["handle"]:
                if alive(record["submitter"]):
                    return None
                return Observation("ERROR", "the client died before the job was handed to SLURM")
            return _forgotten(record)
        number, word, reason = (answer or [record["handle"].get("slurm_job", "?"), "ended", ""])[:3]
        told = f"SLURM job {number}: {word}" + (f" ({reason})" if reason not in ("", "None") else "")
        if word in _PENDING:
            return Observation("PENDING", told)
        if word in _RUNNING and code is None:
            return Observation("RUNNING", told)
        if code is not None and word not in ("TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED"):
            state, message = conclude(record, code)
            return Observation(state, f"{message}; {told}", code)
        return Observation(_final(word, record), told, code)

    def cancel(self, job_id: str) -> None:
        """See ``Platform``."""
        self._answers.pop(job_id, None)
        answer = self._answer(job_id)
        word = answer[1] if answer else ""
        if word in _RUNNING:
            name = f"--jobname={_name(job_id)}"
            _ask(["scancel", "--signal=INT", name])  # to the tasks: training writes a checkpoint
            later = f"sleep {grace_seconds():g}; exec scancel {shlex.quote(name)}"
            subprocess.Popen(
                ["/bin/sh", "-c", later],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            return
        _ask(["scancel", f"--jobname={_name(job_id)}"])
        with self.store.update(job_id) as record:
            if state_of(record) == "PENDING" and word in (*_PENDING, ""):
                move(record, "CANCELED", "canceled before it started")

    def _answer(self, job_id: str) -> list[str]:
        """SLURM's number, state and reason; empty where it knows no such job."""
        when, answer = self._answers.get(job_id, (0.0, []))
        if time.monotonic() - when < _FRESH and when:
            return answer
        text = _ask(["squeue", "-h", "-t", "all", f"--name={_name(job_id)}", "-o", "%A|%T|%r"])
        if not text.strip() and shutil.which("sacct"):
            try:
                text = _ask(["sacct", "-nXP", f"--name={_name(job_id)}", "-o", "JobID,State,Reason"])
            except RunError:  # a cluster that keeps no accounts
                text = ""
        lines = text.strip().splitlines()
        answer = lines[-1].split("|") if lines else []
        if answer:
            answer[1] = answer[1].split(" ")[0]  # "CANCELLED by 1000"
        self._answers[job_id] = (time.monotonic(), answer)
        return answer


def _forgotten(record: Record) -> Observation:
    """A job that SLURM answers for no longer has ended, and its script was killed before it could say how."""
    told = f"SLURM does not know job {record['handle']['slurm_job']} any more"
    return Observation(*unseen_end(record, told, canceled=record["cancel_requested"]))


def _final(word: str, record: Record) -> State:
    if record["cancel_requested"] or word == "CANCELLED":
        return "CANCELED"
    return "COMPLETE" if word == "COMPLETED" else "ERROR"


def _goes_on(record: Record) -> bool:
    """Whether the same command, started again, goes on: a training, and not a search of them, whose jobs do."""
    return record["action"] == "train" and "automl" not in record["command"]


def _name(job_id: str) -> str:
    return f"mae-{job_id}"


def _script(record: Record, folder: Path) -> str:
    nodes = record["nodes"]
    lines = ["#!/bin/sh", "export PYTHONUNBUFFERED=1"]
    if nodes > 1:
        lines += [
            f"MASTER_ADDR=$({_FIRST_NODE})",
            "MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
            f"WORLD_SIZE={nodes}",
            f"NUM_GPU_PER_NODE={record['processes']}",
            "export MASTER_ADDR MASTER_PORT WORLD_SIZE NUM_GPU_PER_NODE",
        ]
    task = shlex.join(["/bin/sh", "-c", _TOGETHER if nodes > 1 else _ALONE, "job", *record["command"]])
    done = shlex.quote(str(folder / EXIT))
    lines += [
        f"rm -f {done}",  # of a start before this one
        f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --kill-on-bad-exit=1 {task}",
        "code=$?",
        *([_REQUEUE] if _goes_on(record) else []),
        f"echo $code > {done}.tmp && mv {done}.tmp {done}",
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def _ask(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, env=environment, check=False)
    except subprocess.TimeoutExpired:
        raise RunError(f"SLURM did not answer {command[0]} in {_PATIENCE:g} s.", "Try again later.") from None
    if done.returncode:
        text = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RunError(f"SLURM refused {command[0]}: {text}.", "`sinfo` shows what the cluster has.")
    return done.stdout
