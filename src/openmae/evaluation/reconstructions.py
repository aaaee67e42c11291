"""Reconstruct masked images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from openmae.data.image_dataset import Batch
from openmae.models.mae import MaskedAutoencoder
from openmae.models.masking import Mask
from openmae.models.normalise import Normaliser


@torch.no_grad()
def reconstruct(
    fabric: Fabric, model: MaskedAutoencoder, normalise: Normaliser, mask_of: Callable[[Tensor], Mask], batch: Batch
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reconstruct the images of a batch.

    ``model`` must be in eval mode; ``mask_of`` returns the masks of images, given their indices.

    Returns:
        The originals, and the originals with the masked units replaced by their predictions: uint8 arrays
        ``[B, H, W, C]``, without pixel normalisation; and the visible pixels, bool ``[B, H, W]``.
    """
    batch = fabric.to_device(batch)
    images, mask = normalise(batch.images), mask_of(batch.indices)
    with fabric.autocast():
        predicted = model(images, mask).predicted_BMP
    original, pasted = (
        normalise.undo(shown).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        for shown in (images, model.render(images, mask, predicted)[2])
    )
    visible = model.render(torch.ones_like(images), mask, predicted)[0][:, 0].bool().cpu().numpy()
    return original, pasted, visible
