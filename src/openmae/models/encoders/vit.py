"""MAE for ViT (He et al. 2021, arXiv:2111.06377): the transformer sees only the visible patches.

Shapes: B batch, V visible patches, L patches of an image, D width, p side of a patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn

from openmae.models.encoders.interface import MaskedEncoder, init_linear_layers
from openmae.models.patches import select_units
from openmae.models.positions import sincos_position_embedding


class ViTEncoder(MaskedEncoder):
    """timm's VisionTransformer on visible patches.

    Args:
        backbone: a ViT with a class token, a position embedding and a final ``norm``.
    """

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__(
            backbone,
            unit=backbone.patch_embed.patch_size[0],
            grid=tuple(backbone.patch_embed.grid_size),
            dim=backbone.embed_dim,
            num_prefix_tokens=backbone.num_prefix_tokens,
        )

    def init_weights(self) -> None:
        """Initialise as the paper does: Xavier-uniform linear layers, class token of std .02, sine-cosine positions."""
        init_linear_layers(self.backbone)
        nn.init.xavier_uniform_(self.backbone.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.backbone.cls_token, std=0.02)
        positions = sincos_position_embedding(self.dim, self.grid, self.num_prefix_tokens)
        self.backbone.pos_embed.data.copy_(positions)

    def forward(self, images_BCHW: Tensor, visible_BV: Tensor) -> Tensor:
        """Return the latent of the class token and of each visible patch, ``[B, 1 + V, D]``."""
        vit = self.backbone
        prefix_pos, patch_pos = vit.pos_embed.tensor_split([self.num_prefix_tokens], dim=1)
        x = self._embed(images_BCHW, visible_BV) + patch_pos[0, visible_BV]
        prefix = (vit.cls_token + prefix_pos).expand(x.shape[0], -1, -1).to(x.dtype)
        x = vit.norm_pre(torch.cat([prefix, x], dim=1))
        return vit.norm(vit.blocks(x))

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Return one vector per unmasked image, ``[B, D]``: the mean of the normalised patch tokens."""
        return self.backbone.forward_features(images_BCHW)[:, self.num_prefix_tokens :].mean(dim=1)

    def _embed(self, images_BCHW: Tensor, visible_BV: Tensor) -> Tensor:
        """Apply the patch convolution to the visible patches as one matrix product."""
        projection = self.backbone.patch_embed.proj
        pixels = select_units(images_BCHW, visible_BV, self.unit).flatten(2)
        return F.linear(pixels, projection.weight.permute(0, 2, 3, 1).flatten(1), projection.bias)
