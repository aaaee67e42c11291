"""ConvNeXt V2's block over some sites of a map: the visible ones (encoder), or all of them (decoder).

Shapes: B batch, V visible units, N = B*V, s side of a unit in sites, S visible sites of a sample, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from openmae.models.cpu_autograd import DepthwiseConv, ResponseNorm, by_hand
from openmae.models.masking import take

_WINDOW_SIDE = 4  # from this side on, windows around the visible units cost less than a dense map


@dataclass(frozen=True)
class Sites:
    """Where the sites of one stage lie in a dense map, and how to convolve them.

    Attributes:
        shape: (B, height, width) of the dense map, its margin included.
        flat: ``[N*s*s]`` index of each visible site in the flattened map; None: every site is visible, in order.
        window: ``[N*(s+6)*(s+6)]`` index of each visible unit and its 3-site halo, in a map with a margin of 3 empty
            sites; None: the map has no margin and is convolved itself.
        side: s.
    """

    shape: tuple[int, int, int]
    flat: Tensor | None = None
    window: Tensor | None = None
    side: int = 1

    @classmethod
    def of(cls, visible_BV: Tensor, grid: tuple[int, int], side: int) -> Sites:
        """Lay out a stage whose units are ``side`` sites wide."""
        margin = 3 if side >= _WINDOW_SIDE else 0
        height, width = grid[0] * side + 2 * margin, grid[1] * side + 2 * margin
        B = visible_BV.shape[0]
        sample = torch.arange(B, device=visible_BV.device).view(B, 1, 1, 1) * (height * width)
        top = (visible_BV // grid[1] * side).view(B, -1, 1, 1)
        left = (visible_BV % grid[1] * side).view(B, -1, 1, 1)

        def square(first: int, last: int) -> Tensor:
            step = torch.arange(first, last, device=visible_BV.device)
            return (sample + (top + step.view(-1, 1)) * width + left + step).flatten()

        window = square(0, side + 2 * margin) if margin else None
        return cls((B, height, width), square(margin, margin + side), window, side)

    @property
    def padding(self) -> int:
        """Of the convolution: windows have their halo."""
        return 0 if self.window is not None else 3

    def place(self, x: Tensor) -> Tensor:
        """Sites ``[..., C]`` to what is convolved: windows ``[N, C, s+6, s+6]`` or maps ``[B, C, H, W]``."""
        (B, H, W), C = self.shape, x.shape[-1]
        dense = x.reshape(-1, C)
        if self.flat is not None:
            dense = dense.new_zeros(B * H * W, C).index_copy_(0, self.flat, dense)
        if self.window is None:
            return dense.view(B, H, W, C).permute(0, 3, 1, 2)
        extent = self.side + 6
        return dense.index_select(0, self.window).view(-1, extent, extent, C).permute(0, 3, 1, 2)

    def pick(self, y: Tensor) -> Tensor:
        """What was convolved to sites: ``[N, s, s, C]``."""
        y = y.permute(0, 2, 3, 1)
        if self.window is not None or self.flat is None:
            return y
        return y.reshape(-1, y.shape[-1]).index_select(0, self.flat).view(-1, self.side, self.side, y.shape[-1])

    def spread(self, g: Tensor, placed: Tensor) -> Tensor:
        """The gradient of what was convolved, from that of the sites; ``placed`` is ``place(g)``."""
        return placed if self.window is None else g.permute(0, 3, 1, 2)

    def convolve(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """Depthwise 7x7 over the visible sites, masked ones reading as zero; ``[N, s, s, C]``."""
        if by_hand(x):
            return DepthwiseConv.apply(x, conv.weight, conv.bias, self)
        return self.pick(F.conv2d(self.place(x), conv.weight, conv.bias, padding=self.padding, groups=conv.groups))


def branch(x: Tensor, block: ConvNeXtBlock, sites: Sites, rows_BK: Tensor | None = None) -> Tensor:
    """The residual branch of a block over ``[..., C]``; ``[B, S, C]``, so that drop path draws once a sample.

    Args:
        x: values of the sites.
        block: a block with GRN and no layer scale.
        sites: where they lie.
        rows_BK: the sites whose result is wanted, ``[B, K, C]``; None: all.
    """
    y = layer_norm(sites.convolve(x, block.conv_dw), block.norm)
    hidden = block.mlp.act(site_linear(y.reshape(sites.shape[0], -1, y.shape[-1]), block.mlp.fc1))
    return site_linear(global_response_norm(hidden, block.mlp.grn, rows_BK), block.mlp.fc2)


def global_response_norm(x_BSC: Tensor, grn: GlobalResponseNorm, rows_BK: Tensor | None = None) -> Tensor:
    """GRN (paper, algorithm 1) pooled over a sample's sites; fp32 sums: half precision overflows."""
    if by_hand(x_BSC):
        return ResponseNorm.apply(x_BSC, grn.weight, grn.bias, grn.eps, rows_BK)
    wide = torch.promote_types(x_BSC.dtype, torch.float32)
    energy = torch.linalg.vector_norm(x_BSC, dim=1, keepdim=True, dtype=wide)
    scale = energy / (energy.mean(dim=-1, keepdim=True) + grn.eps)
    x = x_BSC if rows_BK is None else take(x_BSC, rows_BK)
    return x + torch.addcmul(grn.bias, grn.weight, x * scale.to(x.dtype)).to(x.dtype)


def site_linear(x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """A linear layer, or a 1x1 convolution, over the channels of each site."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The norm's parameters over the last dimension, whichever layout timm built it for."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
