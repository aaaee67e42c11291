"""Tests that models saved by Hugging Face's transformers give the same features and losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openmae.checkpoints.format import read_checkpoint
from openmae.checkpoints.weights import load_backbone, load_into
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig, build_autoencoder
from openmae.models.masking import mask_from_noise

pytestmark = pytest.mark.integration

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

VIT = {
    "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768, "image_size": 32,
    "layer_norm_eps": 1e-6,
}  # fmt: skip
HIERA = {"image_size": [64, 64], "depths": [1, 2, 7, 2]}
CONVNEXT = {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 6, 2]}
NOISE = torch.tensor([[0.1, 0.9, 0.8, 0.2], [0.9, 0.1, 0.2, 0.8]])


def vit_mae() -> tuple[Any, Callable[[Any, Tensor], Tensor], int]:
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**VIT, mask_ratio=0.0))
    order = torch.arange(4.0).expand(2, 4)
    return model, lambda m, x: m(x, noise=order).last_hidden_state[:, 1:].mean(dim=1), 32


def vit_classifier() -> tuple[Any, Callable[[Any, Tensor], Tensor], int]:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=4))
    return model, lambda m, x: m(x).logits, 32


def vit_with_pooler() -> tuple[Any, Callable[[Any, Tensor], Tensor], int]:
    model = transformers.ViTModel(transformers.ViTConfig(**VIT))
    return model, lambda m, x: m(x).last_hidden_state[:, 1:].mean(dim=1), 32


def hiera_pretrained() -> tuple[Any, Callable[[Any, Tensor], Tensor], int]:
    model = transformers.HieraModel(transformers.HieraConfig(**HIERA, num_query_pool=2))
    return model, lambda m, x: m(x).pooler_output, 64


def hiera_classifier() -> tuple[Any, Callable[[Any, Tensor], Tensor], int]:
    model = transformers.HieraForImageClassification(transformers.HieraConfig(**HIERA, num_labels=4))
    return model, lambda m, x: m(x).logits, 64


def convnext_classifier() -> tuple[Any, Callable[[Any, Tensor], Tensor], int]:
    model = transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**CONVNEXT, num_labels=4))
    return model, lambda m, x: m(x).logits, 64


@pytest.mark.parametrize(
    "make", [vit_mae, vit_classifier, vit_with_pooler, hiera_pretrained, hiera_classifier, convnext_classifier]
)
def test_transformers_file_gives_the_same_outputs(
    make: Callable[[], Any], randomise: Callable[..., None], assert_near: Callable[..., None], tmp_path: Path
) -> None:
    model, forward, side = make()
    randomise(model.eval())
    model.save_pretrained(tmp_path)  # the Hub's names
    torch.save({"state_dict": {f"model.{n}": v for n, v in model.state_dict().items()}}, tmp_path / "lightning.ckpt")
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = forward(model, images)
        for name in ("model.safetensors", "lightning.ckpt"):
            assert_near(load_backbone(tmp_path / name)(images), expected, 1e-5)


def pretraining_pair(family: str) -> tuple[Any, ModelConfig]:
    if family == "vit":
        config = transformers.ViTMAEConfig(
            **VIT, decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
            decoder_intermediate_size=256, norm_pix_loss=True, mask_ratio=0.5,
        )  # fmt: skip
        return transformers.ViTMAEForPreTraining(config), ModelConfig(
            "vit_tiny_patch16", (32, 32), decoder_depth=2, decoder_embed_dim=64
        )
    config = transformers.HieraConfig(
        **HIERA, num_query_pool=2, decoder_hidden_size=64, decoder_depth=2, decoder_num_heads=2, mask_ratio=0.5
    )
    return transformers.HieraForPreTraining(config), ModelConfig(
        "hiera_tiny_224", (64, 64), decoder_depth=2, decoder_embed_dim=64
    )


@pytest.mark.parametrize("family", ["vit", "hiera"])
def test_transformers_pretraining_file_gives_the_same_loss(
    family: str, randomise: Callable[..., None], assert_near: Callable[..., None], tmp_path: Path
) -> None:
    official, config = pretraining_pair(family)
    randomise(official.eval())
    official.save_pretrained(tmp_path)
    model = build_autoencoder(config).eval()
    report = load_into(model, read_checkpoint(tmp_path / "model.safetensors"), part="everything")
    name = {"vit": "ViT", "hiera": "Hiera"}[family]
    assert str(report) == f"loaded 100 % of {config.arch}'s weights from the transformers {name} layout"
    images = torch.randn(2, 3, *config.input_size)
    with torch.no_grad():
        expected = official(images, noise=NOISE).loss
        assert_near(model(images, mask_from_noise(NOISE, num_visible=2)).loss, expected, 1e-5)


def test_dinov2_of_transformers_is_refused_by_its_parts(tmp_path: Path) -> None:
    options = {**VIT, "image_size": 28}
    options.pop("intermediate_size")
    transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**options)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="fit no supported architecture: they have LayerScale, register tokens"):
        load_backbone(tmp_path / "model.safetensors")
