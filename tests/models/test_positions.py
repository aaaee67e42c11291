from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openmae.models.positions import resize_position_embedding, sincos_position_embedding


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


def test_resizing_to_the_same_grid_changes_nothing() -> None:
    embedding = torch.randn(1, 1 + 6, 8)
    assert torch.equal(resize_position_embedding(embedding, (2, 3), (2, 3), 1), embedding)


def test_resizing_between_non_square_grids_keeps_prefix_and_orientation() -> None:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 6), indexing="ij")
    grid = torch.stack([rows, columns], dim=-1).reshape(1, 24, 2)
    embedding = torch.cat([torch.full((1, 1, 2), 9.0), grid], dim=1)
    resized = resize_position_embedding(embedding, (4, 6), (8, 3), 1)
    assert resized.shape == (1, 1 + 24, 2)
    assert torch.equal(resized[:, :1], embedding[:, :1])
    new_rows, new_columns = resized[0, 1:].view(8, 3, 2).unbind(-1)
    assert (new_rows.diff(dim=0) > 0).all()
    assert new_rows.diff(dim=1).abs().max() < 1e-5
    assert (new_columns.diff(dim=1) > 0).all()
    assert new_columns.diff(dim=0).abs().max() < 1e-5
