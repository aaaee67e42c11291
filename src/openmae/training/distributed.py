"""Exact metrics over several processes: sums and concatenations, so that uneven last batches count right."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray


def sum_over_ranks(fabric: Fabric, values: list[float]) -> list[float]:
    """Each value summed over all processes, in float64 (float32 where the device has no float64)."""
    dtype = torch.float32 if fabric.device.type == "mps" else torch.float64
    total = fabric.all_reduce(torch.tensor(values, dtype=dtype, device=fabric.device), reduce_op="sum")
    return torch.as_tensor(total).tolist()


def gather(fabric: Fabric, array: NDArray[Any]) -> NDArray[Any]:
    """The arrays of all processes, joined along the first axis in the order of the ranks."""
    if fabric.world_size == 1:
        return array
    parts: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(parts, array)
    return np.concatenate(parts)
