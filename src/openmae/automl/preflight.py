"""The review before a search: its options, data and budget, and an estimate of its duration."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from rich.console import Console
from rich.table import Table

from openmae.automl.objective import find_misleading
from openmae.automl.study import Study
from openmae.automl.terminal import format_params
from openmae.automl.trial_jobs import TrialJobs
from openmae.errors import RunError, SpecError
from openmae.jobs.job import Job
from openmae.results.metrics_csv import read_metrics
from openmae.results.trials import duration, short_names
from openmae.storage import layout

_PROBE_SECONDS = 20.0  # of training, after the first logged step
_POLL = 0.2
_PREVIEW = 3  # trials to show

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class Pace:
    """Training speed on this machine; ``start`` is the time from the start of a job to its first step, in seconds."""

    start: float
    images_per_s: float


def measure_pace(jobs: TrialJobs) -> Pace | None:
    """Train briefly with the values in the spec; return None if the run was too short to measure the speed.

    Raises:
        SpecError: the spec is invalid.
        RunError: training failed.
    """
    folder, client = jobs.folder / "probe", jobs.client
    for left in jobs.running("probe"):  # from a search that was killed
        client.cancel_job(left.id)
        client.wait(left.id)
    shutil.rmtree(folder, ignore_errors=True)
    log.info("Measuring the training speed of this machine ...")
    overrides = {"train.results_dir": str(folder), "train.stop_after_epoch": 1, "wandb.enable": False}
    job = jobs.start("train", "probe", overrides)
    began, start = time.monotonic(), 0.0
    try:
        while not (job := client.get_job_status(job.id)).finished:
            if _speeds(folder):
                start = start or time.monotonic() - began
                if time.monotonic() - began - start > _PROBE_SECONDS:
                    client.cancel_job(job.id)
                    job = client.wait(job.id)
                    break
            time.sleep(_POLL)
    except BaseException:
        client.cancel_job(job.id)
        raise
    if job.status == "ERROR":
        raise _failure(jobs, job)
    speeds = _speeds(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return Pace(start or time.monotonic() - began, sum(speeds) / len(speeds)) if speeds else None


def _speeds(folder: Path) -> list[float]:
    path = folder / layout.METRICS
    return [row["images_per_s"] for row in read_metrics(path) if "images_per_s" in row] if path.is_file() else []


def _failure(jobs: TrialJobs, job: Job) -> Exception:
    failure = jobs.client.get_failure_analysis(job.id)
    problem, _, fix = (failure.error if failure else job.message).partition("\n  Fix: ")
    kind, _, text = problem.partition(": ")
    problem = text if kind.endswith("Error") else problem
    error = SpecError if job.exit_code == 2 else RunError
    return error(f"Training with the values of the spec failed: {problem}", fix)


def show_review(study: Study, counts: Mapping[str, int], pace: Pace | None) -> None:
    """Print the review of a search."""
    from openmae.actions.run import show_table

    parameters = study.space.parameters
    show_table("search", review_rows(study, counts, pace))
    console = Console(stderr=True, highlight=False, markup=False)
    console.print("space", style="bold")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in ("option", "searched", "yours"):
        table.add_column(head, overflow="fold")
    for item in parameters:
        table.add_row(item.key, item.range_words, "-" if item.own is None else str(item.own))
    console.print(table)
    for key, why in study.space.left_out.items():
        log.info("%s is not searched: %s", key, why)
    console.print("\nfirst trials", style="bold")
    names = short_names([item.key for item in parameters])
    for number, params in enumerate(preview(study)):
        yours = "   (yours)" if number == 0 and study.space.is_own(params) else ""
        console.print(f"{number}  {format_params(params, names)}{yours}")
    console.print()
    if why := find_misleading(study.spec, study.objective, tuple(item.key for item in parameters)):
        log.warning("%s", why)
    if study.spec.train.stage == "pretrain" and study.objective.metric == "train_loss" and counts["classes"]:
        log.info(
            "The validation images have %d classes: automl.metric=knn_acc compares features by the accuracy of nearest "
            "neighbours instead of the reconstruction loss.",
            counts["classes"],
        )


def review_rows(study: Study, counts: Mapping[str, int], pace: Pace | None) -> list[tuple[str, str]]:
    """Return the settings, data and estimated duration of a search as pairs of label and value."""
    algorithm, objective, settings = study.algorithm, study.objective, study.spec.automl
    budget = f"{algorithm.trials} trials of {algorithm.epochs} epochs"
    if len(algorithm.rungs) > 1:
        budget += f", compared after epoch {', '.join(map(str, algorithm.rungs[:-1]))}"
        budget += f" (about one in {settings.reduction_factor} continues)"
    if algorithm.generations > 1:
        budget = f"{settings.population_size} training runs of {algorithm.epochs} epochs"
        budget += f" in {algorithm.generations} generations"
    data = f"{counts['train']:,} training images, {counts['val']:,} validation images"
    data += f", {counts['classes']} classes" if counts["classes"] else ""
    rows = [
        ("algorithm", algorithm.name),
        ("metric", f"{objective.metric}, {'larger' if objective.maximize else 'smaller'} is better"),
        ("budget", budget),
        ("at once", str(settings.max_concurrent)),
        ("data", data),
        ("study", "PostgreSQL, shared" if settings.storage else "study.db in the results folder"),
    ]
    if pace is not None:
        rows.append(("time", f"about {duration(estimate(study, counts, pace))} ({pace.images_per_s:.0f} images/s)"))
    return rows


def estimate(study: Study, counts: Mapping[str, int], pace: Pace) -> float:
    """Estimate the seconds that a search takes on an idle machine, without validation."""
    algorithm = study.algorithm
    trials = algorithm.trials
    if algorithm.generations > 1:
        epochs, starts = algorithm.epochs * trials / algorithm.generations, float(trials)
    else:
        share, epochs, starts, before = 1.0, 0.0, 0.0, 0
        for rung in algorithm.rungs:
            epochs += trials * share * (rung - before)
            starts += trials * share
            before, share = rung, share / algorithm.settings.reduction_factor
    seconds = starts * pace.start + epochs * counts["train"] / pace.images_per_s
    return seconds / min(algorithm.settings.max_concurrent, trials)


def preview(study: Study) -> list[dict[str, Any]]:
    """Return the parameters of the first trials, which do not depend on results."""
    rehearsal = optuna.create_study(direction=study.objective.direction)
    rehearsal.enqueue_trial(study.space.own)
    found = []
    independent = study.algorithm.trials // study.algorithm.generations  # later generations depend on results
    for number in range(min(_PREVIEW, independent)):
        rehearsal.sampler = study.algorithm.sampler(number)
        found.append(study.space.suggest(rehearsal.ask()))
    return found
