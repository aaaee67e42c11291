"""Open the trained model of evaluate and inference: a checkpoint, an ONNX file or a TensorRT engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openmae.checkpoints.folder import BEST
from openmae.checkpoints.format import Checkpoint, CheckpointInfo, read_checkpoint
from openmae.checkpoints.weights import check_size, load_into
from openmae.data.normalise import Normaliser
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
from openmae.spec.load import DEFAULT_MEAN, DEFAULT_STD
from openmae.spec.rules import INERT
from openmae.spec.schema import ExperimentSpec
from openmae.storage.encryption import Key, resolve_key

_DECODER = ("decoder_depth", "decoder_embed_dim", "decoder_attention")
_MODEL_KEYS = ("arch", "in_chans", "patch_size", "global_pool", *_DECODER, "norm_pix_loss")
_NO_KEYS = ("input_size", "final_norm")  # of a model's shape, but not options of the spec's model section
_SIZE = "dataset.augmentation.input_size"

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class TrainedModel:
    """A model that fits the request; it can be sent to other processes.

    Attributes:
        path: file of the model.
        card: description of the model.
        info: the same as a checkpoint's entry, with the settings that apply.
        network: a checkpoint's model with its weights, in eval mode: a ``MaskedAutoencoder`` (pretrain) or a
            ``DeployedModel`` (finetune); None for ONNX and TensorRT.
        key: decrypts the file.
    """

    path: Path
    card: ModelCard
    info: CheckpointInfo
    network: nn.Module | None
    key: Key | None

    def outputs(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return a function from a data set's images to logits ``[B, K]`` (finetune) or embeddings ``[B, D]``."""
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

    def named(self, class_names: tuple[str, ...]) -> TrainedModel:
        """Return the model with names for its classes, for a file that holds none."""
        card, info = replace(self.card, class_names=class_names), replace(self.info, class_names=class_names)
        return replace(self, card=card, info=info)


def open_model(spec: ExperimentSpec, action: Literal["evaluate", "inference"]) -> TrainedModel:
    """Open the model that ``<action>.checkpoint`` or ``<action>.trt_engine`` names.

    The file determines the model; for a checkpoint, the spec may change the input size and the mask ratio.

    Raises:
        SpecError: The spec contradicts the file (stage, architecture, classes, channels), or no unit would be visible.
        CheckpointError: The file cannot be used.
    """
    section = getattr(spec, action)
    name = "checkpoint" if section.checkpoint else "trt_engine"
    key, path, secret = f"{action}.{name}", Path(getattr(section, name)), resolve_key(spec.encryption_key)
    if exported_kind(path):
        return _open_exported(spec, key, path, secret)
    if name == "trt_engine":
        raise SpecError(
            f"{key}: must be a TensorRT engine ({', '.join(ENGINE_SUFFIXES)}) or an ONNX file (.onnx), got {path}.",
            f"Give a checkpoint as {action}.checkpoint.",
        )
    return _open_checkpoint(spec, key, path, secret)


def _open_exported(spec: ExperimentSpec, key: str, path: Path, secret: Key | None) -> TrainedModel:
    with blaming(key):
        card = read_exported_card(path, secret)
    size, more = spec.dataset.augmentation.size, []
    if spec.typed(_SIZE) and size != card.model.input_size:
        (height, width), (own_height, own_width) = size, card.model.input_size
        more.append(
            SpecError(
                f"{_SIZE} is {height}x{width}, but {path} takes images of {own_height}x{own_width}.",
                f"Remove {_SIZE}, or export the checkpoint with export.input_height={height} "
                f"export.input_width={width}.",
            )
        )
    check_request(spec, key, path, card.info, more)
    if spec.typed("model.mask_ratio"):
        log.warning("model.mask_ratio has no effect: an exported model masks nothing.")
    return TrainedModel(path, card, card.info, None, secret)


def _open_checkpoint(spec: ExperimentSpec, key: str, path: Path, secret: Key | None) -> TrainedModel:
    with blaming(key):
        checkpoint, info = read_trained(spec, path, secret)
        if info.stage == "pretrain" and not checkpoint.weights.rest:
            raise CheckpointError(
                f"{path} holds only the backbone, and {key.split('.')[0]} also reconstructs images.",
                f"Give the checkpoint next to it, such as {path.with_name(BEST)}.",
            )
    config = info.model
    if spec.typed(_SIZE):
        config = replace(config, input_size=spec.dataset.augmentation.size)
    if spec.model.mask_ratio is not None and spec.typed("model.mask_ratio"):
        config = replace(config, mask_ratio=spec.model.mask_ratio)
    more = []
    try:
        masked = info.stage == "pretrain"
        with blaming(_SIZE):
            check_size(config, masked=masked)
        if masked:
            rows, columns = (side // config.unit for side in config.input_size)
            count_visible(rows * columns, config.mask_ratio)
    except SpecError as error:
        more.append(error)
    check_request(spec, key, path, info, more)
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
    """Read a checkpoint with its ``openmae`` entry; for another program's classifier, derive the entry.

    It is derived from the tensors and the spec. NVIDIA TAO's files are such classifiers. They do not name their
    classes, so ``class_names`` is empty.

    Raises:
        CheckpointError: The file cannot be used, or is another program's and holds no classifier.
    """
    checkpoint = read_checkpoint(path, secret)
    pretrains = spec.typed("train.stage") and spec.train.stage == "pretrain"
    if checkpoint.info is not None or not checkpoint.num_classes or pretrains:
        return checkpoint, checkpoint.own_info()
    config = checkpoint.config(spec.model.arch if spec.typed("model.arch") else None)
    augmentation = spec.dataset.augmentation
    if config.architecture.family == "convnextv2":
        config = replace(config, input_size=augmentation.size)  # any size fits its tensors
    mean, std = augmentation.mean or (), augmentation.std or ()
    if len(mean) != config.in_chans:
        mean, std = DEFAULT_MEAN.get(config.in_chans, ()), DEFAULT_STD.get(config.in_chans, ())
    return checkpoint, CheckpointInfo("finetune", config, (), tuple(mean), tuple(std))


def number_classes(info: CheckpointInfo) -> CheckpointInfo:
    """Name the classes of another program's classifier by their numbers, with a warning."""
    if info.stage == "pretrain" or info.class_names:
        return info
    count = info.model.num_classes
    log.warning("The checkpoint does not name its classes: they are numbered from 0 to %d.", count - 1)
    return replace(info, class_names=tuple(str(number) for number in range(count)))


def resolve_model(spec: ExperimentSpec, info: CheckpointInfo) -> ExperimentSpec:
    """Return the spec with the checkpoint's settings instead of defaults that have no effect.

    The seed determines the masks of validation: with the training run's own, evaluation gives the same numbers. The
    batch size is one that the training machine could hold.
    """
    shape = {f"model.{key}": value for key, value in info.model.to_dict().items() if key not in _NO_KEYS}
    values: dict[str, Any] = {
        **shape,
        "model.num_classes": info.model.num_classes or None,
        "train.stage": info.stage,
        _SIZE: info.model.input_size,
        "dataset.augmentation.mean": info.mean,
        "dataset.augmentation.std": info.std,
    }
    for key in ("train.seed", "dataset.augmentation.interpolation", "dataset.batch_size"):
        trained = _look_up(info.spec, key)
        if trained is not None and not spec.typed(key):
            values[key] = trained
    return spec.replaced(values)


def check_request(
    spec: ExperimentSpec, named_by: str, path: Path, info: CheckpointInfo, more: Sequence[SpecError] = ()
) -> None:
    """Compare the options that were set with what a file holds.

    Args:
        spec: the request.
        named_by: key that names the file.
        path: the file.
        info: what it holds.
        more: other mistakes in the request, to report together.

    Raises:
        SpecError: Something does not fit; the text lists everything.
    """
    said: dict[str, tuple[Any, Any]] = {"train.stage": (spec.train.stage, info.stage)}
    for name in _MODEL_KEYS:
        if f"model.{name}" not in INERT[info.stage]:
            said[f"model.{name}"] = (getattr(spec.model, name), getattr(info.model, name))
    said["model.patch_size"] = (spec.model.patch_size, info.model.unit)
    if info.model.num_classes:
        said["model.num_classes"] = (spec.model.num_classes, info.model.num_classes)
    for name in ("mean", "std"):
        said[f"dataset.augmentation.{name}"] = (getattr(spec.dataset.augmentation, name), getattr(info, name))
    wrong = {key: values for key, values in said.items() if spec.typed(key) and None is not values[0] != values[1]}
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


def _look_up(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
