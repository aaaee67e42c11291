"""Fixed position embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_position_embedding(dim: int, grid: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
    """Return the 2-D sine-cosine position embedding of MAE's code, ``[1, prefix + rows*columns, D]`` in float32.

    ``dim`` is a multiple of 4. The first half encodes the column, the second the row, each by sines, then cosines.
    Prefix tokens have zeros.
    """
    frequency = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.flatten().outer(frequency) for axis in (column, row)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([table.new_zeros(num_prefix_tokens, dim), table]).unsqueeze(0).float()
