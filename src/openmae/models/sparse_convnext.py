"""ConvNeXt V2's block on the visible sites of a feature map (encoder) or on all sites (decoder).

Shapes: B batch, V visible units, N = B*V, s side of a unit in sites, S visible sites of a sample, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openmae.models.cpu_autograd import DepthwiseConv, ResponseLinear, use_manual_backward
from openmae.models.masking import gather_tokens

_WINDOW_SIDE = 4  # smallest side of a unit for which windows around visible units are cheaper than a dense map


@dataclass(frozen=True)
class Sites:
    """Positions of the visible sites of one stage in a dense map, and their convolution.

    Attributes:
        shape: (B, height, width) of the dense map, including its margin.
        flat: ``[N*s*s]`` indices of the visible sites in the flattened map; None if all sites are visible, in order.
        window: ``[N*(s+6)*(s+6)]`` indices of each visible unit with a halo of 3 sites, in a map with a margin of 3
            empty sites; None if the dense map, without a margin, is convolved instead.
        side: s.
    """

    shape: tuple[int, int, int]
    flat: Tensor | None = None
    window: Tensor | None = None
    side: int = 1

    @classmethod
    def of(cls, visible_BV: Tensor, grid: tuple[int, int], side: int) -> Sites:
        """Return the sites of a stage whose units are ``side`` sites wide."""
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
        """Padding of the convolution; windows include their halo."""
        return 0 if self.window is not None else 3

    def scatter(self, x: Tensor) -> Tensor:
        """Return sites ``[..., C]`` as windows ``[N, C, s+6, s+6]`` or maps ``[B, C, H, W]``, zero elsewhere."""
        (B, H, W), C = self.shape, x.shape[-1]
        dense = x.reshape(-1, C)
        if self.flat is not None:
            dense = dense.new_zeros(B * H * W, C).index_copy_(0, self.flat, dense)
        if self.window is None:
            return dense.view(B, H, W, C).permute(0, 3, 1, 2)
        extent = self.side + 6
        return dense.index_select(0, self.window).view(-1, extent, extent, C).permute(0, 3, 1, 2)

    def gather(self, y: Tensor) -> Tensor:
        """Return the sites ``[N, s, s, C]`` of a convolution's output."""
        y = y.permute(0, 2, 3, 1)
        if self.window is not None or self.flat is None:
            return y
        return y.reshape(-1, y.shape[-1]).index_select(0, self.flat).view(-1, self.side, self.side, y.shape[-1])

    def gather_backward(self, g: Tensor, scattered: Tensor) -> Tensor:
        """Return a convolution's output gradient, given that of the sites ``g`` and ``scattered = scatter(g)``."""
        return scattered if self.window is None else g.permute(0, 3, 1, 2)

    def convolve(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """Apply a depthwise 7x7 convolution to the visible sites, with masked ones as zeros: ``[N, s, s, C]``."""
        if use_manual_backward(x):
            return DepthwiseConv.apply(x, conv.weight, conv.bias, self)
        return self.gather(F.conv2d(self.scatter(x), conv.weight, conv.bias, padding=self.padding, groups=conv.groups))


def residual_branch(x: Tensor, block: ConvNeXtBlock, sites: Sites, rows_BK: Tensor | None = None) -> Tensor:
    """Return the residual branch of a block as ``[B, S, C]``, so that drop path draws once per sample.

    ``x`` are values of the sites, ``[..., C]``; the block has GRN and no layer scale. With ``rows_BK``, only those
    sites are returned, ``[B, K, C]``.
    """
    if getattr(block, "recomputes", False):  # see recompute_activations
        return checkpoint(_residual_branch, x, block, sites, rows_BK, use_reentrant=False)
    return _residual_branch(x, block, sites, rows_BK)


def _residual_branch(x: Tensor, block: ConvNeXtBlock, sites: Sites, rows_BK: Tensor | None) -> Tensor:
    y = layer_norm(sites.convolve(x, block.conv_dw), block.norm)
    hidden = block.mlp.act(site_linear(y.reshape(sites.shape[0], -1, y.shape[-1]), block.mlp.fc1))
    return response_linear(hidden, block.mlp.grn, block.mlp.fc2, rows_BK)


def response_linear(
    x_BSC: Tensor, grn: GlobalResponseNorm, layer: nn.Linear | nn.Conv2d, rows_BK: Tensor | None = None
) -> Tensor:
    """Apply GRN over a sample's sites, and a linear layer or a 1x1 convolution: ``[B, S, D]``, or ``[B, K, D]``."""
    if use_manual_backward(x_BSC):
        parameters = (layer.weight.flatten(1), layer.bias)
        return ResponseLinear.apply(x_BSC, grn.weight, grn.bias, grn.eps, rows_BK, *parameters)
    return site_linear(global_response_norm(x_BSC, grn, rows_BK), layer)


def global_response_norm(x_BSC: Tensor, grn: GlobalResponseNorm, rows_BK: Tensor | None = None) -> Tensor:
    """Apply GRN (paper, algorithm 1) over a sample's sites, with sums in fp32, since half precision overflows."""
    wide = torch.promote_types(x_BSC.dtype, torch.float32)
    energy = torch.linalg.vector_norm(x_BSC, dim=1, keepdim=True, dtype=wide)
    scale = energy / (energy.mean(dim=-1, keepdim=True) + grn.eps)
    x = x_BSC if rows_BK is None else gather_tokens(x_BSC, rows_BK)
    return x + torch.addcmul(grn.bias, grn.weight, x * scale.to(x.dtype)).to(x.dtype)


def site_linear(x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """Apply a linear layer or a 1x1 convolution to the channels of each site."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Apply a norm to the last dimension, even if timm built it for channels-first input."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
