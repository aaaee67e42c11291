"""The share of the decoder in a step's operations."""

from __future__ import annotations

import pytest

from openmae.models.build import ModelConfig
from openmae.models.operations import decoder_share


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
