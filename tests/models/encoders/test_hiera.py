from __future__ import annotations

import pytest
import timm
import torch
from tests.helpers.models import all_visible
from torch import Tensor

from openmae.models.encoders import HieraEncoder
from openmae.models.masking import split_units

pytestmark = pytest.mark.integration

SIZES = [(64, 64), (64, 96), (128, 64)]


@pytest.fixture(params=[2, 3], ids=["pretraining pools twice", "fine-tuning thrice"])
def q_pool(request) -> int:
    return request.param


def small_hiera(size: tuple[int, int], q_pool: int, seed: int, randomise) -> HieraEncoder:
    options = {"embed_dim": 16, "stages": (1, 2, 2, 2), "q_pool": q_pool}
    encoder = HieraEncoder(timm.create_model("hiera_tiny_224", num_classes=0, img_size=size, **options), size)
    encoder.double()
    randomise(encoder, seed)
    return encoder


def without_fusion(encoder: HieraEncoder) -> HieraEncoder:
    for parameter in encoder.fusion.parameters():
        parameter.data.zero_()
    return encoder


def boolean(visible: Tensor, units: int) -> Tensor:
    """Return timm's mask, where True is visible."""
    return torch.zeros(len(visible), units, dtype=torch.bool).scatter(1, visible, True)


def fused_features(encoder: HieraEncoder, images: Tensor, keep: Tensor) -> Tensor:
    """Fuse timm's intermediate outputs as facebookresearch/hiera's ``hiera_mae.py`` does.

    Every pooled stage's units, ``[B, V, side, side, C]``, shrink to the last stage's t x t by a kernel of side / t;
    the last stage joins unchanged; the sum is normalised.
    """
    hiera = encoder.backbone
    _, stages = hiera.forward_features(images, mask=keep, return_intermediates=True)
    total = stages[-1]
    t = total.shape[2]
    for head, stage in zip(encoder.fusion, stages[: hiera.q_pool], strict=True):
        B, V, side, _, C = stage.shape
        squares = stage.reshape(B, V, t, side // t, t, side // t, C)
        total = total + torch.einsum("bvyixjc,dcij->bvyxd", squares, head.weight) + head.bias
    return hiera.head.norm(total).flatten(1, 3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(2))
def test_masked_forward_without_fusion_equals_timm(size, q_pool, seed, randomise, draw_mask, assert_near) -> None:
    encoder = without_fusion(small_hiera(size, q_pool, seed, randomise))
    units = encoder.grid[0] * encoder.grid[1]
    images = torch.randn(3, 3, *size).double()
    visible = draw_mask(3, units, 1 + seed, seed).visible_BV
    hiera = encoder.backbone
    last, stages = hiera.forward_features(images, mask=boolean(visible, units), return_intermediates=True)
    assert_near(encoder(images, visible), hiera.head.norm(stages[-1]).flatten(1, 3), 1e-10)
    if q_pool == 3:  # one token per unit: timm's output is in order without reroll
        assert_near(encoder(images, visible), hiera.head.norm(last), 1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_unmasked_forward_without_fusion_equals_timm(size, q_pool, randomise, assert_near) -> None:
    encoder = without_fusion(small_hiera(size, q_pool, 0, randomise))
    images = torch.randn(2, 3, *size).double()
    mask = all_visible(2, encoder.grid[0] * encoder.grid[1])
    hiera = encoder.backbone
    dense = hiera.head.norm(hiera.forward_intermediates(images, output_fmt="NHWC")[1][-1]).flatten(1, 2)
    order = split_units(mask, encoder.grid, encoder.split).visible_BV
    latent = encoder(images, mask.visible_BV)
    assert_near(latent, torch.stack([dense[sample, order[sample]] for sample in range(2)]), 1e-10)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(2))
def test_fusion_equals_the_official_code(size, q_pool, seed, randomise, draw_mask, assert_near) -> None:
    encoder = small_hiera(size, q_pool, seed, randomise)
    units = encoder.grid[0] * encoder.grid[1]
    images = torch.randn(3, 3, *size).double()
    visible = draw_mask(3, units, 1 + seed, seed).visible_BV
    expected = fused_features(encoder, images, boolean(visible, units))
    actual = encoder(images, visible)
    assert_near(actual, expected, 1e-10)

    cotangent = torch.randn_like(expected)
    parameters = list(encoder.parameters())
    gradients = torch.autograd.grad(actual, parameters, cotangent)
    for one, other in zip(gradients, torch.autograd.grad(expected, parameters, cotangent), strict=True):
        assert_near(one, other, 1e-10)


def test_published_model_at_its_own_size(randomise, draw_mask, assert_near) -> None:
    encoder = HieraEncoder(timm.create_model("hiera_tiny_224", num_classes=0, q_pool=2), (224, 224))
    assert (encoder.unit, encoder.split, encoder.token_size, encoder.token_grid) == (32, 2, 16, (14, 14))
    assert [head.kernel_size for head in encoder.fusion] == [(4, 4), (2, 2)]
    randomise(encoder)
    images, visible = torch.randn(2, 3, 224, 224), draw_mask(2, 49, 19).visible_BV
    with torch.no_grad():
        assert_near(encoder(images, visible), fused_features(encoder, images, boolean(visible, 49)), 1e-5)
