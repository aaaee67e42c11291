"""The jobs of a search: start and find the job of a trial, continue from checkpoints, and delete checkpoints."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from openmae.automl.algorithms import Algorithm
from openmae.automl.study import TRIALS, HeldTrial
from openmae.distributed.topology import gpus_per_node
from openmae.jobs.artifacts import list_folder, newest_checkpoint
from openmae.jobs.client import TRAININGS, Client
from openmae.jobs.job import Job
from openmae.jobs.platforms.local.queue import SLOTS
from openmae.machine import boot_id, usable_cores
from openmae.spec.describe import fields
from openmae.spec.from_environment import environment_of
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of
from openmae.storage import layout

_MODELS = (layout.WEIGHTS_SUFFIX, ".safetensors")
_WANDB = {"wandb.group": "automl", "wandb.name": "trial {}"}
_EVALUATION_KEYS = (  # all others are stored in the checkpoint
    "encryption_key",
    "results_dir",
    "dataset.val_data_sources",
    "dataset.batch_size",
    "dataset.num_workers_per_gpu",
    "dataset.max_corrupt_fraction",
    "dataset.max_megapixels",
)
_COPIED = (layout.STATUS, layout.METRICS, layout.BEST)  # when a trial continues in another folder

log = logging.getLogger("openmae")


class TrialJobs:
    """The jobs of a search, below its local results folder; ``platform`` is ``local``, ``slurm`` or ``ray``."""

    def __init__(self, spec: ExperimentSpec, folder: Path, algorithm: Algorithm, platform: str) -> None:
        self.folder = folder
        self.algorithm = algorithm
        # Each machine has its own root, since processes on another machine would seem to be dead.
        self.client = Client(platform, root=folder / TRAININGS / (this_machine() if platform == "local" else platform))
        excluded = ("automl.", "wandb.run_id")  # trials cannot share one run of Weights & Biases
        specs = {key: value_of(spec, key) for key in fields() if spec.is_set(key) and not key.startswith(excluded)}
        variables = {key: text for key, text in spec.shown.items() if key in specs and key != "encryption_key"}
        self.specs = {**specs, **variables, "results_dir": str(folder)}  # a job hides its encryption key itself
        self._wandb = {key: value for key, value in _WANDB.items() if not spec.is_set(key)}
        at_once = spec.automl.max_concurrent
        self.environment = {SLOTS: "1000", **environment_of(variables.values())}  # the worker limits its jobs itself
        if platform == "local" and "OMP_NUM_THREADS" not in os.environ and at_once > 1:
            self.environment["OMP_NUM_THREADS"] = str(max(1, usable_cores() // at_once))

    def folder_of(self, name: str) -> Path:
        """Return the results folder of a trial."""
        return self.folder / TRIALS / name

    def start(self, action: str, name: str, overrides: Mapping[str, Any]) -> Job:
        """Start a job, or return the running job with this name.

        Raises:
            UserError: the spec is invalid.
            RunError: the job could not be started.
        """
        if running := self.running(name):
            return running[-1]
        train = action == "train"
        specs = self.specs if train else {key: self.specs[key] for key in _EVALUATION_KEYS if key in self.specs}
        level = log.level
        log.setLevel(logging.ERROR)  # notices about the spec have been logged already
        try:
            return self.client.create_job(
                action, specs, overrides, automl_policy="off" if train else None,
                gpu_count=gpus_per_node(), env_vars=self.environment, name=name,
            )  # fmt: skip
        finally:
            log.setLevel(level)

    def running(self, name: str) -> list[Job]:
        """Return the running jobs with a name, as far as this machine can observe them."""
        jobs = [job for job in self.client.list_jobs() if job.name == name]
        return [job for job in jobs if not job.finished and job.status != "UNKNOWN"]

    def train(self, held: HeldTrial, until: int) -> Job:
        """Train a trial up to an epoch, from its newest checkpoint, otherwise from that of its sources.

        Raises:
            UserError: the parameters are invalid.
            RunError: the job could not be started.
        """
        folder = self.folder_of(held.folder)
        overrides = {
            **held.params,
            "train.num_epochs": self.algorithm.epochs,
            "train.results_dir": str(folder),
            **{key: value.format(held.number) for key, value in self._wandb.items()},
        }
        if until < self.algorithm.epochs:
            overrides["train.stop_after_epoch"] = until
        if newest_checkpoint(list_folder(str(folder))) is None:
            overrides.update(self._source(held))
        return self.start("train", _job_name(held.folder, until), overrides)

    def _source(self, held: HeldTrial) -> dict[str, str]:
        for source in map(self.folder_of, held.sources):
            checkpoint = newest_checkpoint(list_folder(str(source)))
            if checkpoint is None:
                continue
            if self.algorithm.generations == 1:  # the same trial, taken over; in pbt, the source is another trial
                folder = self.folder_of(held.folder)
                folder.mkdir(parents=True, exist_ok=True)
                for name in _COPIED:
                    if (source / name).is_file():
                        shutil.copy2(source / name, folder / name)
            return {"train.resume_training_checkpoint_path": checkpoint.path}
        return {}

    def cancel_all(self, trial_folders: list[str]) -> None:
        """Cancel the jobs of trials, and wait until they have written their checkpoints."""
        names = tuple(map(_job_name, trial_folders))
        jobs = [job.id for job in self.client.list_jobs() if names and job.name.startswith(names) and not job.finished]
        for job in jobs:
            self.client.cancel_job(job)
        for job in jobs:
            log.info("%s", self.client.wait(job).message)

    def delete_models(self, name: str, why: str = "") -> None:
        """Delete the checkpoints of a trial and write a note why; its status, metrics and spec are kept."""
        for path in self.folder_of(name).glob("*"):
            if path.suffix in _MODELS:
                path.unlink(missing_ok=True)
        if why:
            with suppress(OSError):  # the disk may be full, or the folder was never created
                (self.folder_of(name) / layout.CHECKPOINTS_DELETED).write_text(f"{why}\n", encoding="utf-8")


def this_machine() -> str:
    """Return a name that differs between machines, and between boots of a machine."""
    host = socket.gethostname()
    start = hashlib.sha256(f"{host} {boot_id()}".encode()).hexdigest()
    return f"{host}-{start[:6]}"


def _job_name(folder: str, until: int | None = None) -> str:
    return f"{folder} to epoch {until or ''}"
