"""What a training run will do, fixed and checked before the first process starts."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openmae.actions.sources import class_count, match_classes, open_images
from openmae.checkpoints.format import CheckpointInfo
from openmae.data.image_dataset import AddressedSampler
from openmae.data.image_index import ImageIndex
from openmae.errors import CheckpointError, blaming
from openmae.models.build import ModelConfig
from openmae.spec.describe import fields
from openmae.spec.load import to_dict
from openmae.spec.rules import INERT
from openmae.spec.schema import ExperimentSpec
from openmae.storage.encryption import Key, resolve_key
from openmae.training.elastic import BatchLayout, accumulation_for
from openmae.training.resume import best_was_set_aside, newest_checkpoint, newest_readable, read_finite

log = logging.getLogger("openmae")

_IMAGES = "train_images"

#: What may change between the parts of one run without a word: its length, its pace, its place.
_RHYTHM = frozenset(
    {
        "model.num_classes",
        "dataset.num_workers_per_gpu",
        "dataset.max_corrupt_fraction",
        "dataset.max_megapixels",
        "dataset.test_data_sources",
        *(f"train.{name}" for name in ("num_epochs", "num_gpus", "gpu_ids", "num_nodes", "results_dir", "precision")),
        "train.distributed_strategy",
        *(key for key in fields() if key.startswith("train.checkpointer.")),
        *(f"train.checkpoint_{name}" for name in ("interval", "interval_unit")),
        *(f"train.{name}" for name in ("keep_checkpoints", "validation_interval", "allow_partial_weights")),
        *(f"train.{name}" for name in ("stop_after_epoch", "compile", "profile")),
        "train.resume_training_checkpoint_path",
    }
)
_ACCUMULATION = "train.accum_grad_batches"


@dataclass(frozen=True)
class Plan:
    """A checked request: everything that can be wrong has been looked at before the first process starts."""

    spec: ExperimentSpec
    folder: Path
    train: ImageIndex
    val: ImageIndex | None
    info: CheckpointInfo
    resume: Path | None
    epochs_done: int
    key: Key | None
    images: str
    best_is_lost: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint says about the run."""
        return {**self.info.to_dict(), _IMAGES: self.images}

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.info.model


@dataclass(frozen=True)
class Earlier:
    """The run that this one goes on from."""

    key: str
    checkpoint: Path
    info: CheckpointInfo
    epochs_done: int
    images: str | None


def make_plan(spec: ExperimentSpec, folder: Path) -> Plan:
    """Open the data, look back at an earlier run in ``folder``, and fix the model.

    Raises:
        UserError: anything in the request that can be known to be wrong before training.
    """
    key = resolve_key(spec.encryption_key)
    earlier = _look_back(spec, folder, key)
    finetune = spec.train.stage == "finetune"
    data, largest = spec.dataset, spec.dataset.max_megapixels
    train = open_images(data.train_data_sources, "dataset.train_data_sources", labelled=finetune, largest=largest)
    val = None
    if data.val_data_sources:
        labelled = finetune or None
        val = open_images(data.val_data_sources, "dataset.val_data_sources", labelled=labelled, largest=largest)
    if finetune and val is not None:
        val = match_classes(val, train.class_names, "dataset.train_data_sources")
    with blaming("dataset.batch_size"):
        processes = spec.train.num_gpus * spec.train.num_nodes
        AddressedSampler(len(train), spec.dataset.batch_size, spec.train.seed, 0, processes)
    if not spec.typed("dataset.batch_size"):
        log.warning(
            "dataset.batch_size is %d, the published default: set it to what memory holds, such as 64.",
            spec.dataset.batch_size,
        )
    if spec.train.seed < 0:
        seed = earlier.info.spec["train"]["seed"] if earlier else random.SystemRandom().randrange(2**31)
        log.info("train.seed is -1: this run draws %d.", seed)
        spec = spec.replaced({"train.seed": seed})
    begun: dict[str, int] = {}
    if earlier:
        spec, begun = _keep_global_batch(earlier, spec)
    if finetune:
        spec = spec.replaced({"model.num_classes": class_count(spec, train)})
    config = _model_config(spec)
    augmentation = spec.dataset.augmentation
    info = CheckpointInfo(
        stage=spec.train.stage,
        model=config,
        class_names=train.class_names if finetune else (),
        mean=tuple(augmentation.mean or ()),
        std=tuple(augmentation.std or ()),
        spec=to_dict(spec),
        begun=begun,
    )
    images = _names_of(train)
    if earlier:
        _check_same_run(earlier, info)
        if earlier.images not in (None, images):
            log.warning(
                "dataset.train_data_sources holds other images than the checkpoint %s was trained with.",
                earlier.checkpoint,
            )
        _compare_settings(earlier, info, finished=earlier.epochs_done >= spec.train.num_epochs)
    elif finetune and not spec.train.pretrained_model_path:
        log.warning("train.pretrained_model_path is empty: fine-tuning starts from scratch, with random weights.")
    resume, epochs_done = (earlier.checkpoint, earlier.epochs_done) if earlier else (None, 0)
    return Plan(spec, folder, train, val, info, resume, epochs_done, key, images, best_was_set_aside(folder))


def _look_back(spec: ExperimentSpec, folder: Path, secret: Key | None) -> Earlier | None:
    typed = spec.train.resume_training_checkpoint_path
    key = "train.resume_training_checkpoint_path" if typed else "results_dir"
    with blaming(key):
        found = _gone_on(folder, typed, secret) if typed else newest_readable(folder, secret)
        if found is None and typed:
            found = Path(typed), read_finite(Path(typed), secret)
        if found is None:
            return None
        checkpoint, state = found
        facts, progress = state["openmae"], state["progress"]
        if (
            not isinstance(facts, Mapping)
            or not isinstance(progress, Mapping)
            or type(progress.get("epoch")) is not int
        ):
            raise CheckpointError(f"{checkpoint} holds no training state: it is damaged.", "Use an older checkpoint.")
        return Earlier(key, checkpoint, CheckpointInfo.from_dict(facts), progress["epoch"], facts.get(_IMAGES))


def _gone_on(folder: Path, typed: str, secret: Key | None) -> tuple[Path, dict[str, Any]] | None:
    """Where an interrupted run that began from the checkpoint ``typed`` has come to; the same command goes on there."""
    newest = newest_checkpoint(folder)
    if newest is not None and newest != Path(typed):
        with suppress(CheckpointError):
            state = read_finite(newest, secret)
            if state["openmae"]["spec"]["train"].get("resume_training_checkpoint_path") == typed:
                return newest, state
    return None


def _names_of(index: ImageIndex) -> str:
    """Tells the images of a data set from others, by their names."""
    return hashlib.sha256("\n".join(index.paths).encode(errors="surrogateescape")).hexdigest()[:16]


def _keep_global_batch(earlier: Earlier, spec: ExperimentSpec) -> tuple[ExperimentSpec, dict[str, int]]:
    """On another number of processes, accumulate so that the global batch stays.

    Returns:
        The spec, and how the run began; nothing where neither processes nor anything else of it has changed since, or
        where the user changes the accumulation.
    """
    last, now = BatchLayout.of(earlier.info.spec), BatchLayout.of(to_dict(spec))
    begun = BatchLayout(**earlier.info.begun) if earlier.info.begun else last
    same = now.processes == begun.processes == last.processes
    if same or now.accumulated not in (begun.accumulated, last.accumulated):  # experiment.yaml has that of the last run
        return spec, {}
    accumulated, told = accumulation_for(begun, last, replace(now, accumulated=begun.accumulated))
    if told and earlier.epochs_done < spec.train.num_epochs:
        log.warning(told)
    return spec.replaced({_ACCUMULATION: accumulated}), begun.to_dict()


def _check_same_run(earlier: Earlier, now: CheckpointInfo) -> None:
    """A run can only go on as what it was."""
    old, new = _identity(earlier.info), _identity(now)
    keys = [key for key in new if old.get(key, new[key]) != new[key]]
    if keys:
        changed = "; ".join(f"{key} was {old[key]} and is {new[key]}" for key in keys)
        raise CheckpointError(
            f"{earlier.key}: training cannot resume from {earlier.checkpoint}: {changed}.",
            "Set another results_dir for a new run (train.pretrained_model_path takes weights along), or restore the "
            "old settings.",
        )


def _compare_settings(earlier: Earlier, now: CheckpointInfo, *, finished: bool) -> None:
    """An unfinished run may go on with other settings, aloud; a finished one is no answer to another request."""
    # an option that is newer than the run had its default then
    before, wanted = _defaults() | _settings(earlier.info.spec), _defaults() | _settings(now.spec)
    if now.begun:
        wanted[_ACCUMULATION] = before.get(_ACCUMULATION)  # it follows from the processes, and was told of with them
    keys = sorted(key for key in before | wanted if before.get(key) != wanted.get(key))
    if not finished and "train.pretrained_model_path" not in wanted:  # a resumed run needs it no more
        keys = [key for key in keys if key not in ("train.pretrained_model_path", "train.pretrained_weights_key")]
    if not keys:
        return
    changed = "; ".join(f"{key} was {before.get(key, 'unset')} and is {wanted.get(key, 'unset')}" for key in keys)
    if finished:
        raise CheckpointError(
            f"{earlier.key}: {earlier.checkpoint.parent} holds a finished run with other settings: {changed}.",
            "Set another results_dir for this run.",
        )
    log.warning("The run in %s goes on with other settings: %s.", earlier.checkpoint.parent, changed)


def _defaults() -> dict[str, Any]:
    return _settings(ExperimentSpec().model_dump(mode="json", exclude_none=True))


def _settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes the result of a training, by dotted key; unset keys are left out."""
    found: dict[str, Any] = {}
    known = fields()  # an earlier version may have had other options

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{name}.")
            elif value not in (None, "") and f"{prefix}{name}" in known and f"{prefix}{name}" not in _RHYTHM:
                found[f"{prefix}{name}"] = value

    walk({section: spec.get(section, {}) for section in ("model", "dataset", "train")}, "")
    return found


def _identity(info: CheckpointInfo) -> dict[str, Any]:
    """What may not change when a run is resumed, by its key."""
    model = {f"model.{key}": value for key, value in info.model.to_dict().items()}
    size = model.pop("model.input_size")
    free = ("model.drop_path_rate", "model.num_classes", *INERT[info.stage])
    shape = {key: value for key, value in model.items() if key not in free}
    names = {"class names": ", ".join(info.class_names)} if info.class_names else {}
    return {"train.stage": info.stage, **shape, "dataset.augmentation.input_size": size, **names}


def _model_config(spec: ExperimentSpec) -> ModelConfig:
    model = spec.model
    return ModelConfig(
        arch=model.arch,
        input_size=spec.dataset.augmentation.size,
        in_chans=model.in_chans,
        patch_size=model.patch_size,
        drop_path_rate=resolved(model.drop_path_rate),
        mask_ratio=resolved(model.mask_ratio),
        norm_pix_loss=model.norm_pix_loss,
        decoder_depth=resolved(model.decoder_depth),
        decoder_embed_dim=resolved(model.decoder_embed_dim),
        decoder_attention=model.decoder_attention,
        global_pool=model.global_pool,
        num_classes=(model.num_classes or 0) if spec.train.stage == "finetune" else 0,
    )


def resolved(value: Any) -> Any:
    """A value that ``load_spec`` has filled in."""
    assert value is not None, "load_spec fills in what the architecture decides"
    return value
