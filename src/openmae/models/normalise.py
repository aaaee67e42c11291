"""Normalisation of images on the device, and its inverse for display."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Normaliser:
    """(x / 255 - mean) / std, on the device of the images, with one ``mean`` and ``std`` per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._cache: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise ``[B, C, H, W]``, uint8 or float in 0..255, to float32 in the same memory format."""
        shift, scale = self._per_channel(images.device)
        return images.to(torch.float32, copy=True).sub_(shift).div_(scale)

    def undo(self, images: Tensor) -> Tensor:
        """Convert normalised images back to float32 in 0..255."""
        shift, scale = self._per_channel(images.device)
        return images.to(torch.float32) * scale + shift

    def _per_channel(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return 255 x mean and 255 x std, ``[C, 1, 1]``; cached, since each copy to a GPU blocks the host."""
        if device not in self._cache:
            shift, scale = (
                255 * torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
                for values in (self.mean, self.std)
            )
            self._cache[device] = shift, scale
        return self._cache[device]
