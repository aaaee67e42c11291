"""Exact metrics over several processes: sums and concatenations, so that uneven last batches count right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from openmae.distributed.watchdog import pulse_of
from openmae.errors import DataError


def sum_over_ranks(fabric: Fabric, values: list[float]) -> list[float]:
    """Each value summed over all processes, in float64."""
    return add_over_ranks(fabric, torch.tensor(values, dtype=torch.float64, device=fabric.device)).tolist()


def add_over_ranks(fabric: Fabric, values: torch.Tensor) -> torch.Tensor:
    """``values``, summed over all processes in place; Fabric's own sum would let the host wait for the device."""
    if fabric.world_size > 1:
        pulse_of(fabric).passes()
        torch.distributed.all_reduce(values)
    return values


def gather(fabric: Fabric, batches: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """The batches of all processes, joined along the first axis in the order of the ranks; a rank may have none.

    Raises:
        DataError: no rank has any.
    """
    joined = [batch for part in gather_objects(fabric, batches) for batch in part]
    if not joined:
        raise DataError("No image of the set could be read.", "See corrupt_files.txt in the results folder.")
    return np.concatenate(joined)


def gather_objects(fabric: Fabric, item: Any) -> Iterable[Any]:
    """What each process gave, in the order of the ranks; anything that can be pickled."""
    if fabric.world_size == 1:
        return [item]
    pulse_of(fabric).passes()
    parts: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(parts, item)
    return parts
