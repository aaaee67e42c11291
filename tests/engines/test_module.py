"""The deployed model gives what its encoder gave in training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openmae.checkpoints.format import CheckpointInfo, read_checkpoint, save_backbone
from openmae.checkpoints.weights import load_into
from openmae.engines.metadata import ModelCard
from openmae.engines.module import DeployedModel, example_input
from openmae.models.build import ModelConfig, build_autoencoder, build_feature_extractor
from openmae.models.normalise import Normaliser

ARCHES = ("vit_tiny_patch16", "convnextv2_atto", "hiera_tiny_224")


@pytest.mark.parametrize("arch", ARCHES)
def test_features_are_the_encoders_embedding_and_tokens_their_map(arch, tmp_path):
    config = ModelConfig(arch, (64, 96), decoder_depth=1, decoder_embed_dim=32)
    torch.manual_seed(0)
    autoencoder = build_autoencoder(config).eval()
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    encoder = autoencoder.encoder
    card = ModelCard("pretrain", config, (0.5,) * 3, (0.25,) * 3)
    info = CheckpointInfo("pretrain", config, mean=card.mean, std=card.std)
    path = save_backbone(tmp_path / "backbone.safetensors", encoder.backbone.state_dict(), info)
    backbone = build_feature_extractor(config)
    load_into(backbone, read_checkpoint(path), part="everything")
    images = example_input(card, 2)
    with torch.no_grad():
        features, tokens = DeployedModel(backbone, card).eval()(images)
        torch.testing.assert_close(features, encoder.embed(images))
    stride = 32 if arch == "convnextv2_atto" else 16
    assert tokens.shape == (2, encoder.dim, 64 // stride, 96 // stride)
    if arch == "vit_tiny_patch16":
        torch.testing.assert_close(tokens.mean(dim=(2, 3)), features)


def test_hiera_tokens_are_at_the_positions_of_their_pixels():
    """If one corner of an image changes, the tokens of that corner change most in the feature map."""
    config = ModelConfig("hiera_tiny_224", (64, 96))
    card = ModelCard("pretrain", config, (0.5,) * 3, (0.25,) * 3)
    torch.manual_seed(0)
    model = DeployedModel(build_feature_extractor(config), card).eval()
    images = example_input(card, 1)
    changed = images.clone()
    changed[:, :, 48:, 80:] += 3  # the last token's square
    with torch.no_grad():
        moved = (model(changed)[1] - model(images)[1]).norm(dim=1)[0]
    assert moved.shape == (4, 6)
    assert moved.argmax() == moved.numel() - 1, f"the last token should move most:\n{moved}"


def test_preprocessing_is_the_datasets_normalisation(deployed):
    model, card = deployed("vit_tiny_patch16", "finetune", preprocessing=True, in_chans=4)
    plain = DeployedModel(model.backbone, replace(card, preprocessing=False)).eval()
    images = example_input(card, 2)
    assert images.dtype == torch.uint8
    assert images.shape == (2, 32, 48, 4)
    with torch.no_grad():
        normalised = Normaliser(card.mean, card.std)(images.permute(0, 3, 1, 2))
        torch.testing.assert_close(model(images)[0], plain(normalised)[0])


def test_nothing_is_masked_or_random(deployed):
    model, card = deployed("vit_tiny_patch16", "pretrain")
    images = example_input(card, 2)
    with torch.no_grad():
        torch.manual_seed(1)
        first = model(images)[0]
        torch.manual_seed(2)
        assert torch.equal(model(images)[0], first)
