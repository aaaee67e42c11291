"""What a search is about to do, before it does it: space, budget, data, first recommendations, and how long."""

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

from openmae.automl.objective import misleading
from openmae.automl.study import Study
from openmae.automl.terminal import duration, params_words
from openmae.automl.worker import Trainings
from openmae.errors import RunError, SpecError
from openmae.jobs.job import Job
from openmae.results.metrics_csv import read_metrics
from openmae.results.trials import short_names
from openmae.spec.schema import ExperimentSpec
from openmae.storage import layout

_LONG_ENOUGH = 20.0  # seconds of training that tell the pace
_POLL = 0.2
_FIRST = 3  # recommendations that are shown beforehand

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class Pace:
    """How fast trainings are here.

    Attributes:
        start: seconds from a job's start to its first step.
        images_per_s: of training.
    """

    start: float
    images_per_s: float


def probe(trainings: Trainings) -> Pace | None:
    """Train the spec's own values for a moment, to see that it runs, and how fast; None where that was too short.

    Raises:
        SpecError: the request is wrong.
        RunError: training fails.
    """
    folder = trainings.folder / "probe"
    for left in trainings.running("probe"):  # of a search that was killed
        trainings.client.cancel_job(left.id)
        trainings.client.wait(left.id)
    shutil.rmtree(folder, ignore_errors=True)
    log.info("Probing how fast this machine trains ...")
    overrides = {"train.results_dir": str(folder), "train.stop_after_epoch": 1, "wandb.enable": False}
    client = trainings.client
    job = trainings.start("train", "probe", overrides)
    began, first, speeds = time.monotonic(), 0.0, []
    try:
        while not (job := client.get_job_status(job.id)).finished:
            rows = _speeds(folder)
            if rows and not first:
                first = time.monotonic() - began
            if rows and time.monotonic() - began - first > _LONG_ENOUGH:
                client.cancel_job(job.id)
                job = client.wait(job.id)
                break
            time.sleep(_POLL)
        speeds = _speeds(folder)
    except BaseException:
        client.cancel_job(job.id)
        raise
    if job.status == "ERROR":
        raise _failed(trainings, job)
    shutil.rmtree(folder, ignore_errors=True)
    if not speeds:
        return None
    return Pace(first or (time.monotonic() - began), sum(speeds) / len(speeds))


def _speeds(folder: Path) -> list[float]:
    path = folder / layout.METRICS
    return [row["images_per_s"] for row in read_metrics(path) if "images_per_s" in row] if path.is_file() else []


def _failed(trainings: Trainings, job: Job) -> Exception:
    failure = trainings.client.get_failure_analysis(job.id)
    problem, _, fix = (failure.error if failure else job.message).partition("\n  Fix: ")
    problem = problem.partition(": ")[2] if problem.split(":")[0].endswith("Error") else problem
    kind = SpecError if job.exit_code == 2 else RunError
    return kind(f"A first training with the spec's own values failed: {problem}", fix)


def show_review(spec: ExperimentSpec, study: Study, counts: Mapping[str, int], pace: Pace | None) -> None:
    """Print what is searched, how, on what, and how long that may take."""
    console = Console(stderr=True, highlight=False, markup=False)
    console.print("\nsearch", style="bold")
    summary = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    summary.add_column(style="dim", no_wrap=True)
    summary.add_column(overflow="fold")
    for row in review_rows(spec, study, counts, pace):
        summary.add_row(*row)
    console.print(summary)
    console.print("\nspace", style="bold")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in ("option", "searched", "yours"):
        table.add_column(head, overflow="fold")
    for item in study.space.parameters:
        table.add_row(item.key, item.range_words, "-" if item.own is None else str(item.own))
    console.print(table)
    for key, why in study.space.left_out.items():
        log.info("%s is not searched: %s", key, why)
    console.print("\nfirst recommendations", style="bold")
    names = short_names([item.key for item in study.space.parameters])
    for number, params in enumerate(first_recommendations(study)):
        console.print(f"{number}  {params_words(params, names)}{'   (yours)' if number == 0 else ''}")
    console.print()
    if why := misleading(spec, study.objective, tuple(item.key for item in study.space.parameters)):
        log.warning("%s", why)
    if offer := knn_offer(spec, study, counts):
        log.info("%s", offer)


def review_rows(
    spec: ExperimentSpec, study: Study, counts: Mapping[str, int], pace: Pace | None
) -> list[tuple[str, str]]:
    """Label and value of each fact of the review."""
    algorithm, objective = study.algorithm, study.objective
    budget = f"{algorithm.recommendations} recommendations of {algorithm.epochs} epochs"
    if len(algorithm.rungs) > 1:
        budget += f", judged after {', '.join(map(str, algorithm.rungs[:-1]))}"
        budget += f" (about one of {spec.automl.reduction_factor} goes on)"
    if algorithm.generations > 1:
        size = spec.automl.population_size
        budget = f"{size} trainings of {algorithm.epochs} epochs in {algorithm.generations} generations"
    data = f"{counts['train']:,} images to train, {counts['val']:,} to validate"
    data += f", {counts['classes']} classes" if counts["classes"] else ""
    rows = [
        ("algorithm", algorithm.name),
        ("metric", f"{objective.metric}, {'larger' if objective.maximize else 'smaller'} is better"),
        ("budget", budget),
        ("at once", str(spec.automl.max_concurrent)),
        ("data", data),
        ("study", "PostgreSQL, shared" if spec.automl.storage else "study.db in the results folder"),
    ]
    if pace is not None:
        rows.append(("time", f"about {duration(estimate(study, counts, pace))} ({pace.images_per_s:.0f} images/s)"))
    return rows


def estimate(study: Study, counts: Mapping[str, int], pace: Pace) -> float:
    """Seconds that a search takes where nothing else runs, without validation."""
    algorithm = study.algorithm
    trainings = algorithm.recommendations
    if algorithm.generations > 1:
        epochs, starts = algorithm.epochs * trainings / algorithm.generations, float(trainings)
    else:
        share, epochs, starts, before = 1.0, 0.0, 0.0, 0
        for rung in algorithm.rungs:
            epochs += trainings * share * (rung - before)
            starts += trainings * share
            before, share = rung, share / algorithm.settings.reduction_factor
    seconds = starts * pace.start + epochs * counts["train"] / pace.images_per_s
    return seconds / min(algorithm.settings.max_concurrent, trainings)


def first_recommendations(study: Study) -> list[dict[str, Any]]:
    """The spec's own values, and those of the recommendations after it that no result can change any more."""
    algorithm, space = study.algorithm, study.space
    rehearsal = optuna.create_study(direction=study.objective.direction)
    rehearsal.enqueue_trial(space.own)
    found = []
    for number in range(min(_FIRST, algorithm.recommendations)):
        rehearsal.sampler = algorithm.sampler(number)
        found.append(space.draw(rehearsal.ask()))
    return found


def knn_offer(spec: ExperimentSpec, study: Study, counts: Mapping[str, int]) -> str:
    """That pretraining could be judged by its features; empty where it cannot, or is."""
    if spec.train.stage != "pretrain" or study.objective.metric != "train_loss" or not counts["classes"]:
        return ""
    return (
        f"The validation images have {counts['classes']} classes: automl.metric=knn_acc judges features by the "
        "accuracy of nearest neighbours, instead of reconstructions."
    )
