"""The trained model that evaluate and inference look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from openmae.actions.run import blaming
from openmae.errors import CheckpointError, SpecError
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.models.weights import Checkpoint, CheckpointInfo, load_into, read_checkpoint
from openmae.spec.architectures import visible_units
from openmae.spec.checks import INERT
from openmae.spec.schema import ExperimentSpec
from openmae.training.checkpoints import BEST

_MODEL_KEYS = ("arch", "in_chans", "patch_size", "global_pool", "decoder_depth", "decoder_embed_dim", "norm_pix_loss")
_SIZE = "dataset.augmentation.input_size"


def open_checkpoint(spec: ExperimentSpec, action: Literal["evaluate", "inference"]) -> tuple[nn.Module, CheckpointInfo]:
    """Build the checkpoint's model, with its weights, in eval mode.

    What the checkpoint says of the model stands; the spec may only change the input size and the mask ratio.

    Returns:
        A ``MaskedAutoencoder`` or a timm classifier, and the checkpoint's information with the settings that act.

    Raises:
        SpecError: the spec says otherwise (stage, architecture, classes, channels), or no unit would be visible.
        CheckpointError: the file cannot be used.
    """
    path = _checkpoint_path(spec, action)
    with blaming(f"{action}.checkpoint"):
        checkpoint = read_checkpoint(path)
        info = checkpoint.info
        if info is None:
            raise CheckpointError(
                f"{path} holds weights of another program ({checkpoint.weights.layout} layout).",
                "Give it to mae train as train.pretrained_model_path first.",
            )
        if info.stage == "pretrain" and not checkpoint.weights.rest:
            raise CheckpointError(
                f"{path} holds the backbone alone, and {action} reconstructs besides.",
                f"Give the checkpoint beside it, such as {checkpoint.path.with_name(BEST)}.",
            )
    _check_request(spec, action, checkpoint, info)
    config = info.model
    if spec.typed(_SIZE):
        config = replace(config, input_size=spec.dataset.augmentation.size)
    if spec.model.mask_ratio is not None and spec.typed("model.mask_ratio"):
        config = replace(config, mask_ratio=spec.model.mask_ratio)
    _check_geometry(config, masked=info.stage == "pretrain")
    model = build_classifier(config) if info.stage == "finetune" else build_autoencoder(config)
    with blaming(f"{action}.checkpoint"):
        load_into(model, checkpoint, part="everything")
    return model.eval(), replace(info, model=config)


def resolve_model(spec: ExperimentSpec, info: CheckpointInfo) -> ExperimentSpec:
    """The spec with the checkpoint's own settings in place of defaults that do not act.

    The seed fixes the masks of validation, the interpolation its pixels: with the training's own, evaluation gives
    the training's numbers. The batch size is one that the training's machine could take.
    """
    model = {f"model.{key}": value for key, value in info.model.to_dict().items() if key != "input_size"}
    values: dict[str, Any] = {
        **model,
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


def _checkpoint_path(spec: ExperimentSpec, action: str) -> str:
    section = getattr(spec, action)
    key, path = ("checkpoint", section.checkpoint) if section.checkpoint else ("trt_engine", section.trt_engine)
    if key == "trt_engine" or path.lower().endswith((".onnx", ".engine", ".plan")):
        raise SpecError(
            f"{action}.{key}: this version runs checkpoints only, no ONNX file and no TensorRT engine; got {path}.",
            f"Set {action}.checkpoint to a .pth file that mae train wrote.",
        )
    return path


def _check_request(spec: ExperimentSpec, action: str, checkpoint: Checkpoint, info: CheckpointInfo) -> None:
    """What was typed must be what the checkpoint holds."""
    said: dict[str, tuple[Any, Any]] = {"train.stage": (spec.train.stage, info.stage)}
    for name in _MODEL_KEYS:
        if f"model.{name}" not in INERT[info.stage]:
            said[f"model.{name}"] = (getattr(spec.model, name), getattr(info.model, name))
    said["model.patch_size"] = (spec.model.patch_size, info.model.unit)
    if info.model.num_classes:
        said["model.num_classes"] = (spec.model.num_classes, info.model.num_classes)
    for name in ("mean", "std"):
        said[f"dataset.augmentation.{name}"] = (getattr(spec.dataset.augmentation, name), getattr(info, name))
    for key, (asked, held) in said.items():
        if spec.typed(key) and asked is not None and asked != held:
            raise SpecError(
                f"{key} is {asked}, but {action}.checkpoint ({checkpoint.path}) holds {key}={held}.",
                f"Remove {key} (the checkpoint knows its own), or give a checkpoint with {key}={asked}.",
            )


def _look_up(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _check_geometry(config: ModelConfig, *, masked: bool) -> None:
    """The rules of ``spec.checks``, for a model that the spec did not know of."""
    (height, width), unit = config.input_size, config.unit
    if height % unit or width % unit:
        near = " or ".join(str(max(unit, side // unit * unit)) for side in (height, height + unit))
        raise SpecError(
            f"{_SIZE}: {height}x{width} is not a multiple of {unit}, the side of the units of the checkpoint's "
            f"{config.arch}.",
            f"Use multiples of {unit}, such as {near}, or leave input_size out: the checkpoint knows its own.",
        )
    units = (height // unit) * (width // unit)
    visible = visible_units(units, config.mask_ratio)
    if masked and not 0 < visible < units:
        raise SpecError(
            f"model.mask_ratio: {config.mask_ratio:g} leaves {visible} of {units} units visible ({height}x{width} "
            f"pixels, {unit} pixels a unit); some must be visible and some masked.",
            f"Use another model.mask_ratio, or a larger {_SIZE}.",
        )
