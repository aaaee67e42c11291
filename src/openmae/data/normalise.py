"""From stored pixels to what a model sees, and back for pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Normaliser:
    """(x / 255 - mean) / std on whatever device the images are.

    Args:
        mean, std: one value a channel, on the scale of 0 to 1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._kept: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]``, uint8 or float in 0..255, to float32; the memory format is kept."""
        shift, scale = self._per_channel(images.device)
        return images.to(torch.float32, copy=True).sub_(shift).div_(scale)

    def undo(self, images: Tensor) -> Tensor:
        """The model's input back to the scale of 0 to 255, float32."""
        shift, scale = self._per_channel(images.device)
        return images.to(torch.float32) * scale + shift

    def _per_channel(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """255 x mean and deviation ``[C, 1, 1]``; kept, as a GPU's host waits for each copy of numbers to it."""
        if device not in self._kept:
            shift, scale = (
                255 * torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
                for values in (self.mean, self.std)
            )
            self._kept[device] = shift, scale
        return self._kept[device]
