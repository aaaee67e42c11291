"""The face that every encoder shows to the autoencoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class MaskedEncoder(nn.Module, ABC):
    """A timm backbone run over visible units only.

    Args:
        backbone: the timm model; its parameters keep timm's names.
        unit: side of a mask unit in pixels.
        grid: units in (rows, columns).
        dim: D, width of the latent.
        split: latent tokens along a unit's side.
        num_prefix_tokens: latent tokens in front of the units' (ViT's class token).
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
        """Side of the square, in pixels, that one latent token stands for and the decoder predicts."""
        return self.unit // self.split

    @property
    def token_grid(self) -> tuple[int, int]:
        """Latent tokens of a whole image in (rows, columns)."""
        return self.grid[0] * self.split, self.grid[1] * self.split

    @abstractmethod
    def init_weights(self) -> None:
        """Give the weights the paper's start, where timm's own differs."""

    @abstractmethod
    def forward(self, images_BCHW: Tensor, visible_BV: Tensor) -> Tensor:
        """Latent tokens of the visible units, ``[B, num_prefix_tokens + V * split**2, D]``, unit by unit.

        Args:
            images_BCHW: normalised images.
            visible_BV: int64 indices of the visible units, row-major.
        """

    @abstractmethod
    def embed(self, images_BCHW: Tensor) -> Tensor:
        """One vector an image, ``[B, D]``, nothing masked."""


def init_linear(linear: nn.Linear) -> None:
    """Xavier-uniform weight and zero bias, as MAE's code starts every linear layer."""
    nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
