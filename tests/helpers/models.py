"""Fixtures for parity tests of models; each returns a function."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from openmae.models.build import ModelConfig
from openmae.models.masking import Mask, mask_from_noise


def all_visible(batch: int, num_units: int) -> Mask:
    """Return a mask that hides nothing (M = 0)."""
    units_BL = torch.arange(num_units).expand(batch, -1)
    return Mask(units_BL, units_BL[:, :0])


@pytest.fixture(scope="session")
def randomise() -> Callable[..., None]:
    """``randomise(module, seed)`` sets every parameter to random values.

    timm initialises GRN, biases and norms with zero or one, which hides many mistakes.
    """

    def apply(module: nn.Module, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("pos_embed", "token")) or "grn" in name:
                value = 0.5 * noise
            elif parameter.ndim > 1:
                value = noise / math.sqrt(parameter[0].numel())
            else:
                value = 0.3 * noise + float("norm" in name and name.endswith("weight"))
            parameter.data.copy_(value)

    return apply


@pytest.fixture(scope="session")
def built() -> Callable[..., nn.Module]:
    """``built(build, config)`` returns a copy of the first result of ``build(config)``: initialising is slow."""
    models: dict[tuple[Callable, ModelConfig], nn.Module] = {}

    def get(build: Callable[[ModelConfig], nn.Module], config: ModelConfig) -> nn.Module:
        if (build, config) not in models:
            models[build, config] = build(config)
        return copy.deepcopy(models[build, config])

    return get


@pytest.fixture(scope="session")
def draw_mask() -> Callable[..., Mask]:
    """``draw_mask(batch, units, visible, seed)`` draws a random mask for each sample."""

    def draw(batch: int, units: int, visible: int, seed: int = 0) -> Mask:
        return mask_from_noise(torch.rand(batch, units, generator=torch.Generator().manual_seed(seed)), visible)

    return draw


@pytest.fixture(scope="session")
def assert_near() -> Callable[[Tensor, Tensor, float], None]:
    """``assert_near(actual, expected, tolerance)`` bounds the largest error relative to the largest value."""

    def check(actual: Tensor, expected: Tensor, tolerance: float) -> None:
        assert actual.shape == expected.shape
        error = (actual - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        assert error <= tolerance, f"relative error {error:.2e}"

    return check
