"""FCMAE for ConvNeXt V2 (Woo et al. 2023, arXiv:2301.00808): truly sparse, in plain PyTorch.

Equal, to rounding, to zeroing the masked sites before and after every spatial operator of the dense model,
but masked sites are never computed. Every sample keeps the same number of visible 32-px units, so shapes are
static. Stem and downsampling are local to a unit; LayerNorm, MLP and GRN act on visible sites alone (GRN
pools a sample's visible sites); only the depthwise convolution looks at neighbours.

Shapes: B batch, V visible units, N = B*V, s side of a unit in sites (8, 4, 2, 1 in the four stages),
S = V*s*s visible sites of a sample, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from openmae.models.encoders.base import MaskedEncoder
from openmae.models.patches import select_units

_UNIT = 32  # px, the stride of the last stage
_WINDOW_SIDE = 4  # from this side on, windows around the visible units cost less than a dense map


class ConvNeXtV2Encoder(MaskedEncoder):
    """timm's ConvNeXt V2 over visible 32-px units.

    Args:
        backbone: a ConvNeXt with GRN and no layer scale.
        input_size: (height, width) of the images in pixels, multiples of 32.
    """

    def __init__(self, backbone: ConvNeXt, input_size: tuple[int, int]) -> None:
        grid = (input_size[0] // _UNIT, input_size[1] // _UNIT)
        super().__init__(backbone, unit=_UNIT, grid=grid, dim=backbone.num_features)
        backbone.head.requires_grad_(False)  # FCMAE does not run the classifier's norm; DDP wants no idle weight

    def init_weights(self) -> None:
        """timm has initialised the backbone as the paper does: truncated normal of std .02, zero biases."""

    def forward(self, images_BCHW: Tensor, visible_BV: Tensor) -> Tensor:
        """Latent of each visible unit, ``[B, V, D]``."""
        x = select_units(images_BCHW, visible_BV, _UNIT).flatten(0, 1)
        x = _layer_norm(_patch_linear(x, self.backbone.stem[0]), self.backbone.stem[1])
        for stage in self.backbone.stages:
            if not isinstance(stage.downsample, nn.Identity):
                norm, conv = stage.downsample
                x = _patch_linear(_layer_norm(x, norm), conv)
            sites = Sites.of(visible_BV, self.grid, side=x.shape[1])
            for block in stage.blocks:
                x = x + block.drop_path(_branch(x, block, sites)).view_as(x)
        return x.view(*visible_BV.shape, self.dim)

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """One vector an image, ``[B, D]``, nothing masked: timm's features, pooled and then normed."""
        return self.backbone(images_BCHW)


@dataclass(frozen=True)
class Sites:
    """Where the visible sites of one stage lie in a dense map, and how to convolve them.

    Attributes:
        shape: (B, height, width) of the dense map, its margin included.
        margin: empty sites around the map; 0 where the map itself is convolved.
        flat: ``[N*s*s]`` index of each visible site in the flattened map.
        window: ``[N*(s+6)*(s+6)]`` index of each visible unit and its 3-site halo; None without a margin.
        side: s.
    """

    shape: tuple[int, int, int]
    margin: int
    flat: Tensor
    window: Tensor | None
    side: int

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
        return cls((B, height, width), margin, square(margin, margin + side), window, side)

    def convolve(self, x_NssC: Tensor, conv: nn.Conv2d) -> Tensor:
        """Depthwise 7x7 over the visible sites, masked ones reading as zero; ``[N, s, s, C]``."""
        (B, H, W), C, s = self.shape, x_NssC.shape[-1], self.side
        empty = x_NssC.new_zeros(B * H * W, C)
        dense = empty.index_copy(0, self.flat, x_NssC.reshape(-1, C))
        if self.window is None:
            dense = dense.view(B, H, W, C).permute(0, 3, 1, 2)
            y = F.conv2d(dense, conv.weight, conv.bias, padding=3, groups=C)
            return y.permute(0, 2, 3, 1).reshape(-1, C).index_select(0, self.flat).view_as(x_NssC)
        windows = dense.index_select(0, self.window).view(-1, s + 6, s + 6, C)
        y = F.conv2d(windows.permute(0, 3, 1, 2), conv.weight, conv.bias, groups=C)
        return y.permute(0, 2, 3, 1)


def _branch(x_NssC: Tensor, block: ConvNeXtBlock, sites: Sites) -> Tensor:
    """The residual branch of a block; returns ``[B, V*s*s, C]``, so that drop path draws once a sample."""
    y = _layer_norm(sites.convolve(x_NssC, block.conv_dw), block.norm)
    y_BSC = y.reshape(sites.shape[0], -1, y.shape[-1])
    hidden = block.mlp.act(_site_linear(y_BSC, block.mlp.fc1))
    return _site_linear(_global_response_norm(hidden, block.mlp.grn), block.mlp.fc2)


def _global_response_norm(x_BSC: Tensor, grn: GlobalResponseNorm) -> Tensor:
    """GRN (paper, algorithm 1) pooled over a sample's visible sites; fp32 sums: half precision overflows."""
    wide = torch.promote_types(x_BSC.dtype, torch.float32)
    energy = torch.linalg.vector_norm(x_BSC, dim=1, keepdim=True, dtype=wide)
    scale = energy / (energy.mean(dim=-1, keepdim=True) + grn.eps)
    return x_BSC + torch.addcmul(grn.bias, grn.weight, x_BSC * scale.to(x_BSC.dtype)).to(x_BSC.dtype)


def _site_linear(x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """A linear layer, or a 1x1 convolution, over the channels of each site."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


def _patch_linear(x_NssC: Tensor, conv: nn.Conv2d) -> Tensor:
    """A k x k convolution of stride k over the sites of each unit, as one matrix product."""
    k = conv.stride[0]
    N, s, _, C = x_NssC.shape
    patches = x_NssC.reshape(N, s // k, k, s // k, k, C).transpose(2, 3).flatten(3)
    return F.linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The norm's parameters over the last dimension, whichever layout timm built it for."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
