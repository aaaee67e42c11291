"""What timm's tools read from a model of load_backbone, and what they make of an image with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from openmae.checkpoints.format import CheckpointInfo, load_backbone, save_backbone
from openmae.data.decode import ImageFile
from openmae.data.normalise import Normaliser
from openmae.data.transforms import EvalTransform
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.21, 0.22)


def save(path: Path, config: ModelConfig) -> Path:
    build = build_classifier if config.num_classes else build_autoencoder
    model: Any = build(config)
    backbone = model if config.num_classes else model.encoder.backbone
    stage = "finetune" if config.num_classes else "pretrain"
    names = tuple("abc"[: config.num_classes])
    return save_backbone(path, backbone.state_dict(), CheckpointInfo(stage, config, names, MEAN, STD))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture with large, smooth structures: two resampling orders differ by rounding only."""
    y, x = np.mgrid[0:300, 0:400] / 60.0
    pixels = np.stack([127 + 100 * np.sin(x + k) * np.cos(y - k) for k in range(3)], axis=-1)
    Image.fromarray(pixels.round().astype(np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (ModelConfig("vit_tiny_patch16", (96, 96), num_classes=3), 0.875),
        (ModelConfig("convnextv2_atto", (256, 256)), 1.0),
        (ModelConfig("hiera_tiny_224", (64, 128)), 0.875),
    ],
    ids=["vit", "convnextv2", "hiera"],
)
def test_timm_prepares_images_as_our_evaluation_does(
    config: ModelConfig, kept: float, photo: Path, tmp_path: Path
) -> None:
    model = load_backbone(save(tmp_path / "backbone.safetensors", config))
    found = resolve_model_data_config(model)
    assert found == {
        "input_size": (3, *config.input_size), "interpolation": "bicubic", "mean": MEAN, "std": STD,
        "crop_pct": kept, "crop_mode": "center",
    }  # fmt: skip
    with Image.open(photo) as image:
        theirs = create_transform(**found)(image.convert("RGB"))
    with ImageFile(photo) as picture:
        ours = EvalTransform(config.input_size)(picture)
    assert (Normaliser(MEAN, STD)(ours[None])[0] - theirs).abs().mean() < 0.03


def test_a_model_says_of_itself_what_is_true(tmp_path: Path) -> None:
    config = ModelConfig("vit_tiny_patch16", (32, 64), in_chans=1, num_classes=2)
    model = build_classifier(config)
    info = CheckpointInfo("finetune", config, ("ant", "bee"), (0.3,), (0.1,))
    found = load_backbone(save_backbone(tmp_path / "b.safetensors", model.state_dict(), info)).pretrained_cfg
    assert found["input_size"] == (1, 32, 64)
    assert (found["num_classes"], found["label_names"]) == (2, ("ant", "bee"))
    assert (found["mean"], found["std"]) == ((0.3,), (0.1,))
    assert found["tag"] == "openmae_finetune"
    assert found["architecture"] == "vit_tiny_patch16_224"
    assert (found["license"], found["hf_hub_id"], found["url"]) == (None, None, "")


def test_another_input_size_is_recorded(tmp_path: Path) -> None:
    path = save(tmp_path / "b.safetensors", ModelConfig("vit_tiny_patch16", (96, 96)))
    found = resolve_model_data_config(load_backbone(path, (256, 320)))
    assert (found["input_size"], found["crop_pct"]) == ((3, 256, 320), 1.0)


def test_another_programs_file_gets_the_papers_numbers(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)  # of timm's own weights
    torch.save({"model": model.state_dict()}, tmp_path / "f.pth")
    loaded = load_backbone(tmp_path / "f.pth")
    found = resolve_model_data_config(loaded)
    assert (found["mean"], found["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (found["input_size"], found["interpolation"], found["crop_pct"]) == ((3, 32, 32), "bicubic", 0.875)
    assert (loaded.pretrained_cfg["num_classes"], loaded.pretrained_cfg["tag"]) == (3, "")


def test_backbone_safetensors_is_a_checkpoint_for_timm(tmp_path: Path, assert_near: Callable[..., None]) -> None:
    """``checkpoint_path`` takes the weights; the images' numbers are timm's to be told, from our header."""
    config = ModelConfig("vit_tiny_patch16", (32, 32), num_classes=3)
    path = save(tmp_path / "backbone.safetensors", config)
    ours: nn.Module = load_backbone(path)
    cfg = {name: ours.pretrained_cfg[name] for name in ("mean", "std", "input_size", "interpolation", "crop_pct")}
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=3, global_pool="avg", checkpoint_path=str(path),
        pretrained_cfg_overlay=cfg,
    )  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_near(theirs.eval()(images), ours(images), 1e-6)
    assert resolve_model_data_config(theirs) == resolve_model_data_config(ours)
