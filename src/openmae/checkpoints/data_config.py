"""What timm's tools must know of a model's images, so that they prepare them as our evaluation does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmae.data.transforms import crop_pct
from openmae.spec.resolved import DEFAULT_MEAN, DEFAULT_STD

if TYPE_CHECKING:
    from openmae.checkpoints.format import CheckpointInfo
    from openmae.models.build import ModelConfig


def describe(model: Any, config: ModelConfig, info: CheckpointInfo | None) -> None:
    """Replace the ``pretrained_cfg`` of the timm model that ``model`` was built like by its own.

    Args:
        model: a timm model.
        config: its shape.
        info: what its checkpoint says; None for another program's, which gets the papers' mean and deviation.
    """
    mean, std = (info.mean, info.std) if info else ((), ())
    own = {
        "url": "",
        "hf_hub_id": None,
        "hf_hub_filename": None,
        "source": "",
        "architecture": config.architecture.timm_name,
        "tag": f"openmae_{info.stage}" if info else "",
        "input_size": (config.in_chans, *config.input_size),
        "test_input_size": None,
        "min_input_size": None,
        "interpolation": "bicubic",
        "crop_pct": crop_pct(config.input_size),
        "test_crop_pct": None,
        "crop_mode": "center",
        "mean": mean or DEFAULT_MEAN.get(config.in_chans),
        "std": std or DEFAULT_STD.get(config.in_chans),
        "num_classes": model.num_classes,
        "label_names": info.class_names if info and info.class_names else None,
        "label_descriptions": None,
        "description": None,
        "license": None,
        "origin_url": None,
        "paper_name": None,
        "paper_ids": None,
        "notes": None,
    }
    kept = ("fixed_input_size", "pool_size", "first_conv", "classifier")
    model.pretrained_cfg = {**{name: model.pretrained_cfg.get(name) for name in kept}, **own}
    model.default_cfg = model.pretrained_cfg
