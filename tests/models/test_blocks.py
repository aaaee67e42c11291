"""Activation checkpointing: the same results with less memory. Units of fsdp are tested in tests/distributed."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from openmae.models.blocks import recompute_activations
from openmae.models.build import ModelConfig, build_model
from openmae.models.masking import random_mask
from openmae.models.memory import LiveMemory

MODELS = [
    ("vit_tiny_patch16", {}),
    ("vit_tiny_patch16", {"decoder_attention": "cross"}),
    ("hiera_tiny_224", {}),
    ("convnextv2_atto", {}),
    ("vit_tiny_patch16", {"num_classes": 3}),
    ("hiera_tiny_224", {"num_classes": 3}),
    ("convnextv2_atto", {"num_classes": 3}),
]


def step(model: Any, images: Tensor, precision: torch.dtype) -> tuple[Tensor, dict[str, Tensor], float]:
    """Return the loss, the gradients, and the bytes that are kept for the backward pass."""
    torch.manual_seed(0)
    model.train()
    with LiveMemory(model.parameters()) as memory:
        before = memory.bytes
        with torch.autocast("cpu", precision, enabled=precision is torch.bfloat16):
            if hasattr(model, "decoder"):
                mask = random_mask(torch.arange(2), seed=0, epoch=0, num_units=model.num_units, mask_ratio=0.5)
                loss = model(images, mask).loss
            else:
                loss = model(images).float().logsumexp(1).sum()
        kept = memory.bytes - before
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("arch", "options"), MODELS)
def test_recomputed_activations_change_nothing(arch: str, options: dict[str, Any], precision: torch.dtype) -> None:
    config = ModelConfig(arch, (64, 64), drop_path_rate=0.3, decoder_depth=2, decoder_embed_dim=64, **options)
    torch.manual_seed(0)
    plain = build_model(config)
    saving = deepcopy(plain)
    recompute_activations(saving)
    saving = deepcopy(saving)  # as averaging the weights does
    images = torch.randn(2, 3, 64, 64)
    loss, gradients, kept = step(plain, images, precision)
    again, same, less = step(saving, images, precision)
    assert torch.equal(loss, again)
    assert gradients.keys() == same.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same[name]), name
    assert less < kept / 2
