"""MAE for Hiera (Ryali et al. 2023, arXiv:2306.00989): visible 32-px mask units, multi-scale fusion.

Pretraining pools the queries twice (``q_pool=2`` in the official hiera_mae.py), fine-tuning three times. So a unit
becomes 2 x 2 latent tokens of 16 px, and the decoder predicts 16-px squares. The parameters are the same for both.

Shapes: B batch, V visible units, U units of an image, D width of the last stage, C channels of the image,
P = 64 patches of a unit (8 x 8 of 4 px), t latent tokens along a unit's side.
"""

from __future__ import annotations

import math

import torch
from timm.models.hiera import Hiera, Unroll
from torch import Tensor, nn
from torch.nn.functional import pad

from openmae.models.encoders.interface import MaskedEncoder, init_linear_layers

_HALO = 3  # the 7x7 patch kernel (stride 4) reaches 3 px beyond a unit's top and left, but not its bottom and right


class HieraEncoder(MaskedEncoder):
    """timm's Hiera on visible mask units; outputs of the pooled stages are fused into that of the last stage.

    Args:
        backbone: a 2-D Hiera with ``q_pool=2``; its ``head.norm`` is the encoder's norm, so that fine-tuning loads it.
        input_size: (height, width) of the images in pixels, multiples of the unit.
    """

    unroll_P: Tensor

    def __init__(self, backbone: Hiera, input_size: tuple[int, int]) -> None:
        unit = backbone.patch_stride[0] * backbone.mask_unit_size[0]
        super().__init__(
            backbone,
            unit=unit,
            grid=(input_size[0] // unit, input_size[1] // unit),
            dim=backbone.num_features,
            split=backbone.mask_unit_size[0] // backbone.q_stride[0] ** backbone.q_pool,
        )
        self.fusion = nn.ModuleList(self._fusion_heads())
        strides = [backbone.q_stride] * (len(backbone.stage_ends) - 1)
        unroll = Unroll((unit, unit), backbone.patch_stride, strides)
        tokens = torch.arange(backbone.mu_size).view(1, -1, 1)
        self.register_buffer("unroll_P", unroll(tokens).flatten(), persistent=False)

    def init_weights(self) -> None:
        """Initialise as in the official hiera_mae.py: Xavier-uniform linear layers and patch convolution."""
        init_linear_layers(self.backbone)
        nn.init.xavier_uniform_(self.backbone.patch_embed.proj.weight.flatten(1))

    def forward(self, images_BCHW: Tensor, visible_BV: Tensor) -> Tensor:
        """Return the fused latent tokens of the visible units, ``[B, V*t*t, D]``, unit by unit."""
        hiera = self.backbone
        x = self._embed(images_BCHW, visible_BV) + self._positions()[visible_BV]
        x = x[:, :, self.unroll_P].transpose(1, 2).flatten(1, 2)  # timm's order: units vary fastest
        heads = dict(zip(hiera.stage_ends, self.fusion, strict=False))
        fused: list[Tensor] = []
        for index, block in enumerate(hiera.blocks):
            x = block(x)
            if index in heads:
                windows = hiera.reroll(x, index, mask=visible_BV).flatten(0, 1)  # [B*V, side, side, channels]
                fused.append(heads[index](windows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # [B*V, t, t, D]
        last = hiera.reroll(x, len(hiera.blocks) - 1, mask=visible_BV)  # [B, V, t, t, D]
        tokens = sum(fused, start=last.flatten(0, 1))
        return hiera.head.norm(tokens.reshape(len(x), -1, self.dim))

    def _embed(self, images_BCHW: Tensor, visible_BV: Tensor) -> Tensor:
        """Return the patches of the visible units, ``[B, V, P, channels]``; masked pixels are zero."""
        B, C, H, W = images_BCHW.shape
        (rows, columns), unit = self.grid, self.unit
        seen = torch.zeros(B, rows * columns, dtype=images_BCHW.dtype, device=images_BCHW.device)
        seen = seen.scatter(1, visible_BV, 1.0).view(B, 1, rows, 1, columns, 1)
        masked = (images_BCHW.reshape(B, C, rows, unit, columns, unit) * seen).reshape(B, C, H, W)
        padded = pad(masked, (_HALO, 0, _HALO, 0))
        windows = padded.unfold(2, unit + _HALO, unit).unfold(3, unit + _HALO, unit).permute(0, 2, 3, 1, 4, 5)
        batch_B1 = torch.arange(B, device=visible_BV.device).unsqueeze(1)
        windows = windows[batch_B1, visible_BV // columns, visible_BV % columns].flatten(0, 1)
        conv = self.backbone.patch_embed.proj
        x = nn.functional.conv2d(windows, conv.weight, conv.bias, conv.stride)
        return x.flatten(2).transpose(1, 2).view(B, visible_BV.shape[1], -1, x.shape[1])

    def _positions(self) -> Tensor:
        """Return the position embedding, unit by unit, ``[U, P, channels]``."""
        rows, columns = self.grid
        side = math.isqrt(self.backbone.mu_size)
        positions = self.backbone.pos_embed.view(rows, side, columns, side, -1)
        return positions.transpose(1, 2).reshape(rows * columns, side * side, -1)

    def _fusion_heads(self) -> list[nn.Conv2d]:
        """Return a strided convolution per pooled stage, from a unit's tokens to its latent tokens (section 4)."""
        side, stride = self.backbone.mask_unit_size[0], self.backbone.q_stride[0]
        heads = []
        for stage, end in enumerate(self.backbone.stage_ends[: self.backbone.q_pool]):
            kernel = side // stride**stage // self.split
            heads.append(nn.Conv2d(self.backbone.blocks[end].attn.dim_out, self.dim, kernel, kernel))
        return heads
