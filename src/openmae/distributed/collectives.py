"""Exact sums and concatenations over processes, so that uneven last batches count correctly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from openmae.distributed.rendezvous import watchdog_of
from openmae.errors import DataError

T = TypeVar("T")


def sum_over_ranks(fabric: Fabric, values: list[float]) -> list[float]:
    """Return each value summed over all processes, in float64."""
    return add_over_ranks(fabric, torch.tensor(values, dtype=torch.float64, device=fabric.device)).tolist()


def add_over_ranks(fabric: Fabric, values: torch.Tensor) -> torch.Tensor:
    """Sum ``values`` over all processes in place, and return them. Unlike ``Fabric.all_reduce``, do not synchronise."""
    if fabric.world_size > 1:
        watchdog_of(fabric).arrive()
        torch.distributed.all_reduce(values)
    return values


def gather(fabric: Fabric, batches: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the batches of all processes, concatenated along the first axis in the order of the ranks.

    Raises:
        DataError: no process has any batch.
    """
    joined = [batch for part in gather_objects(fabric, batches) for batch in part]
    if not joined:
        raise DataError("No image of the set could be read.", "See corrupt_files.txt in the results folder.")
    return np.concatenate(joined)


def gather_objects(fabric: Fabric, item: T) -> list[T]:
    """Return the (picklable) item of each process, in the order of the ranks."""
    if fabric.world_size == 1:
        return [item]
    watchdog_of(fabric).arrive()
    items: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(items, item)
    return items
