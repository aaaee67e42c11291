"""Tests that every family's encoder must pass."""

from __future__ import annotations

import pytest
import timm
import torch
from tests.helpers.models import all_visible
from timm.layers import DropPath
from torch import Tensor, nn

from openmae.models.build import ModelConfig, build_encoder
from openmae.models.encoders import MaskedEncoder
from openmae.models.patches import patchify, unpatchify

pytestmark = pytest.mark.integration

BATCH = 3
SIZE = (64, 96)
ARCHS = ["vit_tiny_patch16", "hiera_tiny_224", "convnextv2_atto"]


@pytest.fixture(scope="module", params=ARCHS)
def arch(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=[1, 3, 4], ids=["grey", "rgb", "four"])
def encoder(arch: str, request, randomise) -> MaskedEncoder:
    module = build_encoder(ModelConfig(arch, SIZE, in_chans=request.param))
    module.init_weights()
    randomise(module)
    return module.eval()


@pytest.fixture
def images(encoder: MaskedEncoder) -> Tensor:
    return torch.randn(BATCH, in_chans(encoder), *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask(encoder: MaskedEncoder, draw_mask):
    units = encoder.grid[0] * encoder.grid[1]
    return draw_mask(BATCH, units, units // 3)


def in_chans(encoder: MaskedEncoder) -> int:
    return next(module for module in encoder.backbone.modules() if isinstance(module, nn.Conv2d)).in_channels


def test_encoder_returns_split_squared_tokens_per_visible_unit(encoder: MaskedEncoder, images: Tensor, mask) -> None:
    latent = encoder(images, mask.visible_BV)
    tokens = encoder.num_prefix_tokens + mask.visible_BV.shape[1] * encoder.split**2
    assert latent.shape == (BATCH, tokens, encoder.dim)
    assert encoder.token_grid == (SIZE[0] // encoder.token_size, SIZE[1] // encoder.token_size)
    assert encoder.grid == (SIZE[0] // encoder.unit, SIZE[1] // encoder.unit)
    assert latent.std() > 0.1


def test_masked_pixels_change_no_visible_feature(encoder: MaskedEncoder, images: Tensor, mask) -> None:
    units = patchify(images, encoder.unit)
    index = mask.masked_BM.unsqueeze(-1).expand(-1, -1, units.shape[-1])
    other = unpatchify(units.scatter(1, index, 1e3 * torch.randn(index.shape)), encoder.unit, SIZE)
    assert not torch.equal(images, other)
    assert torch.equal(encoder(images, mask.visible_BV), encoder(other, mask.visible_BV))


def test_gradient_reaches_visible_pixels_only(encoder: MaskedEncoder, images: Tensor, mask) -> None:
    images.requires_grad_(True)
    latent = encoder(images, mask.visible_BV)
    (gradient,) = torch.autograd.grad((latent * torch.randn_like(latent)).sum(), images)
    energy = patchify(gradient, encoder.unit).abs()
    assert torch.equal(energy.amax(dim=-1).gather(1, mask.masked_BM), torch.zeros(mask.masked_BM.shape))
    assert (energy.amin(dim=-1).gather(1, mask.visible_BV) > 0).all()


def test_samples_of_a_batch_are_independent(encoder: MaskedEncoder, images: Tensor, mask, assert_near) -> None:
    together = encoder(images, mask.visible_BV)
    for sample in range(BATCH):
        alone = encoder(images[sample : sample + 1], mask.visible_BV[sample : sample + 1])
        assert_near(alone[0], together[sample], 1e-5)


def test_memory_layout_of_images_does_not_matter(encoder: MaskedEncoder, images: Tensor, mask, assert_near) -> None:
    expected = encoder(images, mask.visible_BV)
    padded = torch.randn(BATCH, images.shape[1] + 1, SIZE[0] + 5, SIZE[1] + 3)
    padded[:, 1:, 2:-3, 1:-2] = images
    layouts = [
        images.to(memory_format=torch.channels_last),
        images.mT.contiguous().mT,
        padded[:, 1:, 2:-3, 1:-2],
    ]
    for layout in layouts:
        assert_near(encoder(layout, mask.visible_BV), expected, 1e-5)


def test_one_visible_unit_is_enough(encoder: MaskedEncoder, images: Tensor) -> None:
    visible = torch.tensor([[0], [encoder.grid[1] - 1], [encoder.grid[0] * encoder.grid[1] - 1]])
    latent = encoder(images, visible)
    assert latent.shape[1] == encoder.num_prefix_tokens + encoder.split**2
    assert latent.isfinite().all()


def test_parameter_names_equal_timm(arch: str) -> None:
    config = ModelConfig(arch, (224, 224))
    expected = timm.create_model(config.architecture.timm_name, num_classes=0).state_dict()
    actual = build_encoder(config).backbone.state_dict()
    assert {name: value.shape for name, value in actual.items()} == {
        name: value.shape for name, value in expected.items()
    }


def test_drop_path_draws_once_per_sample(arch: str) -> None:
    torch.manual_seed(0)
    batch, config = 24, ModelConfig(arch, SIZE, drop_path_rate=0.5)
    encoder = build_encoder(config).train()
    rates = [module.drop_prob for module in encoder.backbone.modules() if isinstance(module, DropPath)]
    assert max(rates) == pytest.approx(0.5)
    assert len(rates) > 5

    outcomes: list[Tensor] = []

    def record(module: DropPath, inputs: tuple[Tensor], output: Tensor) -> None:
        branch = inputs[0].flatten(1)
        assert branch.shape[0] == batch
        kept = output.flatten(1) / branch
        known = branch.abs() > 1e-6
        for sample in range(batch):
            values = kept[sample][known[sample]]
            torch.testing.assert_close(values, values[:1].expand_as(values))
        first = torch.stack([kept[sample][known[sample]][0] for sample in range(batch)])
        assert ((first == 0) | ((first - 1 / (1 - module.drop_prob)).abs() < 1e-4)).all()
        outcomes.append(first)

    for module in encoder.backbone.modules():
        if isinstance(module, DropPath):
            module.register_forward_hook(record)
    visible = all_visible(batch, encoder.grid[0] * encoder.grid[1]).visible_BV[:, :2]
    encoder(torch.randn(batch, 3, *SIZE), visible)
    assert len(outcomes) == len(rates)
    drawn = torch.stack(outcomes) == 0
    assert drawn.any(dim=0).all()
    assert not drawn.all(dim=0).any()
    expected = sum(rates) * batch
    assert abs(drawn.sum().item() - expected) < 5 * expected**0.5


def test_drop_path_is_off_in_eval(arch: str, draw_mask) -> None:
    encoder = build_encoder(ModelConfig(arch, SIZE, drop_path_rate=0.5)).eval()
    visible = draw_mask(2, encoder.grid[0] * encoder.grid[1], 2).visible_BV
    images = torch.randn(2, 3, *SIZE)
    assert torch.equal(encoder(images, visible), encoder(images, visible))
