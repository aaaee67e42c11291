"""The share of the decoder in a step's operations."""

from __future__ import annotations

import pytest
import torch

from openmae.models import operations
from openmae.models.build import ModelConfig
from openmae.models.operations import decoder_share, product_rate, step_operations


def test_the_share_of_a_decoder_by_hand():
    """The products of ViT-Tiny's 50 visible tokens and the decoder's 197, with those of attention."""

    def blocks(tokens: int, width: int, depth: int) -> int:
        return depth * (24 * tokens * width**2 + 4 * tokens**2 * width)

    encoder = blocks(50, 192, 12) + 2 * 196 * 768 * 192
    decoder = blocks(197, 512, 8) + 2 * 50 * 192 * 512 + 2 * 147 * 512 * 768
    config = ModelConfig("vit_tiny_patch16", mask_ratio=0.75, decoder_depth=8, decoder_embed_dim=512)
    assert decoder_share(config) == pytest.approx(decoder / (encoder + decoder), abs=0.01)


@pytest.mark.parametrize("arch", ["hiera_tiny_224", "convnextv2_atto"])
def test_a_smaller_decoder_takes_less(arch):
    shares = [
        decoder_share(ModelConfig(arch, mask_ratio=0.6, decoder_depth=1, decoder_embed_dim=width))
        for width in (512, 128)
    ]
    assert 0 < shares[1] < shares[0] / 2 < 0.5


def test_a_step_of_a_classifier_by_hand():
    """197 tokens in 12 blocks, the patches, and the head; the backward pass does twice the products."""
    tokens, width = 197, 192
    blocks = 12 * (24 * tokens * width**2 + 4 * tokens**2 * width)
    forward = blocks + 2 * 196 * 768 * width + 2 * width * 10
    found = step_operations(ModelConfig("vit_tiny_patch16", num_classes=10))
    assert found == pytest.approx(3 * forward, rel=1e-3)


def test_products_are_timed():
    rate = product_rate(torch.float32, torch.device("cpu"), 64)
    assert 1e6 < rate < 1e14


@pytest.mark.parametrize(("rate", "fast"), [(3.0, True), (1.6, False), (0.3, False)])
def test_bf16_is_fast_only_if_its_products_are(rate, fast, monkeypatch):
    rates = {torch.float32: 1.0, torch.bfloat16: rate}
    monkeypatch.setattr(operations, "product_rate", lambda kind, *_: rates[kind])
    assert operations.has_fast_bf16(on_gpu=False) is fast
