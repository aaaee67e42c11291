"""FCMAE for ConvNeXt V2 (Woo et al. 2023, arXiv:2301.00808): sparse computation in plain PyTorch.

The result equals, up to rounding, that of the dense model with masked sites zeroed before and after every spatial
operator, but masked sites are not computed. Every sample has the same number of visible 32-px units, so shapes are
static. Stem and downsampling are local to a unit, and LayerNorm, MLP and GRN use visible sites only (GRN pools those of
a sample). Only the depthwise convolution reads neighbouring units.

Shapes: B batch, V visible units, N = B*V, s side of a unit in sites (8, 4, 2, 1 in the four stages),
S = V*s*s visible sites of a sample, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from openmae.models.encoders.interface import MaskedEncoder
from openmae.models.patches import select_units
from openmae.models.sparse_convnext import Sites, layer_norm, residual_branch

_UNIT = 32  # px, the stride of the last stage


class ConvNeXtV2Encoder(MaskedEncoder):
    """timm's ConvNeXt V2 on visible 32-px units, with timm's initial weights: truncated normal of std .02, zero biases.

    Args:
        backbone: a ConvNeXt with GRN and without layer scale.
        input_size: (height, width) of the images in pixels, multiples of 32.
    """

    def __init__(self, backbone: ConvNeXt, input_size: tuple[int, int]) -> None:
        grid = (input_size[0] // _UNIT, input_size[1] // _UNIT)
        super().__init__(backbone, unit=_UNIT, grid=grid, dim=backbone.num_features)
        # FCMAE does not use the classifier's norm, and with DDP every trainable weight must be used
        backbone.head.requires_grad_(False)

    def forward(self, images_BCHW: Tensor, visible_BV: Tensor) -> Tensor:
        """Return the latent of each visible unit, ``[B, V, D]``."""
        x = select_units(images_BCHW, visible_BV, _UNIT).flatten(0, 1)
        x = layer_norm(_patch_linear(x, self.backbone.stem[0]), self.backbone.stem[1])
        for stage in self.backbone.stages:
            if not isinstance(stage.downsample, nn.Identity):
                norm, conv = stage.downsample
                x = _patch_linear(layer_norm(x, norm), conv)
            sites = Sites.of(visible_BV, self.grid, side=x.shape[1])
            for block in stage.blocks:
                x = x + block.drop_path(residual_branch(x, block, sites)).view_as(x)
        return x.view(*visible_BV.shape, self.dim)


def _patch_linear(x_NssC: Tensor, conv: nn.Conv2d) -> Tensor:
    """Apply a k x k convolution of stride k to the sites of each unit as one matrix product."""
    k = conv.stride[0]
    N, s, _, C = x_NssC.shape
    patches = x_NssC.reshape(N, s // k, k, s // k, k, C).transpose(2, 3).flatten(3)
    return F.linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)
