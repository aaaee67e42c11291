"""Loading the trained model of evaluate, inference and export: a checkpoint, an ONNX file or a TensorRT engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openmae.checkpoints.format import Checkpoint, CheckpointInfo, read_checkpoint
from openmae.checkpoints.weights import check_size, load_into
from openmae.engines.metadata import FEATURES, LOGITS, ModelCard
from openmae.engines.module import DeployedModel, build_deployed
from openmae.engines.predictor import (
    Predictor,
    TorchPredictor,
    card_of,
    exported_kind,
    open_predictor,
    read_exported_card,
)
from openmae.engines.tensorrt.runtime import ENGINE_SUFFIXES
from openmae.errors import CheckpointError, SpecError, blaming
from openmae.models.build import build_autoencoder
from openmae.models.mae import MaskedAutoencoder
from openmae.models.masking import count_visible
from openmae.models.normalise import Normaliser
from openmae.spec.actions import TABLE
from openmae.spec.describe import fields, traits
from openmae.spec.resolved import DEFAULT_MEAN, DEFAULT_STD
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import get, value_of
from openmae.storage import layout
from openmae.storage.encryption import Key, resolve_key

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class TrainedModel:
    """A trained model that has been checked against the spec. It can be sent to other processes.

    Attributes:
        path: its file.
        card: its metadata.
        info: its metadata in the form that checkpoints have; image size and mask ratio are those that the spec sets.
        network: the model of a checkpoint with its weights, in eval mode: a ``MaskedAutoencoder`` (pretrain) or a
            ``DeployedModel`` (finetune); None for ONNX and TensorRT.
        key: decrypts the file.
    """

    path: Path
    card: ModelCard
    info: CheckpointInfo
    network: nn.Module | None
    key: Key | None

    def outputs(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return a function that maps images of a data set to logits ``[B, K]`` (finetune) or embeddings ``[B, D]``."""
        if isinstance(self.network, MaskedAutoencoder):
            encoder, normalise = self.network.encoder, Normaliser(self.card.mean, self.card.std)
            return lambda images: encoder.embed(normalise(images))
        predictor: Predictor
        if isinstance(self.network, DeployedModel):
            predictor = TorchPredictor(self.network, self.card, device)
        else:
            predictor = open_predictor(self.path, device, self.key)
            log.info("Running %s with %s.", self.path.name, predictor.runtime)
        name = LOGITS if self.card.stage == "finetune" else FEATURES
        return lambda images: predictor(images)[name]


def open_model(spec: ExperimentSpec, action: Literal["evaluate", "inference"]) -> TrainedModel:
    """Open the model that ``<action>.checkpoint`` or ``<action>.trt_engine`` names.

    The file determines the model; for a checkpoint, the spec may change the image size and the mask ratio.

    Raises:
        SpecError: the spec contradicts the file (stage, architecture, classes, channels), or would mask every unit.
        CheckpointError: the file cannot be used.
    """
    key = next(file.key for file in TABLE[action].inputs if value_of(spec, file.key))
    path, secret = Path(value_of(spec, key)), resolve_key(spec.encryption_key)
    if exported_kind(path):
        return _open_exported(spec, key, path, secret)
    if key.endswith("trt_engine"):
        raise SpecError(
            f"{key}: must be a TensorRT engine ({', '.join(ENGINE_SUFFIXES)}) or an ONNX file (.onnx), got {path}.",
            f"Give a checkpoint as {action}.checkpoint.",
        )
    return _open_checkpoint(spec, key, path, secret)


def _open_exported(spec: ExperimentSpec, key: str, path: Path, secret: Key | None) -> TrainedModel:
    with blaming(key):
        card = read_exported_card(path, secret)
    size, more = spec.dataset.augmentation.size, []
    if spec.is_set("dataset.augmentation.input_size") and size != card.model.input_size:
        (height, width), own = size, "x".join(map(str, card.model.input_size))
        more.append(
            SpecError(
                f"dataset.augmentation.input_size is {height}x{width}, but {path} takes images of {own}.",
                f"Remove dataset.augmentation.input_size, or export the checkpoint with export.input_height={height} "
                f"export.input_width={width}.",
            )
        )
    check_request(spec, key, path, card.info, more)
    if spec.is_set("model.mask_ratio"):
        log.warning("model.mask_ratio has no effect: an exported model masks nothing.")
    return TrainedModel(path, card, card.info, None, secret)


def _open_checkpoint(spec: ExperimentSpec, key: str, path: Path, secret: Key | None) -> TrainedModel:
    with blaming(key):
        checkpoint, info = read_trained(spec, path, secret)
        if info.stage == "pretrain" and not checkpoint.weights.rest:
            raise CheckpointError(
                f"{path} holds only the backbone, and {key.split('.')[0]} also reconstructs images.",
                f"Give a checkpoint of the same run, such as {path.with_name(layout.BEST)}.",
            )
    config = info.model
    if spec.is_set("dataset.augmentation.input_size"):
        config = replace(config, input_size=spec.dataset.augmentation.size)
    if spec.is_set("model.mask_ratio"):
        config = replace(config, mask_ratio=spec.model.mask_ratio)
    more = []
    masked = info.stage == "pretrain"
    try:
        with blaming("dataset.augmentation.input_size"):
            check_size(config, masked=masked)
        if masked:
            rows, columns = (side // config.unit for side in config.input_size)
            count_visible(rows * columns, config.mask_ratio)
    except SpecError as error:
        more.append(error)
    check_request(spec, key, path, info, more)
    if config.input_size != info.model.input_size:
        log.warning(
            "The model was trained at %dx%d px, and this run uses %dx%d px. Remove dataset.augmentation.input_size to "
            "keep the size.",
            *(*info.model.input_size, *config.input_size),
        )
    info = replace(info, model=config)
    if key.startswith("inference"):
        info = number_classes(info)
    card = card_of(info, path)
    with blaming(key):
        if info.stage == "finetune":
            return TrainedModel(path, card, info, build_deployed(checkpoint, card), secret)
        autoencoder = build_autoencoder(config)
        load_into(autoencoder, checkpoint, part="everything")
    return TrainedModel(path, card, info, autoencoder.eval(), secret)


def read_trained(spec: ExperimentSpec, path: Path, secret: Key | None) -> tuple[Checkpoint, CheckpointInfo]:
    """Read a checkpoint and its metadata.

    For a classifier of another program, such as NVIDIA TAO, tensors and spec provide the metadata. Such a file does not
    name its classes, so ``class_names`` is empty.

    Raises:
        CheckpointError: the file cannot be used, or another program wrote it and it is not a classifier.
    """
    checkpoint = read_checkpoint(path, secret)
    pretrains = spec.is_set("train.stage") and spec.train.stage == "pretrain"
    if checkpoint.info is not None or not checkpoint.num_classes or pretrains:
        return checkpoint, checkpoint.own_info()
    config = checkpoint.config(spec.model.arch if spec.is_set("model.arch") else None)
    if config.architecture.family == "convnextv2":
        config = replace(config, input_size=spec.dataset.augmentation.size)  # its tensors fit any image size
    mean, std = spec.dataset.augmentation.mean, spec.dataset.augmentation.std
    if len(mean) != config.in_chans:
        mean, std = DEFAULT_MEAN.get(config.in_chans, ()), DEFAULT_STD.get(config.in_chans, ())
    return checkpoint, CheckpointInfo("finetune", config, (), mean, std)


def number_classes(info: CheckpointInfo) -> CheckpointInfo:
    """Return the metadata; if the checkpoint does not name its classes, numbers are their names, with a warning."""
    if info.stage == "pretrain" or info.class_names:
        return info
    count = info.model.num_classes
    log.warning("The checkpoint does not name its classes: they are numbered from 0 to %d.", count - 1)
    return replace(info, class_names=tuple(str(number) for number in range(count)))


def resolve_model(spec: ExperimentSpec, info: CheckpointInfo) -> ExperimentSpec:
    """Return the spec with the settings of the checkpoint instead of defaults.

    The seed of the training run fixes the masks of validation, so evaluation reproduces its numbers. The batch size of
    the training run is known to fit into memory.
    """
    shape = info.model.to_dict()
    values: dict[str, Any] = {
        **{f"model.{name}": value for name, value in shape.items() if f"model.{name}" in fields()},
        "model.num_classes": info.model.num_classes or None,
        "train.stage": info.stage,
        "dataset.augmentation.input_size": info.model.input_size,
        "dataset.augmentation.mean": info.mean,
        "dataset.augmentation.std": info.std,
    }
    for key in ("train.seed", "dataset.augmentation.interpolation", "dataset.batch_size"):
        trained = get(info.spec, key)
        if trained is not None and not spec.is_set(key):
            values[key] = trained
    return spec.replaced(values)


def check_request(
    spec: ExperimentSpec, named_by: str, path: Path, info: CheckpointInfo, more: Sequence[SpecError] = ()
) -> None:
    """Compare the options that the user set with the model in the file ``path``, which the key ``named_by`` names.

    Raises:
        SpecError: lists everything that does not fit, and the errors in ``more``.
    """
    pairs: dict[str, tuple[Any, Any]] = {"train.stage": (spec.train.stage, info.stage)}
    for key in fields():
        section, _, name = key.partition(".")
        fixed = section == "model" and traits(key).on_resume == "refuse" and key != "model.mask_ratio"
        if fixed and info.stage in traits(key).stages:
            pairs[key] = (getattr(spec.model, name), getattr(info.model, name))
    pairs["model.patch_size"] = (spec.model.patch_size, info.model.unit)
    if info.model.num_classes:
        pairs["model.num_classes"] = (spec.model.num_classes, info.model.num_classes)
    for name in ("mean", "std"):
        pairs[f"dataset.augmentation.{name}"] = (getattr(spec.dataset.augmentation, name), getattr(info, name))
    wrong = {key: (asked, held) for key, (asked, held) in pairs.items() if spec.is_set(key) and asked != held}
    problems = [
        f"{key} is {asked}, but {named_by} ({path}) holds {key}={held}." for key, (asked, held) in wrong.items()
    ]
    fixes = []
    if wrong:
        asked = " and ".join(f"{key}={value}" for key, (value, _) in wrong.items())
        fixes.append(f"Remove {', '.join(wrong)} (the checkpoint has its own), or give a checkpoint with {asked}.")
    problems += [error.problem for error in more]
    fixes += [error.fix for error in more]
    if problems:
        raise SpecError("\n".join(problems), " ".join(fixes))
