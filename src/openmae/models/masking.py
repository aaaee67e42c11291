"""Masks of visible units: counts, seeding and representation are defined only here.

Shapes: B batch, L mask units of an image, V visible units, M masked units (L = V + M, or more if a training step
predicts only some of the masked ones). A unit is *visible* (the encoder sees it) or *masked* (the decoder predicts it).
Masks are lists of indices, never boolean, so that their polarity cannot be confused.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from openmae.errors import SpecError
from openmae.spec.architectures import visible_units

# SplitMix64 (Steele, Lea & Flood 2014), constants as signed 64-bit integers: torch has no uint64 arithmetic.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


class Mask(NamedTuple):
    """Row-major indices of units; in random masks, ascending within a sample.

    Attributes:
        visible_BV: int64 indices of the units that the encoder sees.
        masked_BM: int64 indices of the units that the decoder predicts.
    """

    visible_BV: Tensor
    masked_BM: Tensor


def count_visible(num_units: int, mask_ratio: float) -> int:
    """Return the number of visible units among ``num_units``.

    Raises:
        SpecError: Nothing or everything would be visible.
    """
    visible = visible_units(num_units, mask_ratio)
    if 0 < visible < num_units:
        return visible
    what = "no unit" if visible <= 0 else "every unit"
    raise SpecError(
        f"model.mask_ratio: some units must be visible and some masked; {mask_ratio} of {num_units} "
        f"leaves {what} visible.",
        "Use another ratio, a larger dataset.augmentation.input_size, or a smaller model.patch_size (ViT).",
    )


def mask_from_noise(noise_BL: Tensor, num_visible: int, targets: float = 1.0) -> Mask:
    """Return the mask in which the ``num_visible`` units with the least noise are visible (MAE's random shuffling).

    Of the other units, only the share ``targets`` with the most noise, but at least one, is predicted.
    """
    order_BL = noise_BL.argsort(dim=1, stable=True)
    hidden = order_BL.shape[1] - num_visible
    first = order_BL.shape[1] - max(1, round(targets * hidden)) if hidden else num_visible
    return Mask(order_BL[:, :num_visible].sort(dim=1).values, order_BL[:, first:].sort(dim=1).values)


def split_units(mask: Mask, grid: tuple[int, int], split: int) -> Mask:
    """Convert a mask of units to a mask of tokens, of which each unit has ``split`` x ``split``.

    ``grid`` is the number of units in (rows, columns). The result has row-major indices in the grid of tokens, ordered
    unit by unit, and row-major within a unit.
    """
    if split == 1:
        return mask
    columns = grid[1]
    step = torch.arange(split, device=mask.visible_BV.device)

    def tokens_of(units_BK: Tensor) -> Tensor:
        row = (units_BK // columns * split)[..., None, None] + step[:, None]
        column = (units_BK % columns * split)[..., None, None] + step
        return (row * (columns * split) + column).flatten(1)

    return Mask(tokens_of(mask.visible_BV), tokens_of(mask.masked_BM))


def random_mask(
    sample_B: Tensor, *, seed: int, epoch: int, num_units: int, mask_ratio: float, targets: float = 1.0
) -> Mask:
    """Draw a mask that depends only on seed, epoch and sample, not on device, batch size, worker or rank.

    ``sample_B`` are int64 indices in the data set. Validation always uses the same epoch, so its masks are fixed.
    ``mask_ratio`` is the share of units that are not visible, ``targets`` the share of those that are predicted; the
    others are in neither part of the mask.
    """
    unit_L = torch.arange(num_units, device=sample_B.device)
    key_B1 = _splitmix64(_splitmix64(sample_B + _scramble(seed)) + _scramble(epoch)).unsqueeze(1)
    return mask_from_noise(_splitmix64(key_B1 + unit_L * _GAMMA), count_visible(num_units, mask_ratio), targets)


@lru_cache(maxsize=16)
def _scramble(number: int) -> int:
    return int(_splitmix64(torch.tensor(number, dtype=torch.int64)))


def _splitmix64(x: Tensor) -> Tensor:
    """Return one output of SplitMix64 per int64 of ``x``; multiplication wraps around, shifts are logical."""
    x = x + _GAMMA
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def gather_tokens(x_BLE: Tensor, index_BK: Tensor) -> Tensor:
    """Return the vectors of the given tokens, ``[B, K, E]``."""
    return x_BLE.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, x_BLE.shape[-1]))
