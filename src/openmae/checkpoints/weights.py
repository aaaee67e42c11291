"""Load a checkpoint's weights into a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from openmae.checkpoints.format import Checkpoint, CheckpointInfo, read_checkpoint
from openmae.checkpoints.matching import LoadReport, complaint, match
from openmae.data.transforms import crop_pct
from openmae.errors import CheckpointError, SpecError
from openmae.models.build import ModelConfig, build_classifier, build_feature_extractor
from openmae.spec.resolved import DEFAULT_MEAN, DEFAULT_STD
from openmae.storage.encryption import resolve_key


def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    part: Literal["backbone", "everything"],
    allow_partial: bool = False,
) -> LoadReport:
    """Copy a checkpoint's weights into a masked autoencoder or a timm model.

    Position embeddings are resampled to the model's grid, the first convolution to its channels and patch size.
    ``part="backbone"`` requires 95 % of the backbone, and also copies a classifier, decoder and fusion heads that fit;
    ``"everything"`` requires the complete model, as evaluation does. With ``allow_partial``, missing weights keep their
    initial values instead of raising an error, unless the file is of another family.

    Raises:
        CheckpointError: Too few weights matched; the message gives the share, names, shapes and likely architecture.
    """
    source = checkpoint.info.model if checkpoint.info else None
    report, fitted = match(model, checkpoint.weights, source, everything=part == "everything")
    if report.sufficient or (allow_partial and report.partial):
        model.load_state_dict(fitted, strict=False)
        return report
    raise complaint(report, checkpoint.weights, source, checkpoint.path)


def load_backbone(
    checkpoint: str | Path,
    input_size: int | tuple[int, int] | None = None,
    arch: str | None = None,
    *,
    encryption_key: str = "",
    weights_key: str = "",
) -> nn.Module:
    """Return a timm model in eval mode with a checkpoint's weights.

    The model of a pretrained checkpoint returns embeddings ``[B, D]``, that of a fine-tuned one class logits.
    ``timm.data.resolve_model_data_config(model)`` returns the matching image size, mean, standard deviation and
    resizing; for files of other programs, which do not contain them, the papers' values.

    Args:
        checkpoint: an OpenMAE checkpoint or ``backbone.safetensors``, or a timm, official, transformers or TAO file.
        input_size: side in pixels, or (height, width); None keeps the checkpoint's.
        arch: a name of the architecture table; only needed if the shapes of another program's file fit none.
        encryption_key: key of an encrypted file: ``env:NAME``, ``file:PATH``, or the key itself.
        weights_key: entry of the file to use, such as ``model_ema``, if there are several.

    Raises:
        CheckpointError: The file cannot be used, holds another architecture, or lacks weights that affect the outputs.
        SpecError: ``input_size`` is not a multiple of the patch or mask unit, or the key cannot be found.
    """
    loaded = read_checkpoint(checkpoint, resolve_key(encryption_key), weights_key)
    config = loaded.config(arch)
    if arch is not None and arch != config.arch:
        raise CheckpointError(
            f"{loaded.path} holds {config.arch}, not {arch}.", f"Use arch={config.arch!r}, or leave arch out."
        )
    if input_size is not None:
        config = replace(config, input_size=(input_size, input_size) if isinstance(input_size, int) else input_size)
    check_size(config)
    finetuned = loaded.info.stage == "finetune" if loaded.info else loaded.num_classes > 0
    build = build_classifier if finetuned or "fc_norm.weight" in loaded.weights.backbone else build_feature_extractor
    model: Any = build(replace(config, num_classes=loaded.num_classes))
    report = load_into(model, loaded, part="everything" if loaded.info else "backbone")
    missing = [name for name in report.fresh if name != "head" or loaded.weights.family != "convnextv2"]
    if missing:
        raise CheckpointError(
            f"{loaded.path} lacks {', '.join(missing)}: {config.arch} would give other outputs than the model that "
            "wrote it.",
            "Use a complete checkpoint; mae train accepts this one as train.pretrained_model_path.",
        )
    _set_data_config(model, config, loaded.info)
    return model.eval()


def check_size(config: ModelConfig, *, masked: bool = False) -> None:
    """Check that images divide into a ViT's patches or a Hiera's mask units.

    A ConvNeXt takes images of any size unless they are to be ``masked``.

    Raises:
        SpecError: They do not divide into them.
    """
    any_size = config.architecture.family == "convnextv2" and not masked
    if any_size or not any(side % config.unit for side in config.input_size):
        return
    near = (max(1, round(side / config.unit)) * config.unit for side in config.input_size)
    raise SpecError(
        f"input size {_sides(config.input_size)} is not a multiple of {config.unit}, the side of {config.arch}'s "
        "units in pixels.",
        f"Use {_sides(near)}, or leave it unset to keep the checkpoint's size.",
    )


def _sides(size: Iterable[int]) -> str:
    return "x".join(map(str, size))


def _set_data_config(model: Any, config: ModelConfig, info: CheckpointInfo | None) -> None:
    """Replace ``pretrained_cfg`` so that timm's tools prepare images as OpenMAE's evaluation does."""
    kept = ("fixed_input_size", "pool_size", "first_conv", "classifier")
    mean, std = (info.mean, info.std) if info else ((), ())
    model.pretrained_cfg = {
        **dict.fromkeys(model.pretrained_cfg),
        **{name: model.pretrained_cfg.get(name) for name in kept},
        "url": "",
        "source": "",
        "architecture": config.architecture.timm_name,
        "tag": f"openmae_{info.stage}" if info else "",
        "input_size": (config.in_chans, *config.input_size),
        "interpolation": "bicubic",
        "crop_pct": crop_pct(config.input_size),
        "crop_mode": "center",
        "mean": mean or DEFAULT_MEAN.get(config.in_chans),
        "std": std or DEFAULT_STD.get(config.in_chans),
        "num_classes": model.num_classes,
        "label_names": info.class_names if info and info.class_names else None,
    }
    model.default_cfg = model.pretrained_cfg
