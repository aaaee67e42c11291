"""Searches with simulated jobs. Run as a program, it is a worker process of such a search."""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from openmae.automl import worker as module
from openmae.automl.study import Study
from openmae.automl.trial_jobs import TrialJobs
from openmae.automl.worker import Worker
from openmae.jobs.job import Job, Transition
from openmae.jobs.outcome import FailureAnalysis
from openmae.spec.load import load_spec
from openmae.spec.schema import ExperimentSpec

Learn = Callable[[Mapping[str, Any], int], float | None]


class BrokenError(Exception):
    """The simulated job fails with this message; ``hang`` means that it never ends."""


@dataclass
class Jobs:
    """A replacement for ``Client`` whose jobs train some epochs each time they are polled.

    Attributes:
        learn: (overrides, epoch) -> the loss after it; None: not finite; BrokenError: the job fails.
        trained: (folder, epoch), in the order in which they were trained.
        started: name and overrides of each job.
        pause: seconds of an epoch.
        stride: epochs that are trained between two looks.
    """

    learn: Learn
    trained: list[tuple[str, int]] = field(default_factory=list)
    started: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    canceled: list[str] = field(default_factory=list)
    pause: float = 0.0
    stride: int = 1
    jobs: dict[str, Job] = field(default_factory=dict)
    _overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    _errors: dict[str, str] = field(default_factory=dict)

    def create_job(self, action: str, specs: Any, overrides: Mapping[str, Any], **more: Any) -> Job:
        job_id = str(uuid.uuid4())
        self.started.append((more["name"], dict(overrides)))
        folder = str(overrides["train.results_dir"])
        Path(folder).mkdir(parents=True, exist_ok=True)
        begun = Transition(datetime.now(UTC).isoformat(), "RUNNING", "started")
        self._overrides[job_id] = dict(overrides)
        self.jobs[job_id] = Job(
            job_id, action, "RUNNING", folder, None, begun.at, more["name"], "local", "", None, folder, (), (begun,)
        )
        return self.jobs[job_id]

    def get_job_status(self, job_id: str) -> Job:
        for _ in range(self.stride):
            if not self.jobs[job_id].finished:
                self._go_on(job_id)
        return self.jobs[job_id]

    def list_jobs(self) -> list[Job]:
        return list(self.jobs.values())

    def cancel_job(self, job_id: str) -> Job:
        self.canceled.append(job_id)
        return self._end(job_id, "CANCELED", "canceled")

    def wait(self, job_id: str) -> Job:
        while not (job := self.get_job_status(job_id)).finished:
            pass
        return job

    def get_failure_analysis(self, job_id: str) -> FailureAnalysis:
        error = self._errors[job_id]
        return FailureAnalysis(job_id, "spec" if "not finite" in error else "data", error, (), 1, "log")

    def _end(self, job_id: str, state: Any, message: str) -> Job:
        job = self.jobs[job_id]
        last = Transition(datetime.now(UTC).isoformat(), state, message)
        self.jobs[job_id] = replace(job, status=state, message=message, transitions=(*job.transitions, last))
        return self.jobs[job_id]

    def _go_on(self, job_id: str) -> None:
        overrides, folder = self._overrides[job_id], Path(self.jobs[job_id].results_dir)
        until = int(overrides.get("train.stop_after_epoch", overrides["train.num_epochs"]))
        state = newest(folder)
        if state is None and "train.resume_training_checkpoint_path" in overrides:
            state = json.loads(Path(overrides["train.resume_training_checkpoint_path"]).read_text(encoding="utf-8"))
        state = state or {"epoch": 0, "path": []}
        if state["epoch"] >= until:
            self._end(job_id, "COMPLETE", "finished")
            return
        epoch = state["epoch"] + 1
        time.sleep(self.pause)
        try:
            value = self.learn(overrides, epoch)
        except BrokenError as error:
            if str(error) != "hang":
                self._errors[job_id] = str(error)
                self._end(job_id, "ERROR", "failed")
            return
        self.trained.append((folder.name, epoch))
        kpi = {"images_per_s": 1.0} if value is None else {"images_per_s": 1.0, "train_loss": value}
        with (folder / "status.json").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"status": "RUNNING", "message": f"Epoch {epoch}", "kpi": kpi}) + "\n")
        after = json.dumps({"epoch": epoch, "path": [*state["path"], folder.name]})
        for name in ("model_best.pth", f"model_epoch_{epoch:03d}_step_{epoch:06d}.pth"):
            (folder / name).write_text(after, encoding="utf-8")


def newest(folder: Path) -> dict[str, Any] | None:
    """Return the content of the newest simulated checkpoint in a folder."""
    files = sorted(folder.glob("model_epoch_*.pth"))
    return json.loads(files[-1].read_text(encoding="utf-8")) if files else None


def loss(overrides: Mapping[str, Any], epoch: int) -> float:
    """Return a loss that falls with the epochs and is lowest at a momentum of 0.93."""
    return (float(overrides.get("train.optim.momentum", 0.9)) - 0.93) ** 2 + 1.0 / epoch


def make_spec(folder: Path, **automl: Any) -> ExperimentSpec:
    """Return the spec of a search for two options of pretraining over 9 epochs.

    Args:
        folder: results folder.
        automl: settings of the section ``automl``, or the sections ``model``, ``dataset`` and ``train``.
    """
    sections = {name: automl.pop(name) for name in ("model", "dataset", "train") if name in automl}
    tree = {
        "results_dir": str(folder),
        "model": {"arch": "vit_tiny_patch16", **sections.get("model", {})},
        "dataset": {"train_data_sources": "images", "batch_size": 4, **sections.get("dataset", {})},
        "train": {"recipe": "tao", "num_epochs": 9, **sections.get("train", {})},
        "automl": {"parameters": ["train.optim.lr", "train.optim.momentum"], "max_recommendations": 6, **automl},
    }
    return load_spec(tree, action="automl")


def open_study(spec: ExperimentSpec) -> Study:
    """Open the study of a spec in its results folder."""
    folder = Path(spec.results_folder("automl"))
    folder.mkdir(parents=True, exist_ok=True)
    return Study(spec, folder)


def make_worker(spec: ExperimentSpec, learn: Learn = loss, pause: float = 0.0, stride: int = 9) -> tuple[Worker, Jobs]:
    """Return a worker with simulated jobs."""
    study = open_study(spec)
    trial_jobs, jobs = TrialJobs(spec, study.folder, study.algorithm, "local"), Jobs(learn, pause=pause, stride=stride)
    trial_jobs.client = jobs  # type: ignore[assignment]
    return Worker(study, trial_jobs), jobs


if __name__ == "__main__":  # RESULTS SETTINGS PAUSE: prints what it trained, as JSON lines
    search = make_spec(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    worker, simulated = make_worker(search, pause=float(sys.argv[3]), stride=1)
    told = 0

    def tell(running: Any) -> None:
        """Print what is new."""
        global told
        for item in simulated.trained[told:]:
            print(json.dumps(item), flush=True)
        told = len(simulated.trained)

    worker.changed = tell
    module._POLL = 0.05
    print("ready", flush=True)
    worker.run()
