"""The plan of a training run, checked completely before the first process starts."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from openmae.actions.facts import decide
from openmae.actions.sources import class_count, model_config, open_training_data
from openmae.checkpoints.format import CheckpointInfo
from openmae.checkpoints.resume import newest_checkpoint, newest_readable, read_finite
from openmae.data.image_dataset import AddressedSampler
from openmae.data.index import ImageIndex
from openmae.errors import CheckpointError, DataError, blaming
from openmae.evaluation.probes import scored_labels
from openmae.models.build import ModelConfig
from openmae.spec.describe import fields, traits
from openmae.spec.load import to_dict
from openmae.spec.metrics import is_share
from openmae.spec.recipe import keep
from openmae.spec.resolved import with_actual_monitor
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import flatten, get, value_of
from openmae.storage.encryption import Key, resolve_key
from openmae.storage.urls import is_remote
from openmae.training.elastic import BatchLayout, accumulation_for

log = logging.getLogger("openmae")

_IMAGES = "train_images"
_ELSEWHERE = "set another results_dir"


@dataclass(frozen=True)
class Plan:
    """A checked training run.

    Attributes:
        spec: the spec, with the actual seed, classes and gradient accumulation.
        info: the description of the model and the run in its checkpoints.
        resume: the checkpoint to resume from.
        epochs_done: epochs that an earlier run has finished.
        key: encrypts checkpoints.
        images: a digest of the names of the training images.
    """

    spec: ExperimentSpec
    folder: Path
    train: ImageIndex
    val: ImageIndex | None
    info: CheckpointInfo
    resume: Path | None
    epochs_done: int
    key: Key | None
    images: str

    @property
    def facts(self) -> dict[str, Any]:
        """The entry of checkpoints that describes the run."""
        return {**self.info.to_dict(), _IMAGES: self.images}

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model."""
        return self.info.model


@dataclass(frozen=True)
class Earlier:
    """The run that this one resumes.

    Attributes:
        key: the option that names it.
        checkpoint: its newest checkpoint.
        info: the description in that checkpoint.
        images: a digest of the names of its training images; None in old checkpoints.
        instead: how to begin a new run, for messages.
    """

    key: str
    checkpoint: Path
    info: CheckpointInfo
    epochs_done: int
    images: str | None
    instead: str = _ELSEWHERE


def make_plan(spec: ExperimentSpec, folder: Path, *, restart: bool = False) -> Plan:
    """Read the encryption key, find an earlier run in ``folder``, open the data, and determine the model.

    With ``restart``, the earlier run is ignored.

    Raises:
        UserError: the run cannot start with this spec, this data or this earlier run.
    """
    key = resolve_key(spec.encryption_key)
    earlier = None if restart else _find_earlier(spec, folder, key)
    train, val = open_training_data(spec)
    if val is not None:
        _check_monitor(spec, val)
    spec = keep(spec, flatten(earlier.info.spec)) if earlier else decide(spec, train, val, key)
    with blaming("dataset.batch_size"):
        AddressedSampler(train, spec.dataset.batch_size, spec.train.seed, 0, spec.train.num_gpus * spec.train.num_nodes)
    finetune = spec.train.stage == "finetune"
    begun: dict[str, int] = {}
    if spec.train.seed < 0:
        seed = earlier.info.spec["train"]["seed"] if earlier else random.SystemRandom().randrange(2**31)
        log.info("train.seed is -1: this run uses the seed %d.", seed)
        spec = spec.replaced({"train.seed": seed})
    if earlier:
        spec, begun = _keep_global_batch(earlier, spec)
    if finetune:
        spec = spec.replaced({"model.num_classes": class_count(spec, train)})
    info = CheckpointInfo(
        stage=spec.train.stage,
        model=model_config(spec),
        class_names=train.class_names if finetune else (),
        mean=spec.dataset.augmentation.mean,
        std=spec.dataset.augmentation.std,
        spec=to_dict(spec),
        begun=begun,
    )
    images = hashlib.sha256("\n".join(train.paths).encode(errors="surrogateescape")).hexdigest()[:16]
    if earlier:
        _check_same_run(earlier, info, images)
        compare_settings(earlier, info, finished=earlier.epochs_done >= spec.train.num_epochs)
    elif finetune and not spec.train.pretrained_model_path:
        log.warning("train.pretrained_model_path is empty: fine-tuning starts from scratch, with random weights.")
    resume, epochs_done = (earlier.checkpoint, earlier.epochs_done) if earlier else (None, 0)
    return Plan(spec, folder, train, val, info, resume, epochs_done, key, images)


def _check_monitor(spec: ExperimentSpec, val: ImageIndex) -> None:
    """Refuse to pick the best checkpoint by a probe of images without enough labels."""
    metric = spec.train.optim.monitor_name
    key = "train.checkpointer.monitor" if spec.train.checkpointer.metric else "train.optim.monitor_name"
    if spec.train.stage == "finetune" or not is_share(metric):
        return
    try:
        scored_labels(np.array(val.labels or [], dtype=int))
    except ValueError as error:
        reason = str(error) if val.class_names else "its images have no labels"
        raise DataError(
            f"{key}: {metric} cannot be measured on dataset.val_data_sources: {reason}.",
            f"Make one folder per class in {val.place}, or use {key}=val_loss.",
        ) from error


def _find_earlier(spec: ExperimentSpec, folder: Path, secret: Key | None) -> Earlier | None:
    given = spec.train.resume_training_checkpoint_path
    key = "train.resume_training_checkpoint_path" if given else "results_dir"
    with blaming(key):
        found = _given_or_newer(folder, spec, secret) if given else newest_readable(folder, secret)
        if found is None:
            return None
        checkpoint, state = found
        with blaming(str(checkpoint)):
            info = CheckpointInfo.from_dict(state["openmae"])
        epochs_done = get(state, "progress.epoch")
        if type(epochs_done) is not int:
            raise CheckpointError(f"{checkpoint} holds no training state: it is damaged.", "Use an older checkpoint.")
        return Earlier(key, checkpoint, info, epochs_done, state["openmae"].get(_IMAGES), new_run(spec))


def new_run(spec: ExperimentSpec) -> str:
    """Return how to begin a new run instead of resuming one, for messages."""
    if spec.train.resume_training_checkpoint_path or is_remote(spec.results_folder("train")):
        return _ELSEWHERE
    return f"pass --restart (in Python, restart=True), which keeps this run under a dated name, or {_ELSEWHERE}"


def _given_or_newer(folder: Path, spec: ExperimentSpec, secret: Key | None) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint that the spec names, or the newest one in ``folder`` if its run has resumed from that."""
    key = "train.resume_training_checkpoint_path"
    given, newest = Path(value_of(spec, key)), newest_checkpoint(folder)
    if newest is not None and newest != given:
        with suppress(CheckpointError):
            state = read_finite(newest, secret)
            if get(state, f"openmae.spec.{key}") == get(to_dict(spec), key):
                return newest, state
    return given, read_finite(given, secret)


def _keep_global_batch(earlier: Earlier, spec: ExperimentSpec) -> tuple[ExperimentSpec, dict[str, int]]:
    """Change the gradient accumulation so that the global batch stays the same on another number of processes.

    Returns:
        The spec, and the layout with which the run began. It is empty if the number of processes is the same, or if the
        user changed the accumulation.
    """
    last, now = BatchLayout.of(earlier.info.spec), BatchLayout.of(to_dict(spec))
    begun = BatchLayout(**earlier.info.begun) if earlier.info.begun else last
    same = now.processes == begun.processes == last.processes
    if same or now.accumulated not in (begun.accumulated, last.accumulated):  # experiment.yaml has the last value
        return spec, {}
    accumulated, notice = accumulation_for(begun, last, replace(now, accumulated=begun.accumulated))
    if notice and earlier.epochs_done < spec.train.num_epochs:
        log.warning(notice)
    return spec.replaced({"train.accum_grad_batches": accumulated}), asdict(begun)


def _check_same_run(earlier: Earlier, now: CheckpointInfo, images: str) -> None:
    """Refuse an earlier run of another model; warn if it was trained with other images."""
    old, new = _identity(earlier.info), _identity(now)
    if keys := [key for key in new if old.get(key, new[key]) != new[key]]:
        raise CheckpointError(
            f"{earlier.key}: training cannot resume from {earlier.checkpoint}: {_changes(keys, old, new)}.",
            f"Restore the old settings, or begin a new run: {earlier.instead}. "
            "train.pretrained_model_path starts a new run from weights.",
        )
    if earlier.images not in (None, images):
        log.warning(
            "The images in dataset.train_data_sources are not those that checkpoint %s was trained on.",
            earlier.checkpoint,
        )


def compare_settings(earlier: Earlier, now: CheckpointInfo, *, finished: bool) -> None:
    """Warn about settings that differ from those of an unfinished run; refuse them for a finished run.

    Raises:
        CheckpointError: the earlier run is finished, and had other settings.
    """
    # an option that did not exist yet in the earlier run had its default
    defaults = _settings(ExperimentSpec().model_dump(mode="json", exclude_none=True))
    before, wanted = defaults | _settings(earlier.info.spec), defaults | _settings(now.spec)
    if now.begun:
        key = "train.accum_grad_batches"
        wanted[key] = before.get(key)  # it was derived from the number of processes
    before = with_actual_monitor(before, wanted)
    keys = sorted(key for key in before | wanted if before.get(key) != wanted.get(key))
    if not finished and "train.pretrained_model_path" not in wanted:  # a resumed run does not need it
        keys = [key for key in keys if key not in ("train.pretrained_model_path", "train.pretrained_weights_key")]
    refused, length = bool(keys) and finished, "train.num_epochs"
    before[length], wanted[length] = get(earlier.info.spec, length, 0), get(now.spec, length, 0)
    if max(earlier.epochs_done, wanted[length]) < before[length]:  # more epochs are no surprise
        keys.append(length)
    folder, changes = earlier.checkpoint.parent, _changes(keys, before, wanted)
    if refused:
        raise CheckpointError(
            f"{earlier.key}: {folder} holds a finished run with other settings: {changes}.",
            f"For a new run, {earlier.instead}.",
        )
    if keys:
        log.warning("The run in %s resumes with other settings: %s.", folder, changes)


def _changes(keys: list[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return "; ".join(f"{key} was {before.get(key, 'unset')} and is {now.get(key, 'unset')}" for key in keys)


def _settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the set options whose changes are reported, by dotted key, without unknown keys of other versions."""
    values = flatten({section: spec.get(section, {}) for section in ("model", "dataset", "train")})
    known = [key for key in values if key in fields() and traits(key).on_resume != "allow"]
    return {key: values[key] for key in known if values[key] not in (None, "")}


def _identity(info: CheckpointInfo) -> dict[str, Any]:
    """Return the values, by key, that must not change when a run is resumed."""
    model = {f"model.{key}": value for key, value in info.model.to_dict().items()}
    size = model.pop("model.input_size")
    final_norm = {key: model.pop(key) for key in ("model.final_norm",) if key in model}
    shape = {k: v for k, v in model.items() if traits(k).on_resume == "refuse" and info.stage in traits(k).stages}
    names = {"class names": ", ".join(info.class_names)} if info.class_names else {}
    return {"train.stage": info.stage, **shape, **final_norm, "dataset.augmentation.input_size": size, **names}
