"""``mae automl``: a search from its review to its best spec; ``mae automl worker``: one more process for it."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from openmae.automl.algorithms import Algorithm
from openmae.automl.objective import Objective, make_objective
from openmae.automl.preflight import Pace, probe, show_review
from openmae.automl.search_report import write_study_report
from openmae.automl.space import Space, budget, make_space
from openmae.automl.study import FOLDER, NUMBER, Study
from openmae.automl.terminal import following
from openmae.automl.worker import Trainings, Worker
from openmae.data.open import open_index
from openmae.distributed.signals import PreemptionWatch
from openmae.errors import DataError, RunError, SpecError, UserError, blaming
from openmae.jobs.artifacts import list_folder, newest_checkpoint
from openmae.spec.describe import fields
from openmae.spec.load import to_dict
from openmae.spec.metrics import METRICS
from openmae.spec.option import is_secret
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import get, has, nest, value_of
from openmae.spec.yaml_reader import write_text
from openmae.storage import cache, layout
from openmae.storage.atomic import make_folder, replacing, write_atomically
from openmae.storage.urls import is_remote, redact

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class Search:
    """A search that is open.

    Attributes:
        spec: of it, with local paths in place of the URLs of files.
        folder: local, of its results.
        study, trainings: its memory, and what trains.
    """

    spec: ExperimentSpec
    folder: Path
    study: Study
    trainings: Trainings

    @property
    def objective(self) -> Objective:
        """What it judges by."""
        return self.study.objective

    @property
    def space(self) -> Space:
        """What it searches."""
        return self.study.space


def run(spec: ExperimentSpec, platform: str = "local") -> dict[str, float]:
    """Search for the best values, or go on with the search in the results folder.

    Args:
        spec: as ``load_spec`` gives it for ``automl``.
        platform: of the jobs that train: ``local``, ``slurm`` or ``ray``.

    Returns:
        The best recommendation's metric, and what the final evaluation measured.

    Raises:
        UserError: the request is wrong; nothing was trained.
        RunError: no recommendation could be trained.
        KeyboardInterrupt: the same command goes on.
    """
    from openmae.actions.run import begin_results, running

    _check(spec)  # what is wrong in the request is told before anything is fetched or made
    with PreemptionWatch(), _alone(spec), running(spec, "automl") as this_run:
        search = open_search(this_run.spec, this_run.folder, platform)
        counts = count_images(this_run.spec)
        begin_results(this_run.folder, this_run.spec, resumed=True)
        study = search.study
        pace = None
        if study.count() == 0:
            pace = probe(search.trainings)
        else:
            log.info("Going on with the search in %s: %d recommendations so far.", search.folder, study.count())
        show_review(search.spec, study, counts, pace)
        baseline = _measured(search, "baseline", this_run.spec.train.pretrained_model_path)
        with following(study, this_run.status) as progress:
            Worker(study, search.trainings, progress).run()
        metrics = _finish(search, baseline, counts, pace)
        this_run.status.write("RUNNING", f"{study.count()} recommendations are done", kpi=metrics)
    _tell_next(search)
    return metrics


def work(spec: ExperimentSpec, platform: str = "local") -> None:
    """Train recommendations of a search that another process leads, until there are no more.

    Raises:
        UserError: the request is wrong.
        RunError: recommendations fail for the same reason.
        KeyboardInterrupt: others go on with what this one had.
    """
    from openmae.actions.staging import local_place

    _check(spec)
    with PreemptionWatch(), local_place(spec, "automl") as place:
        search = open_search(place.spec, place.folder, platform)
        place.begin_uploads()
        with following(search.study) as progress:
            Worker(search.study, search.trainings, progress).run()
        place.finish_uploads()
    log.info("No recommendations are left; `mae automl` writes the report.")


def _check(spec: ExperimentSpec) -> None:
    make_space(spec)
    make_objective(spec)
    if spec.automl.storage and is_remote(spec.results_folder("automl")):
        raise SpecError(
            "automl.storage: machines that share a study must see one another's results, but results_dir is a store.",
            "Set results_dir to a folder that all of them see, or leave automl.storage out.",
        )
    for key in ("train.resume_training_checkpoint_path", "train.stop_after_epoch"):
        if value_of(spec, key):
            raise SpecError(
                f"{key}: is of one training, and would act on every recommendation.",
                "Remove it; train.pretrained_model_path gives all of them weights to start from.",
            )


def open_search(spec: ExperimentSpec, folder: Path, platform: str) -> Search:
    """Open or make the study of a spec.

    Raises:
        UserError: the request is wrong, or the folder holds another search.
    """
    space, objective = make_space(spec), make_objective(spec)
    algorithm = Algorithm(spec.automl, space, budget(spec))
    algorithm.check()
    study = Study(spec, folder, algorithm, space, objective)
    return Search(spec, folder, study, Trainings(spec, folder, algorithm, platform))


def count_images(spec: ExperimentSpec) -> dict[str, int]:
    """Open the data, which stages it once for all trainings: images, validation images, classes.

    Raises:
        DataError: a source cannot be used.
    """
    finetune = spec.train.stage == "finetune"
    with blaming("dataset.train_data_sources"):
        train = open_index(spec.dataset.train_data_sources, labelled=finetune)
    counts = {"train": len(train), "val": 0, "classes": len(train.class_names)}
    if spec.dataset.val_data_sources:
        with blaming("dataset.val_data_sources"):
            val = open_index(spec.dataset.val_data_sources, labelled=finetune or None)
        counts.update(val=len(val), classes=len(val.class_names))
    metric = make_objective(spec).metric
    if METRICS[metric].needs == "validation images with classes" and not counts["classes"]:
        raise DataError(
            f"automl.metric: {metric} needs classes, but the images of dataset.val_data_sources have none.",
            "Make one folder per class, or judge by automl.metric=val_loss.",
        )
    return counts


@contextmanager
def _alone(spec: ExperimentSpec) -> Iterator[None]:
    target = spec.results_folder("automl")
    if is_remote(target):
        folder = make_folder(cache.root() / "locks" / hashlib.sha256(target.encode()).hexdigest()[:12])
    else:
        folder = make_folder(Path(target))
    try:
        with FileLock(folder / ".automl.lock", timeout=0):
            yield
    except Timeout as error:
        raise SpecError(
            f"automl: another `mae automl` leads the search in {redact(target)}.",
            "Wait for it, or join it with `mae automl worker` and the same spec.",
        ) from error


def _measured(search: Search, name: str, checkpoint: str) -> dict[str, float]:
    """Evaluate a checkpoint on the validation images; what was measured before is taken as it is."""
    known: dict[str, float] | None = search.study.study.user_attrs.get(name)
    if known is not None and name == "baseline":
        return known
    metrics: dict[str, float] = {}
    if checkpoint and search.spec.dataset.val_data_sources:
        if checkpoint.endswith(".safetensors"):
            log.info("%s is a backbone alone: without a head there is no baseline to measure.", checkpoint)
        else:
            metrics = _evaluate(search, name, checkpoint)
    search.study.study.set_user_attr(name, metrics)
    return metrics


def _evaluate(search: Search, name: str, checkpoint: str) -> dict[str, float]:
    from openmae.results.status import read_status

    folder = search.folder / name
    overrides = {"evaluate.checkpoint": checkpoint, "evaluate.results_dir": str(folder)}
    client = search.trainings.client
    try:
        job = client.wait(search.trainings.start("evaluate", name, overrides).id)
    except UserError as error:
        log.warning("%s: %s could not be evaluated: %s", name, checkpoint, error)
        return {}
    if job.status != "COMPLETE":
        failure = client.get_failure_analysis(job.id)
        log.warning("%s: %s could not be evaluated: %s", name, checkpoint, failure.error if failure else job.message)
        return {}
    found: dict[str, float] = {}
    for entry in read_status(folder / layout.STATUS):
        found.update(entry.get("kpi", {}))
    return found


def _finish(
    search: Search, baseline: Mapping[str, float], counts: Mapping[str, int], pace: Pace | None
) -> dict[str, float]:
    study, folder = search.study, search.folder
    best = study.best()
    if best is None:
        causes = {str(trial.user_attrs.get("cause", "")) for trial in study.trials()}
        raise RunError(
            f"None of the {study.count()} recommendations was trained to its end: {'; '.join(sorted(causes))}",
            "Mend the cause, and set another results_dir.",
        )
    _copy_best(search, best.user_attrs[FOLDER])
    write_atomically(folder / layout.BEST_SPEC, best_spec(search, best.params))
    final = _measured(search, "final", str(folder / layout.BEST))
    write_study_report(folder, search.spec, study, baseline, final, counts)
    value = best.value
    assert value is not None
    log.info(
        "Best: recommendation %d with %s %s.", best.user_attrs[NUMBER], study.objective.metric,
        study.objective.shown(value),
    )  # fmt: skip
    return {**final, study.objective.metric: value}


def _copy_best(search: Search, name: str) -> None:
    """The checkpoint that the metric is of, under a name of its own: a copy, since its training may be deleted."""
    source = search.trainings.folder_of(name)
    model = source / layout.BEST
    if not search.objective.of_best_epoch or not model.is_file():
        whole = [item for item in list_folder(str(source)) if item.kind == "checkpoint"]
        newest = newest_checkpoint(whole)
        model = Path(newest.path) if newest else model
    if not model.is_file():
        raise RunError(
            f"The best recommendation's checkpoint is not in {source}.", "Run the best spec: it trains anew."
        )
    with replacing(search.folder / layout.BEST) as temporary:
        shutil.copyfile(model, temporary)


def best_spec(search: Search, params: Mapping[str, Any]) -> str:
    """What the user typed, with the best values in it, to be trained as it is: YAML."""
    spec, resolved = search.spec, to_dict(search.spec)
    values: dict[str, Any] = {
        "results_dir": (spec.shown.get("results_dir") or spec.results_dir or "results").rstrip("/") + "/best"
    }
    for key in fields():
        own = spec.is_set(key) and not key.startswith("automl.") and key not in ("results_dir", "train.results_dir")
        if own and has(resolved, key):  # to_dict leaves empty texts out
            values[key] = get(resolved, key)
    return write_text(nest({**values, **params, "train.num_epochs": search.study.algorithm.epochs}))


def _tell_next(search: Search) -> None:
    shown = search.spec.results_folder("automl").rstrip("/")
    key = " encryption_key=..." if is_secret(search.spec.encryption_key) else ""
    log.info(
        "Next: mae train -e %s/%s%s   (or use %s/%s, which is trained already)",
        shown,
        layout.BEST_SPEC,
        key,
        shown,
        layout.BEST,
    )
