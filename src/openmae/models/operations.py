"""Operations of a model, counted without computing them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openmae.models.build import ModelConfig, build_autoencoder
from openmae.models.masking import count_visible, mask_from_noise


@lru_cache(maxsize=8)
def decoder_share(config: ModelConfig) -> float:
    """Return the share of a pretraining step's operations that the decoder takes, in [0, 1].

    Example:
        >>> config = ModelConfig("vit_tiny_patch16", mask_ratio=0.75, decoder_depth=8, decoder_embed_dim=512)
        >>> round(decoder_share(config), 2)
        0.95
    """
    with torch.device("meta"):
        model = build_autoencoder(config)
        visible = count_visible(model.num_units, config.mask_ratio)
        mask = mask_from_noise(torch.rand(1, model.num_units), visible)
        images = torch.zeros(1, config.in_chans, *config.input_size)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images, mask)
    counts: dict[str, dict[Any, int]] = counter.get_flop_counts()
    decoder = sum(counts.get(f"{type(model).__name__}.decoder", {}).values())
    return decoder / counter.get_total_flops()
