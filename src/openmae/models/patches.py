"""Conversion between images and units, and normalisation of units.

Shapes: B batch, C channels, H and W pixels, L units of an image, K selected units, p side of a unit in pixels,
P = p*p*C values of a unit, ordered (row, column, channel) as in MAE's ``patchify``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6


def select_units(images_BCHW: Tensor, index_BK: Tensor, size: int) -> Tensor:
    """Return the pixels of the selected units, ``[B, K, p, p, C]``, without copying others.

    ``size`` is p, which divides height and width; ``index_BK`` are row-major int64 indices of units.
    """
    units, columns = _grid_of_units(images_BCHW, size), images_BCHW.shape[3] // size
    batch_B1 = torch.arange(units.shape[0], device=index_BK.device).unsqueeze(1)
    return units[batch_B1, index_BK // columns, index_BK % columns]


def patchify(images_BCHW: Tensor, size: int) -> Tensor:
    """Return all units of an image, ``[B, L, P]``."""
    return _grid_of_units(images_BCHW, size).flatten(3).flatten(1, 2)


def _grid_of_units(images_BCHW: Tensor, size: int) -> Tensor:
    """Return a view of the images as ``[B, rows, columns, p, p, C]``."""
    B, C, H, W = images_BCHW.shape
    return images_BCHW.reshape(B, C, H // size, size, W // size, size).permute(0, 2, 4, 3, 5, 1)


def unpatchify(units_BLP: Tensor, size: int, image_size: tuple[int, int]) -> Tensor:
    """Invert :func:`patchify`: return ``[B, C, H, W]`` for ``image_size`` (H, W)."""
    B = units_BLP.shape[0]
    rows, columns = image_size[0] // size, image_size[1] // size
    units = units_BLP.reshape(B, rows, columns, size, size, -1).permute(0, 5, 1, 3, 2, 4)
    return units.reshape(B, -1, rows * size, columns * size)


def normalise_units(units_BKP: Tensor) -> Tensor:
    """Normalise each unit to zero mean and unit variance: MAE's ``norm_pix_loss`` (arXiv:2111.06377, section 3)."""
    size = units_BKP.shape[-1]
    unbiased = (size - 1) / size  # MAE's variance divides by size - 1, layer_norm's by size
    return F.layer_norm(units_BKP, (size,), eps=NORM_EPS * unbiased) * math.sqrt(unbiased)


def denormalise_units(predicted_BKP: Tensor, true_BKP: Tensor) -> Tensor:
    """Invert :func:`normalise_units` with the statistics of the true units, to display a prediction."""
    std = (true_BKP.var(dim=-1, keepdim=True) + NORM_EPS).sqrt()
    return predicted_BKP * std + true_BKP.mean(dim=-1, keepdim=True)
