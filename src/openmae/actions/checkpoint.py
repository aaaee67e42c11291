"""The trained model that evaluate and inference look at."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn

from openmae.errors import CheckpointError, SpecError
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.models.weights import Checkpoint, CheckpointInfo, load_into, read_checkpoint
from openmae.spec.schema import ExperimentSpec


def open_checkpoint(spec: ExperimentSpec, action: Literal["evaluate", "inference"]) -> tuple[nn.Module, CheckpointInfo]:
    """Build the checkpoint's model, with its weights, in eval mode.

    What the checkpoint says of the model stands; the spec may only change the input size and the mask ratio.

    Returns:
        A ``MaskedAutoencoder`` or a timm classifier, and the checkpoint's information with the settings that act.

    Raises:
        SpecError: the spec says otherwise (stage, architecture, classes, channels).
        CheckpointError: the file cannot be used.
    """
    section = getattr(spec, action)
    path = section.checkpoint or section.trt_engine
    if str(path).endswith((".onnx", ".engine", ".plan")) or not section.checkpoint:
        raise SpecError(
            f"{action}.trt_engine: this version runs checkpoints only, got {path}.",
            f"Set {action}.checkpoint to a .pth that mae train wrote.",
        )
    checkpoint = read_checkpoint(path)
    info = checkpoint.info
    if info is None:
        raise CheckpointError(
            f"{action}.checkpoint: {path} was not written by OpenMAE ({checkpoint.weights.layout}).",
            "Give it to mae train as train.pretrained_model_path first.",
        )
    _check_request(spec, action, checkpoint, info)
    config = info.model
    if spec.typed("dataset.augmentation.input_size"):
        config = replace(config, input_size=spec.dataset.augmentation.size)
    if spec.model.mask_ratio is not None and (spec.typed("model.mask_ratio") or spec.typed("train.mask_ratio")):
        config = replace(config, mask_ratio=spec.model.mask_ratio)
    _check_size(config)
    model = build_classifier(config) if info.stage == "finetune" else build_autoencoder(config)
    load_into(model, checkpoint, part="everything")
    return model.eval(), replace(info, model=config)


def resolve_model(spec: ExperimentSpec, info: CheckpointInfo) -> ExperimentSpec:
    """The spec with the checkpoint's own settings in place of defaults that do not act."""
    model = {
        f"model.{key}": value for key, value in info.model.to_dict().items() if key not in ("input_size", "num_classes")
    }
    return spec.replaced(
        {
            **model,
            "model.num_classes": info.model.num_classes or None,
            "train.stage": info.stage,
            "dataset.augmentation.input_size": info.model.input_size,
            "dataset.augmentation.mean": info.mean,
            "dataset.augmentation.std": info.std,
        }
    )


def _check_request(spec: ExperimentSpec, action: str, checkpoint: Checkpoint, info: CheckpointInfo) -> None:
    said: dict[str, tuple[object, object]] = {
        "train.stage": (spec.train.stage, info.stage),
        "model.arch": (spec.model.arch, info.model.arch),
        "model.in_chans": (spec.model.in_chans, info.model.in_chans),
    }
    if info.model.num_classes:
        said["model.num_classes"] = (spec.model.num_classes, info.model.num_classes)
    for key, (asked, held) in said.items():
        if spec.typed(key) and asked is not None and asked != held:
            raise SpecError(
                f"{key} is {asked}, but {action}.checkpoint ({checkpoint.path.name}) holds {held}.",
                f"Remove {key}, or give a checkpoint with {key}={asked}.",
            )


def _check_size(config: ModelConfig) -> None:
    height, width = config.input_size
    if height % config.unit or width % config.unit:
        raise SpecError(
            f"dataset.augmentation.input_size: {height} x {width} is not a multiple of the checkpoint's "
            f"{config.unit}-px unit.",
            f"Use multiples of {config.unit}, or leave input_size out: the checkpoint knows its own.",
        )
