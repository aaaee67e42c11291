from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openmae.models.positions import sincos_position_embedding


def mae_position(row: int, column: int, dim: int) -> list[float]:
    """Return one token of MAE's ``get_2d_sincos_pos_embed``: the column's half first, each as sines then cosines."""
    values: list[float] = []
    for place in (column, row):
        angles = [place / 10000 ** (k / (dim / 4)) for k in range(dim // 4)]
        values += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return values


@pytest.mark.parametrize(("dim", "grid"), [(8, (1, 1)), (16, (3, 3)), (32, (2, 5)), (192, (14, 14))])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_sincos_embedding_equals_mae(dim: int, grid: tuple[int, int], prefix: int) -> None:
    tokens = [mae_position(row, column, dim) for row in range(grid[0]) for column in range(grid[1])]
    expected = np.concatenate([np.zeros((prefix, dim)), np.array(tokens)])[None]
    embedding = sincos_position_embedding(dim, grid, prefix)
    assert embedding.dtype == torch.float32
    np.testing.assert_allclose(embedding.numpy(), expected, atol=1e-6)
