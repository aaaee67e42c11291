from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

from openmae.models.encoders import HieraEncoder
from openmae.models.masking import all_visible

SIZES = [(64, 64), (64, 96), (128, 64)]


def small_hiera(size: tuple[int, int], seed: int, randomise) -> HieraEncoder:
    backbone = timm.create_model("hiera_tiny_224", num_classes=0, img_size=size, embed_dim=16, stages=(1, 2, 2, 1))
    encoder = HieraEncoder(backbone, size).double()
    randomise(encoder, seed)
    return encoder


def boolean(visible: Tensor, units: int) -> Tensor:
    """timm's mask: True is kept."""
    return torch.zeros(len(visible), units, dtype=torch.bool).scatter(1, visible, True)


def fused_features(encoder: HieraEncoder, images: Tensor, keep: Tensor) -> Tensor:
    """Multi-scale fusion as in facebookresearch/hiera ``hiera_mae.py``, from timm's own intermediates.

    Every pooled stage's units, ``[B, V, side, side, C]``, shrink to one vector by a full-size kernel; the
    last stage joins unchanged; the sum is normalised.
    """
    hiera = encoder.backbone
    _, stages = hiera.forward_features(images, mask=keep, return_intermediates=True)
    total = stages[-1][:, :, 0, 0]
    for head, stage in zip(encoder.fusion, stages[: hiera.q_pool], strict=True):
        assert stage.shape[2:4] == head.weight.shape[2:]
        total = total + torch.einsum("bvijc,dcij->bvd", stage, head.weight) + head.bias
    return hiera.head.norm(total)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_without_fusion_equals_timms_masked_forward(size, seed, randomise, draw_mask, assert_near) -> None:
    encoder = small_hiera(size, seed, randomise)
    for parameter in encoder.fusion.parameters():
        parameter.data.zero_()
    units = encoder.grid[0] * encoder.grid[1]
    images = torch.randn(3, 3, *size).double()
    visible = draw_mask(3, units, 1 + seed, seed).visible_BV
    hiera = encoder.backbone
    expected = hiera.head.norm(hiera.forward_features(images, mask=boolean(visible, units)))
    assert_near(encoder(images, visible), expected, 1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_unmasked_without_fusion_equals_timms_forward(size, randomise, assert_near) -> None:
    encoder = small_hiera(size, 0, randomise)
    for parameter in encoder.fusion.parameters():
        parameter.data.zero_()
    images = torch.randn(2, 3, *size).double()
    hiera = encoder.backbone
    expected = hiera.head.norm(hiera.forward_features(images))
    visible = all_visible(2, encoder.grid[0] * encoder.grid[1]).visible_BV
    assert_near(encoder(images, visible), expected, 1e-10)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_fusion_equals_the_official_ones(size, seed, randomise, draw_mask, assert_near) -> None:
    encoder = small_hiera(size, seed, randomise)
    units = encoder.grid[0] * encoder.grid[1]
    images = torch.randn(3, 3, *size).double()
    visible = draw_mask(3, units, 1 + seed, seed).visible_BV
    expected = fused_features(encoder, images, boolean(visible, units))
    actual = encoder(images, visible)
    assert_near(actual, expected, 1e-10)

    cotangent = torch.randn_like(expected)
    parameters = dict(encoder.named_parameters())
    grads = [torch.autograd.grad(x, list(parameters.values()), cotangent) for x in (actual, expected)]
    for one, other in zip(*grads, strict=True):
        assert_near(one, other, 1e-10)


def test_published_model_at_its_own_size(randomise, draw_mask, assert_near) -> None:
    encoder = HieraEncoder(timm.create_model("hiera_tiny_224", num_classes=0), (224, 224))
    randomise(encoder)
    images, visible = torch.randn(2, 3, 224, 224), draw_mask(2, 49, 19).visible_BV
    with torch.no_grad():
        assert_near(encoder(images, visible), fused_features(encoder, images, boolean(visible, 49)), 1e-5)
