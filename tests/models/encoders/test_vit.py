from __future__ import annotations

import pytest
import timm
import torch
from tests.helpers.models import all_visible
from torch import Tensor

from openmae.models.encoders import ViTEncoder
from openmae.models.positions import sincos_position_embedding


def small_vit(size: tuple[int, int], patch: int = 8) -> ViTEncoder:
    backbone = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, global_pool="token", img_size=size, patch_size=patch, depth=3
    )
    return ViTEncoder(backbone)


def masked_features(encoder: ViTEncoder, images: Tensor, visible: Tensor) -> Tensor:
    """Run timm's modules and drop masked patches after the position embedding, as the paper describes."""
    vit = encoder.backbone
    tokens = vit.patch_embed(images) + vit.pos_embed[:, 1:]
    kept = torch.stack([tokens[sample, visible[sample]] for sample in range(len(images))])
    class_token = (vit.cls_token + vit.pos_embed[:, :1]).repeat(len(images), 1, 1)
    return vit.norm(vit.blocks(torch.cat([class_token, kept], dim=1)))


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_unmasked_forward_equals_timm(size, randomise, assert_near) -> None:
    encoder = small_vit(size).double()
    randomise(encoder)
    images = torch.randn(2, 3, *size).double()
    visible = all_visible(2, encoder.grid[0] * encoder.grid[1]).visible_BV
    assert_near(encoder(images, visible), encoder.backbone.forward_features(images), 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_masked_equals_dropping_patches(size, dtype, tolerance, randomise, draw_mask, assert_near) -> None:
    encoder = small_vit(size).to(dtype)
    randomise(encoder)
    images = torch.randn(2, 3, *size, dtype=dtype)
    visible = draw_mask(2, encoder.grid[0] * encoder.grid[1], 5).visible_BV
    expected = masked_features(encoder, images, visible)
    actual = encoder(images, visible)
    assert_near(actual, expected, tolerance)

    cotangent = torch.randn_like(expected)
    parameters = list(encoder.parameters())
    for one, other in zip(
        torch.autograd.grad(actual, parameters, cotangent),
        torch.autograd.grad(expected, parameters, cotangent),
        strict=True,
    ):
        assert_near(one, other, 10 * tolerance if dtype == torch.float32 else tolerance)


def test_initialisation_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    encoder = small_vit((32, 48))
    encoder.init_weights()
    vit = encoder.backbone
    assert torch.equal(vit.pos_embed, sincos_position_embedding(192, (4, 6), 1))
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    fan_in, fan_out = 3 * 8 * 8, 192  # Xavier of the flattened convolution: bound sqrt(6 / (in + out))
    bound = (6 / (fan_in + fan_out)) ** 0.5
    assert vit.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    qkv = vit.blocks[0].attn.qkv
    assert qkv.weight.abs().max().item() == pytest.approx((6 / (192 + 3 * 192)) ** 0.5, rel=0.01)
    assert torch.equal(qkv.bias, torch.zeros(3 * 192))
