"""Tests of the comparison of headers with tensors, and of deriving a model from shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tests.helpers.checkpoints import State, behind, classifier_payload

from openmae.checkpoints.foreign_names import NamedWeights, recognise
from openmae.checkpoints.format import CheckpointInfo, read_checkpoint
from openmae.checkpoints.shapes import likely_arch
from openmae.checkpoints.weights import load_backbone
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig, build_autoencoder
from openmae.spec.architectures import ARCHITECTURES

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"num_classes": 8_000_000}, "num_classes is 8000000, but the tensors have 2 outputs"),
        ({"input_size": [4096, 4096]}, r"input_size is \[4096, 4096\], but the tensors have positions of 5 tokens"),
        ({"patch_size": 1}, "patch_size is 1, but the tensors have patches of 16"),
        ({"in_chans": 4096}, "in_chans is 4096, but the tensors have 3 channels"),
        ({"arch": "vit_huge_patch14"}, "arch is vit_huge_patch14, but the tensors have the shapes of vit_tiny_patch16"),
        ({"arch": "convnextv2_huge"}, "arch is convnextv2_huge, but the tensors have the shapes of vit_tiny_patch16"),
        ({"num_classes": 10**30}, "damaged or of another version.*num_classes is 10{30}"),
        ({"input_size": [-32, 32]}, r"damaged or of another version.*input_size.0 is -32"),
        ({"input_size": "ab"}, "damaged or of another version"),
        ({"arch": ["vit_tiny_patch16"]}, "damaged or of another version"),
        ({"decoder_depth": 1.5}, "damaged or of another version.*decoder_depth is 1.5"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_header_is_compared_with_tensors_before_anything_is_built(
    header: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(
        classifier_payload(ModelConfig("vit_tiny_patch16", (32, 32), num_classes=2), **header), tmp_path / "f.pth"
    )
    for build in ("build_classifier", "build_feature_extractor"):
        monkeypatch.setattr(f"openmae.checkpoints.weights.{build}", lambda config: pytest.fail(f"built {config}"))
    with pytest.raises(CheckpointError, match=said):
        load_backbone(tmp_path / "f.pth")


def test_classifier_of_another_width_is_refused_before_it_is_built(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight million classes of two features are 66 MB in a file, and 6 GB in the model."""
    for build in ("build_classifier", "build_feature_extractor"):
        monkeypatch.setattr(f"openmae.checkpoints.weights.{build}", lambda config: pytest.fail(f"built {config}"))
    config = ModelConfig("vit_tiny_patch16", (32, 32), num_classes=2)
    content = classifier_payload(config, num_classes=300)
    content["state_dict"] |= {"model.head.weight": torch.zeros(300, 2), "model.head.bias": torch.zeros(300)}
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=r"has 192 features, but the file has a classifier of \[300, 2\]"):
        load_backbone(tmp_path / "f.pth")
    torch.save({**state, "head.weight": torch.zeros(300, 2)}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=r"has 192 features, but the file has a classifier of \[300, 2\]"):
        load_backbone(tmp_path / "f.pth")


def test_decoder_in_header_is_compared_with_tensors(tmp_path: Path) -> None:

    config = ModelConfig("vit_tiny_patch16", (32, 32), decoder_depth=1, decoder_embed_dim=32)
    state = behind("model.", build_autoencoder(config).state_dict())
    info = CheckpointInfo("pretrain", replace(config, decoder_depth=4000, decoder_embed_dim=65536))
    torch.save({"openmae": info.to_dict(), "state_dict": state}, tmp_path / "f.pth")
    text = "decoder_depth is 4000, but the tensors have 1 blocks; decoder_embed_dim is 65536"
    with pytest.raises(CheckpointError, match=text):
        read_checkpoint(tmp_path / "f.pth")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architecture_is_derived_from_shapes(arch: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(ARCHITECTURES[arch].timm_name, num_classes=3, in_chans=1).state_dict()
    assert likely_arch(recognise(state)) == arch


def test_unknown_shapes_have_no_architecture() -> None:
    weights = NamedWeights("timm ViT", "vit", {"blocks.0.norm1.weight": torch.zeros(7)}, {})
    assert likely_arch(weights) is None
