from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import Tensor, nn

from openmae.models.build import (
    ModelConfig,
    build_autoencoder,
    build_classifier,
    build_encoder,
    build_feature_extractor,
    validate,
)
from openmae.spec.architectures import ARCHITECTURES, get_architecture

pytestmark = pytest.mark.integration

# Millions of parameters with a head of 1000 classes, as timm's results tables and the papers publish them.
PUBLISHED = {
    "convnextv2_atto": 3.71,
    "convnextv2_femto": 5.23,
    "convnextv2_pico": 9.07,
    "convnextv2_nano": 15.62,
    "convnextv2_tiny": 28.64,
    "convnextv2_base": 88.72,
    "convnextv2_large": 197.96,
    "convnextv2_huge": 660.29,
    "hiera_tiny_224": 27.91,
    "hiera_small_224": 35.01,
    "hiera_base_224": 51.52,
    "hiera_base_plus_224": 69.90,
    "hiera_large_224": 213.74,
    "hiera_huge_224": 672.78,
    "vit_tiny_patch16": 5.72,
    "vit_small_patch16": 22.05,
    "vit_base_patch16": 86.57,
    "vit_large_patch16": 304.33,
    "vit_huge_patch14": 632.05,
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_sizes_cover_every_architecture() -> None:
    assert set(PUBLISHED) == set(ARCHITECTURES)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_architecture_has_its_published_size(arch: str) -> None:
    row = get_architecture(arch)
    config = ModelConfig(
        arch,
        mask_ratio=row.mask_ratio,
        decoder_depth=row.decoder_depth,
        decoder_embed_dim=row.decoder_embed_dim,
        drop_path_rate=row.pretrain_drop_path,
    )
    with torch.device("meta"):
        autoencoder = build_autoencoder(config)
        classifier = build_classifier(ModelConfig(arch, num_classes=1000))
        reference = timm.create_model(row.timm_name, num_classes=0)
    assert count(classifier) / 1e6 == pytest.approx(PUBLISHED[arch], abs=0.006)
    assert count(autoencoder.encoder.backbone) == count(reference)
    assert autoencoder.encoder.unit == row.mask_unit == config.unit
    assert autoencoder.num_units == (224 // row.mask_unit) ** 2
    assert autoencoder.encoder.token_size == (16 if row.family == "hiera" else row.mask_unit)
    assert autoencoder.decoder.predict.out_features == autoencoder.encoder.token_size**2 * 3
    assert len(autoencoder.decoder.blocks) == row.decoder_depth


@pytest.mark.parametrize("arch", ["vit_tiny_patch16", "hiera_tiny_224", "convnextv2_atto"])
def test_pretrained_backbone_loads_into_the_classifier(arch: str) -> None:
    encoder = build_encoder(ModelConfig(arch, (64, 96)))
    classifier = build_classifier(ModelConfig(arch, (64, 96), num_classes=7))
    keys = classifier.load_state_dict(encoder.backbone.state_dict(), strict=False)
    if get_architecture(arch).family == "vit":  # normalised after pooling, not before: a new norm
        assert keys.missing_keys == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
        assert keys.unexpected_keys == ["norm.weight", "norm.bias"]
    else:
        assert keys.missing_keys == ["head.fc.weight", "head.fc.bias"]
        assert not keys.unexpected_keys
    assert classifier(torch.randn(2, 3, 64, 96)).shape == (2, 7)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16", "hiera_tiny_224", "convnextv2_atto"])
def test_feature_extractor_uses_the_complete_backbone(arch: str, randomise, assert_near) -> None:
    encoder = build_encoder(ModelConfig(arch, (64, 96)))
    randomise(encoder.backbone)
    extractor = build_feature_extractor(ModelConfig(arch, (64, 96))).eval()
    extractor.load_state_dict(encoder.backbone.state_dict())
    images = torch.randn(2, 3, 64, 96)
    features = encoder.backbone.eval().forward_features(images)
    expected = pooled(encoder, features)
    assert_near(extractor(images), expected, 1e-5)
    assert_near(encoder.embed(images), expected, 1e-5)


def pooled(encoder: nn.Module, features: Tensor) -> Tensor:
    if encoder.num_prefix_tokens:
        return features[:, 1:].mean(dim=1)
    mean = features.mean(dim=1) if features.ndim == 3 else features.mean(dim=(2, 3))
    norm = encoder.backbone.head.norm
    return nn.functional.layer_norm(mean, mean.shape[1:], norm.weight, norm.bias, norm.eps)


def test_vit_without_pooling_uses_the_class_token() -> None:
    config = ModelConfig("vit_tiny_patch16", (32, 32), num_classes=5, global_pool=False)
    classifier = build_classifier(config)
    assert isinstance(classifier.norm, nn.LayerNorm)
    assert isinstance(classifier.fc_norm, nn.Identity)
    assert 0 < classifier.head.weight.std().item() < 1e-4


@pytest.mark.parametrize(
    ("arch", "bias"), [("vit_tiny_patch16", 0.0), ("hiera_tiny_224", 2e-5), ("convnextv2_atto", 0.0)]
)
def test_new_head_is_initialised_as_in_the_official_code(arch: str, bias: float) -> None:
    """``trunc_normal_(head.weight, std=2e-5)``; Hiera's .02 times its head_init_scale of .001 is the same."""
    head = build_classifier(ModelConfig(arch, (32, 32), num_classes=100)).get_classifier()
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert (head.bias == bias).all()


@pytest.mark.parametrize("arch", ["vit_tiny_patch16", "hiera_tiny_224", "convnextv2_atto"])
@pytest.mark.parametrize("in_chans", [1, 4])
def test_input_options_reach_the_model(arch: str, in_chans: int) -> None:
    config = ModelConfig(arch, (96, 64), in_chans=in_chans, decoder_depth=1, decoder_embed_dim=64)
    model = build_autoencoder(config)
    assert model.num_units == 96 * 64 // config.unit**2
    assert model.decoder.predict.out_features == model.encoder.token_size**2 * in_chans
    assert build_feature_extractor(config)(torch.randn(1, in_chans, 96, 64)).ndim == 2


def test_patch_size_and_drop_path_reach_the_model() -> None:
    config = ModelConfig("vit_tiny_patch16", (32, 48), patch_size=8, drop_path_rate=0.2)
    encoder = build_encoder(config)
    assert (config.unit, encoder.unit, encoder.grid) == (8, 8, (4, 6))
    assert encoder.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16", "hiera_tiny_224", "convnextv2_atto"])
def test_every_trainable_parameter_contributes_to_the_loss(arch: str, draw_mask) -> None:
    """DDP would hang otherwise: it waits for the gradient of every trainable parameter."""
    model = build_autoencoder(ModelConfig(arch, (64, 64), decoder_depth=1, decoder_embed_dim=64))
    mask = draw_mask(2, model.num_units, model.num_units // 2)
    model(torch.randn(2, 3, 64, 64), mask).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


def test_config_survives_json() -> None:
    config = ModelConfig("vit_tiny_patch16", (64, 96), in_chans=4, patch_size=8, num_classes=3, global_pool=False)
    values = json.loads(json.dumps(config.to_dict()))
    assert validate(ModelConfig, values) == config
    assert validate(ModelConfig, config.to_dict()) == config
