from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openmae.models.build import ModelConfig
from openmae.models.gpu_memory import StepMemory, step_memory
from openmae.spec.architectures import get_architecture
from openmae.spec.costs import COSTS

SMALL = ("vit_tiny_patch16", "hiera_tiny_224", "convnextv2_atto")


def paper(arch: str, **options: object) -> ModelConfig:
    row = get_architecture(arch)
    decoder = {"decoder_depth": row.decoder_depth, "decoder_embed_dim": row.decoder_embed_dim}
    return ModelConfig(arch, mask_ratio=row.mask_ratio, **decoder, **options)


@pytest.mark.parametrize("arch", SMALL)
def test_it_agrees_with_the_tensors_that_autograd_saves(arch: str) -> None:
    """tests/models/test_costs.py counts those, on the meta device."""
    memory = step_memory(paper(arch))
    assert memory.image / 2**20 == pytest.approx(COSTS[arch].image_mib, rel=0.05)
    assert memory.state / 2**30 == pytest.approx(COSTS[arch].state_gib, rel=0.02)


@pytest.mark.parametrize("classes", [0, 10])
@pytest.mark.parametrize("arch", SMALL)
def test_half_precision_and_recomputation_save_memory(arch: str, classes: int) -> None:
    config = paper(arch, num_classes=classes)
    kinds = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
    full, half, recomputed = (step_memory(config, dtype, recompute=recompute).image for dtype, recompute in kinds)
    assert 0.4 * full < half < 0.8 * full
    assert 0.1 * half < recomputed < 0.5 * half


def test_autocast_ends_with_the_count() -> None:
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    step_memory(paper("vit_tiny_patch16"), torch.float16)
    assert not torch.is_autocast_enabled("cuda")
    assert torch.get_autocast_dtype("cuda") == torch.bfloat16


def test_blocks_of_a_decoder_as_wide_as_the_encoder_are_counted() -> None:
    """They have four times as many tokens."""
    config = ModelConfig("vit_tiny_patch16", mask_ratio=0.75, decoder_depth=2, decoder_embed_dim=192)
    few, many = (step_memory(replace(config, decoder_depth=depth), recompute=True) for depth in (2, 3))
    tokens = 197 * 192 * 4
    assert many.image - few.image == pytest.approx(tokens, rel=0.01), "the input of one more block"
    assert few.image > 10 * tokens, "the activations of the largest block"


@given(st.integers(0, 2**37), st.floats(1e3, 1e10), st.floats(1, 1000))
def test_the_largest_batch_fits(state: int, image: float, gib: float) -> None:
    memory = StepMemory(state, image)
    batch = memory.largest_batch(gib)
    if batch:
        assert memory.needed(batch) <= 0.9 * gib * 2**30 * (1 + 1e-9)
        assert bin(batch).count("1") <= 2
    if memory.needed(2) < 0.89 * gib * 2**30:
        assert batch >= 1


def test_a_model_may_be_too_large() -> None:
    assert StepMemory(state=2**33, image=1).largest_batch(8) == 0
