"""Operations of a model, counted without computing them, and how many a device can do per second.

Counted are matrix products, convolutions and attention, by torch's FlopCounterMode: a multiplication and an addition
are two operations.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.models.masking import count_visible, mask_from_noise

_MATRIX = 768  # side of the matrices that bf16 and fp32 are compared with
_FASTER = 1.8  # times as fast that products in bf16 must be
_STEP = 3  # a backward pass takes two products for each of the forward pass


def decoder_share(config: ModelConfig) -> float:
    """Return the share of a pretraining step's operations that the decoder takes, in [0, 1].

    Example:
        >>> config = ModelConfig("vit_tiny_patch16", mask_ratio=0.75, decoder_depth=8, decoder_embed_dim=512)
        >>> round(decoder_share(config), 2)
        0.95
    """
    counts = _count(config)
    return sum(counts.get("MaskedAutoencoder.decoder", {}).values()) / sum(counts["Global"].values())


def step_operations(config: ModelConfig) -> int:
    """Return the operations per image of a training step that predicts all masked units, or of one of a classifier."""
    return _STEP * sum(_count(config)["Global"].values())


def product_rate(dtype: torch.dtype, device: torch.device, side: int) -> float:
    """Return the operations per second in products of square matrices: the fastest of some."""
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return float(2 * side**3 / min(times))


def has_fast_bf16(on_gpu: bool) -> bool:
    """Return whether the GPU or the CPU multiplies bf16 matrices much faster than fp32 ones."""
    if on_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    half, full = (product_rate(kind, torch.device("cpu"), _MATRIX) for kind in (torch.bfloat16, torch.float32))
    return half > _FASTER * full


@lru_cache(maxsize=8)
def _count(config: ModelConfig) -> dict[str, dict[Any, int]]:
    """Return the operations of a forward pass of one image, by module and kind."""
    with torch.device("meta"):
        images = torch.zeros(1, config.in_chans, *config.input_size)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            if config.num_classes:
                build_classifier(config)(images)
            else:
                model = build_autoencoder(config)
                visible = count_visible(model.num_units, config.mask_ratio)
                model(images, mask_from_noise(torch.rand(1, model.num_units), visible))
    counts: dict[str, dict[Any, int]] = counter.get_flop_counts()
    return counts
