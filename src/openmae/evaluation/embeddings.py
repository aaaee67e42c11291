"""Compute embeddings of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from openmae.data.image_dataset import Batch
from openmae.distributed.collectives import gather


@torch.no_grad()
def embed(
    fabric: Fabric, features: Callable[[Tensor], Tensor], batches: Iterable[Batch]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the embeddings of all images, without masking, gathered from all processes.

    ``features`` maps decoded images (uint8, or float32 in 0..255) to embeddings ``[B, D]``.

    Returns:
        ``(indices, vectors, labels)`` in the order of the data set, with shapes ``[N]``, ``[N, D]`` (float32) and
        ``[N]`` (-1 if unknown).
    """
    parts: list[list[np.ndarray]] = [[], [], []]
    for batch in map(fabric.to_device, batches):
        with fabric.autocast():
            vectors = features(batch.images)
        for part, value in zip(parts, (batch.indices, vectors.float(), batch.labels), strict=True):
            part.append(value.cpu().numpy())
    indices, all_vectors, labels = (gather(fabric, part) for part in parts)
    order = indices.argsort(kind="stable")
    return indices[order], all_vectors[order], labels[order]
