"""The interface between an encoder and the autoencoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class MaskedEncoder(nn.Module, ABC):
    """A timm backbone that runs on visible units only.

    Args:
        backbone: timm model; its parameters keep timm's names.
        unit: side of a mask unit in pixels.
        grid: units in (rows, columns).
        dim: D, width of the latent.
        split: number of latent tokens along a unit's side.
        num_prefix_tokens: number of latent tokens before those of the units (ViT's class token).
    """

    def __init__(
        self,
        backbone: Any,
        *,
        unit: int,
        grid: tuple[int, int],
        dim: int,
        split: int = 1,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.unit = unit
        self.grid = grid
        self.dim = dim
        self.split = split
        self.num_prefix_tokens = num_prefix_tokens

    @property
    def token_size(self) -> int:
        """Side in pixels of the square that a latent token represents and the decoder predicts."""
        return self.unit // self.split

    @property
    def token_grid(self) -> tuple[int, int]:
        """Latent tokens of an unmasked image in (rows, columns)."""
        return self.grid[0] * self.split, self.grid[1] * self.split

    def init_weights(self) -> None:
        """Initialise the weights as the paper does, where timm differs; by default, it does not."""

    @abstractmethod
    def forward(self, images_BCHW: Tensor, visible_BV: Tensor) -> Tensor:
        """Return the latent tokens of the visible units, ``[B, num_prefix_tokens + V * split**2, D]``, unit by unit.

        Args:
            images_BCHW: normalised images.
            visible_BV: int64 indices of the visible units, row-major.
        """

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Return one vector per unmasked image, ``[B, D]``: by default timm's features, pooled and then normalised."""
        return self.backbone(images_BCHW)


def init_linear_layers(model: nn.Module) -> None:
    """Initialise all linear layers with Xavier-uniform weights and zero biases, as in MAE's code."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
