"""Tests of loading checkpoints into models, and of what timm's tools read from them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tests.helpers.checkpoints import CONFIGS, CROSS, INFO, SMALL, save_model
from tests.helpers.models import all_visible
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import openmae
from openmae.checkpoints.format import CheckpointInfo, read_checkpoint, save_backbone
from openmae.checkpoints.weights import load_backbone, load_into
from openmae.data.decode import ImageFile
from openmae.data.transforms import EvalTransform
from openmae.errors import CheckpointError, SpecError
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.models.mae import MaskedAutoencoder
from openmae.models.normalise import Normaliser

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("family", CONFIGS)
def test_pretrained_checkpoint_is_restored_completely(
    family: str, files: dict[str, Path], pretrained: dict[str, MaskedAutoencoder], built: Callable[..., Any]
) -> None:
    model = built(build_autoencoder, CONFIGS[family])
    checkpoint = read_checkpoint(files[family])
    report = load_into(model, checkpoint, part="everything")
    assert checkpoint.info == replace(INFO, model=CONFIGS[family])
    expected = f"loaded 100 % of {CONFIGS[family].arch}'s weights from the OpenMAE layout"
    assert str(report) == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pretrained[family].parameters(), strict=True))


@pytest.mark.parametrize("family", CONFIGS)
def test_load_backbone_of_pretrained_checkpoint_gives_embeddings(
    family: str,
    files: dict[str, Path],
    pretrained: dict[str, MaskedAutoencoder],
    assert_near: Callable[..., None],
) -> None:
    backbone = openmae.load_backbone(files[family])
    assert not backbone.training
    images = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        embedding = backbone(images)
        assert torch.equal(embedding, backbone(images))
        if family == "vit":
            encoder = pretrained[family].encoder
            latent = encoder(images, all_visible(2, 8).visible_BV)
            assert_near(embedding, latent[:, 1:].mean(1), 1e-5)
    assert embedding.shape == (2, pretrained[family].encoder.dim)


@pytest.mark.parametrize("global_pool", [True, False])
def test_load_backbone_of_fine_tuned_checkpoint_gives_logits(
    global_pool: bool, tmp_path: Path, randomise: Callable[..., None], built: Callable[..., Any]
) -> None:
    config = replace(SMALL, num_classes=3, global_pool=global_pool)
    model = built(build_classifier, config).eval()
    randomise(model)
    info = replace(INFO, stage="finetune", model=config, class_names=("ant", "bee", "fly"))
    files = (
        save_model(tmp_path / "model.ckpt", model, info),
        save_backbone(tmp_path / "backbone.safetensors", model.state_dict(), info),
    )
    images = torch.randn(2, 3, 32, 64)
    for path in files:
        assert read_checkpoint(path).info == info
        with torch.no_grad():
            assert torch.equal(load_backbone(path)(images), model(images))


def test_importing_openmae_does_not_import_torch() -> None:
    code = "import openmae, sys; assert 'torch' not in sys.modules; assert 'load_backbone' in dir(openmae)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        openmae.nothing  # noqa: B018


@pytest.mark.parametrize("family", CROSS)
def test_checkpoint_with_cross_attention_is_restored_and_resized(
    family: str, tmp_path: Path, randomise: Callable[..., None], built: Callable[..., Any]
) -> None:
    source = built(build_autoencoder, CROSS[family])
    randomise(source)
    checkpoint = read_checkpoint(save_model(tmp_path / "cross.pth", source, replace(INFO, model=CROSS[family])))
    assert checkpoint.info is not None
    assert checkpoint.info.model == CROSS[family]
    model = build_autoencoder(checkpoint.info.model)
    load_into(model, checkpoint, part="everything")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    larger = build_autoencoder(replace(CROSS[family], input_size=(64, 64)))
    assert load_into(larger, checkpoint, part="everything").resized == ("pos_embed", "decoder.pos_embed")


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("input_size", [(64, 64), 96])
def test_another_input_size_loads_and_runs(
    family: str, input_size: int | tuple[int, int], files: dict[str, Path], built: Callable[..., Any]
) -> None:
    model = load_backbone(files[family], input_size)
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()
    autoencoder = built(build_autoencoder, replace(CONFIGS[family], input_size=size))
    report = load_into(autoencoder, read_checkpoint(files[family]), part="everything")
    positions = {"vit": ("pos_embed", "decoder.pos_embed"), "hiera": ("pos_embed", "decoder.pos_embed")}
    assert report.resized == positions.get(family, ())
    units = autoencoder.num_units
    visible = torch.arange(units - 1)[None]
    with torch.no_grad():
        assert autoencoder.encoder(torch.randn(1, 3, *size), visible).isfinite().all()


def test_load_backbone_derives_a_foreign_files_model(tmp_path: Path, built: Callable[..., Any]) -> None:
    config = ModelConfig("vit_tiny_patch16", (32, 32), in_chans=1, patch_size=8, num_classes=2)
    model = built(build_classifier, config).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "f.pth")
    loaded = load_backbone(tmp_path / "f.pth")
    images = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_load_backbone_refuses_another_architecture_or_size(files: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="holds vit_tiny_patch16, not vit_base_patch16"):
        load_backbone(files["vit"], arch="vit_base_patch16")
    with pytest.raises(SpecError, match=r"100x100 is not a multiple of 32.*\n.*Use 96x96"):
        load_backbone(files["hiera"], 100)


def test_load_backbone_asks_for_the_architecture_of_unknown_shapes(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0, img_size=32)
    torch.save(model.state_dict(), tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=r"fit no supported architecture.*\n  Fix: Name the closest one"):
        load_backbone(tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match="% of vit_tiny_patch16's backbone"):
        load_backbone(tmp_path / "f.pth", arch="vit_tiny_patch16")


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
    """An image with large, smooth structures: two resampling orders differ by rounding only."""
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
def test_timm_prepares_images_as_evaluation_does(config: ModelConfig, kept: float, photo: Path, tmp_path: Path) -> None:
    model = load_backbone(save(tmp_path / "backbone.safetensors", config))
    found = resolve_model_data_config(model)
    assert found == {
        "input_size": (3, *config.input_size), "interpolation": "bicubic", "mean": MEAN, "std": STD,
        "crop_pct": kept, "crop_mode": "center",
    }  # fmt: skip
    with Image.open(photo) as image:
        expected = create_transform(**found)(image.convert("RGB"))
    with ImageFile(photo) as picture:
        own = EvalTransform(config.input_size)(picture)
    assert (Normaliser(MEAN, STD)(own[None])[0] - expected).abs().mean() < 0.03


def test_pretrained_cfg_describes_the_model(tmp_path: Path) -> None:
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


def test_another_input_size_is_in_pretrained_cfg(tmp_path: Path) -> None:
    path = save(tmp_path / "b.safetensors", ModelConfig("vit_tiny_patch16", (96, 96)))
    found = resolve_model_data_config(load_backbone(path, (256, 320)))
    assert (found["input_size"], found["crop_pct"]) == ((3, 256, 320), 1.0)


def test_foreign_file_gets_mean_and_std_of_the_papers(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)  # of timm's own weights
    torch.save({"model": model.state_dict()}, tmp_path / "f.pth")
    loaded = load_backbone(tmp_path / "f.pth")
    found = resolve_model_data_config(loaded)
    assert (found["mean"], found["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (found["input_size"], found["interpolation"], found["crop_pct"]) == ((3, 32, 32), "bicubic", 0.875)
    assert (loaded.pretrained_cfg["num_classes"], loaded.pretrained_cfg["tag"]) == (3, "")


def test_backbone_safetensors_is_a_checkpoint_for_timm(tmp_path: Path, assert_near: Callable[..., None]) -> None:
    """timm reads the weights from ``checkpoint_path``; mean, std and sizes must be passed to it."""
    config = ModelConfig("vit_tiny_patch16", (32, 32), num_classes=3)
    path = save(tmp_path / "backbone.safetensors", config)
    own_model: nn.Module = load_backbone(path)
    cfg = {name: own_model.pretrained_cfg[name] for name in ("mean", "std", "input_size", "interpolation", "crop_pct")}
    timm_model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=3, global_pool="avg", checkpoint_path=str(path),
        pretrained_cfg_overlay=cfg,
    )  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_near(timm_model.eval()(images), own_model(images), 1e-6)
    assert resolve_model_data_config(timm_model) == resolve_model_data_config(own_model)
