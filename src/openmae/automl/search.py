"""``mae automl``: a search, from its review to its best spec. ``mae automl worker``: a process that joins a search."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from openmae.actions.sources import open_training_data
from openmae.automl.objective import make_objective
from openmae.automl.preflight import measure_pace, show_review
from openmae.automl.search_report import write_search_report
from openmae.automl.space import make_space
from openmae.automl.study import FOLDER, Study
from openmae.automl.terminal import showing_progress
from openmae.automl.trial_jobs import TrialJobs
from openmae.automl.worker import Worker
from openmae.data.open import open_index
from openmae.distributed.signals import PreemptionWatch
from openmae.errors import DataError, RunError, SpecError, UserError, blaming
from openmae.jobs.artifacts import list_folder, newest_checkpoint
from openmae.results.status import read_status
from openmae.spec.describe import fields
from openmae.spec.load import choices_of, to_dict
from openmae.spec.option import is_secret
from openmae.spec.recipe import choose, keep
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import flatten, get, has, nest, value_of
from openmae.spec.yaml_reader import read_file, write_text
from openmae.storage import cache, layout
from openmae.storage.atomic import make_folder, replacing, write_atomically
from openmae.storage.encryption import resolve_key
from openmae.storage.urls import is_remote, redact

log = logging.getLogger("openmae")


def run(spec: ExperimentSpec, platform: str = "local") -> dict[str, float]:
    """Search for the best values, or continue the search in the results folder.

    Args:
        spec: spec of the search, as ``load_spec`` returns it for ``automl``.
        platform: where jobs run: ``local``, ``slurm`` or ``ray``.

    Returns:
        The metric of the best trial, and the metrics of the final evaluation.

    Raises:
        UserError: the spec or the data is invalid; nothing was trained.
        RunError: no trial could be trained.
        KeyboardInterrupt: the search was interrupted; the same command continues it.
    """
    from openmae.actions.run import begin_results, running

    _check(spec)  # before anything is downloaded or created
    with PreemptionWatch(), _lead(spec), running(spec, "automl") as this_run:
        study = Study(_settled(this_run.spec, this_run.folder), this_run.folder)
        jobs = TrialJobs(study.spec, study.folder, study.algorithm, platform)
        counts = count_images(study.spec)
        begin_results(study.folder, study.spec, resumed=True)
        pace = None
        if study.trials():
            log.info("Continuing the search in %s: %d trials so far.", study.folder, len(study.trials()))
        else:
            pace = measure_pace(jobs)
        show_review(study, counts, pace)
        baseline = _evaluate_once(study, jobs, "baseline", study.spec.train.pretrained_model_path)
        with showing_progress(study, this_run.status) as progress:
            Worker(study, jobs, progress).run()
        metrics = _finish(study, jobs, baseline, counts)
        this_run.status.write("RUNNING", f"{len(study.trials())} trials are done", kpi=metrics)
    shown = spec.results_folder("automl").rstrip("/")
    log.info(
        "Next: mae train -e %s/%s%s   (or use %s/%s, which is already trained)", shown, layout.BEST_SPEC,
        " encryption_key=..." if is_secret(spec.encryption_key) else "", shown, layout.BEST,
    )  # fmt: skip
    return metrics


def work(spec: ExperimentSpec, platform: str = "local") -> None:
    """Run trials of a search that another process leads, until none are left.

    Raises:
        UserError: the spec or the data is invalid.
        RunError: several trials in a row failed for the same reason, or the study cannot be read or written.
        KeyboardInterrupt: the worker was interrupted; other workers continue its trials.
    """
    from openmae.actions.staging import local_place

    _check(spec)
    with PreemptionWatch(), local_place(spec, "automl") as place:
        study = Study(_settled(place.spec, place.folder), place.folder)
        place.begin_uploads()
        with showing_progress(study) as progress:
            Worker(study, TrialJobs(study.spec, study.folder, study.algorithm, platform), progress).run()
        place.finish_uploads()
    log.info("No trials are left; `mae automl` writes the report.")


def _settled(spec: ExperimentSpec, folder: Path) -> ExperimentSpec:
    """Return the spec in which the choices of the recipe count as set, so that all trials share them.

    A search that continues, and a worker that joins, keep the choices in ``experiment.yaml``.
    """
    from openmae.actions.facts import find_facts

    if spec.train.recipe == "tao":
        return spec
    recorded = folder / layout.SPEC
    if recorded.is_file():
        spec = keep(spec, flatten(read_file(recorded).tree))
    else:
        train, val = open_training_data(spec)
        facts = find_facts(spec, train, val, resolve_key(spec.encryption_key))
        spec = choose(spec, replace(facts, searching=True))
    return spec.with_set_keys(spec.set_keys | {key for key, _, _ in choices_of(spec)})


def _check(spec: ExperimentSpec) -> None:
    make_space(spec)
    make_objective(spec)
    if spec.automl.storage and is_remote(spec.results_folder("automl")):
        raise SpecError(
            "automl.storage: machines that share a study must share the results too, but results_dir is remote.",
            "Set results_dir to a folder that all machines can reach, or remove automl.storage.",
        )
    for key in ("train.resume_training_checkpoint_path", "train.stop_after_epoch"):
        if value_of(spec, key):
            raise SpecError(
                f"{key}: belongs to a single training run, but would apply to every trial.",
                "Remove it; train.pretrained_model_path sets the initial weights of all trials.",
            )


def count_images(spec: ExperimentSpec) -> dict[str, int]:
    """Return the numbers of images and classes; this also downloads the data for all trials.

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
        counts.update(val=len(val), classes=counts["classes"] or len(val.class_names))
    metric = make_objective(spec).metric
    if metric in ("knn_acc", "probe_acc") and not counts["classes"]:
        raise DataError(
            f"automl.metric: {metric} needs classes, but the images of dataset.val_data_sources have none.",
            "Make one folder per class, or use automl.metric=val_loss.",
        )
    return counts


@contextmanager
def _lead(spec: ExperimentSpec) -> Iterator[None]:
    """Ensure that no other process leads the search while the block runs."""
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


def _evaluate_once(study: Study, jobs: TrialJobs, name: str, checkpoint: str) -> dict[str, float]:
    """Evaluate a checkpoint on the validation images; the baseline is read from the study if it is known."""
    known: dict[str, float] | None = study.study.user_attrs.get(name)
    if known is not None and name == "baseline":
        return known
    metrics: dict[str, float] = {}
    if checkpoint.endswith(".safetensors"):
        log.info("The accuracy before training is not measured: %s has no classifier head.", checkpoint)
    elif checkpoint and study.spec.dataset.val_data_sources:
        metrics = _evaluate(jobs, name, checkpoint)
    study.study.set_user_attr(name, metrics)
    return metrics


def _evaluate(jobs: TrialJobs, name: str, checkpoint: str) -> dict[str, float]:
    folder, client = jobs.folder / name, jobs.client
    overrides = {"evaluate.checkpoint": checkpoint, "evaluate.results_dir": str(folder)}
    try:
        job = client.wait(jobs.start("evaluate", name, overrides).id)
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
    study: Study, jobs: TrialJobs, baseline: Mapping[str, float], counts: Mapping[str, int]
) -> dict[str, float]:
    best, folder = study.best(), study.folder
    if best is None or best.value is None:
        causes = sorted({trial.cause for trial in study.summaries()})
        raise RunError(
            f"None of the {len(study.trials())} trials completed: {'; '.join(causes)}",
            "Fix the cause, and set another results_dir.",
        )
    copy_best(jobs.folder_of(best.user_attrs[FOLDER]), folder, of_best_epoch=study.objective.of_best_epoch)
    write_atomically(folder / layout.BEST_SPEC, best_spec(study.spec, best.params, study.algorithm.epochs))
    final = _evaluate_once(study, jobs, "final", str(folder / layout.BEST))
    write_search_report(study, baseline, final, counts)
    metric = study.objective.metric
    log.info("Best: trial %d with %s %s.", best.number, metric, study.objective.shown(best.value))
    return {**final, metric: best.value}


def copy_best(source: Path, folder: Path, *, of_best_epoch: bool) -> None:
    """Copy the best or the last checkpoint of a trial, from its results folder ``source`` to that of the search.

    Raises:
        RunError: the trial has no complete checkpoint.
    """
    model = source / layout.BEST
    if not of_best_epoch or not model.is_file():
        newest = newest_checkpoint([item for item in list_folder(str(source)) if item.kind == "checkpoint"])
        model = Path(newest.path) if newest else model
    if not model.is_file():
        raise RunError(f"The best trial's checkpoint is not in {source}.", "Train with the best spec again.")
    with replacing(folder / layout.BEST) as temporary:
        shutil.copyfile(model, temporary)


def best_spec(spec: ExperimentSpec, params: Mapping[str, Any], epochs: int) -> str:
    """Return the user's spec with the best values as YAML, ready for training."""
    resolved = to_dict(spec)
    values: dict[str, Any] = {
        "results_dir": (spec.shown.get("results_dir") or spec.results_dir or "results").rstrip("/") + "/best"
    }
    for key in fields():
        own = spec.is_set(key) and not key.startswith("automl.") and key not in ("results_dir", "train.results_dir")
        if own and has(resolved, key):  # to_dict leaves out empty texts
            values[key] = get(resolved, key)
    return write_text(nest({**values, **params, "train.num_epochs": epochs}))
