"""Decoders, which predict the pixels of masked tokens from the visible tokens.

A token is one latent vector of the encoder and represents a unit (Hiera: a quarter of a unit). Masks in this module are
masks of tokens. Shapes: B batch, L tokens of an image, V visible, M masked, T = prefix + V, D latent width, E decoder
width, P pixel values of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import torch
from timm.layers import LayerNorm, Mlp
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from openmae.models.attention import attend
from openmae.models.encoders.interface import init_linear_layers
from openmae.models.masking import Mask, gather_tokens
from openmae.models.positions import sincos_position_embedding
from openmae.models.sparse_convnext import Sites, residual_branch
from openmae.spec.architectures import DECODER_HEAD_DIM


class _AttentionDecoder(nn.Module, ABC):
    """A decoder of transformer blocks.

    Args:
        latent_dim: D.
        dim: E, a multiple of 32 (the width of a head).
        grid: tokens in (rows, columns).
        num_prefix_tokens: number of latent tokens before those of the image.
        token_values: P.
        learned_positions: learn the position embedding, as Hiera does, instead of the fixed sine-cosine one.
    """

    def __init__(
        self,
        latent_dim: int,
        dim: int,
        depth: int,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        token_values: int,
        learned_positions: bool,
    ) -> None:
        super().__init__()
        assert dim % DECODER_HEAD_DIM == 0, dim  # checked by the spec
        self.num_prefix_tokens = num_prefix_tokens
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = sincos_position_embedding(dim, grid, num_prefix_tokens)
        self.pos_embed = nn.Parameter(positions, requires_grad=learned_positions)
        self._add_blocks(latent_dim, dim, depth)
        self.norm = LayerNorm(dim)
        self.predict = nn.Linear(dim, token_values)
        nn.init.normal_(self.mask_token, std=0.02)
        if learned_positions:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_linear_layers(self)

    @abstractmethod
    def _add_blocks(self, latent_dim: int, dim: int, depth: int) -> None:
        """Create the blocks; a seed gives the same weights only if modules are created in the same order."""


class TransformerDecoder(_AttentionDecoder):
    """MAE's lightweight transformer for ViT (fixed positions, class token) and Hiera (learned positions)."""

    def _add_blocks(self, latent_dim: int, dim: int, depth: int) -> None:
        self.embed = nn.Linear(latent_dim, dim)
        self.blocks = nn.Sequential(
            *(Block(dim, dim // DECODER_HEAD_DIM, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth))
        )

    def forward(self, latent_BTD: Tensor, mask: Mask) -> Tensor:
        """Return predictions for the masked tokens, ``[B, M, P]``."""
        x = self.embed(latent_BTD)
        prefix, visible = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        num_tokens = self.pos_embed.shape[1] - self.num_prefix_tokens
        x = torch.cat([prefix, _fill(visible, mask, self.mask_token, num_tokens)], dim=1)
        x = x + self.pos_embed  # with autocast, float32 from here on, as in the official code
        mask, x = self._drop_unused(mask, x)
        others, last = self.blocks[:-1], cast(Block, self.blocks[-1])
        x = others(x)
        # no tokens interact after the last attention, so its norm and MLP run on masked tokens only
        x = x + last.attn(last.norm1(x))
        masked = gather_tokens(x[:, self.num_prefix_tokens :], mask.masked_BM)
        return self.predict(self.norm(masked + last.mlp(last.norm2(masked))))

    def _drop_unused(self, mask: Mask, x_BTE: Tensor) -> tuple[Mask, Tensor]:
        """Return the mask and tokens without those that are neither visible nor predicted; visible ones come first."""
        (B, V), M = mask.visible_BV.shape, mask.masked_BM.shape[1]
        if self.num_prefix_tokens + V + M == x_BTE.shape[1]:
            return mask, x_BTE
        prefix, tokens = x_BTE[:, : self.num_prefix_tokens], x_BTE[:, self.num_prefix_tokens :]
        kept = gather_tokens(tokens, torch.cat(mask, dim=1))
        index = torch.arange(V + M, device=x_BTE.device).expand(B, -1)
        return Mask(index[:, :V], index[:, V:]), torch.cat([prefix, kept], dim=1)


class CrossAttentionDecoder(_AttentionDecoder):
    """CrossMAE's decoder (Fu et al. 2024, arXiv:2401.14391): masked tokens attend to visible ones only.

    So a token's prediction does not depend on which other tokens are predicted. As in the authors' code, keys and
    values come from the encoder's normalised latent, which already includes positions. Unlike their code, which weights
    several encoder layers for each block (inter-block attention), all blocks use the last layer.
    """

    def _add_blocks(self, latent_dim: int, dim: int, depth: int) -> None:
        # not "blocks", since a self-attention decoder's norms and MLPs would be loaded by name
        self.cross_blocks = nn.ModuleList(CrossAttentionBlock(latent_dim, dim) for _ in range(depth))

    def forward(self, latent_BTD: Tensor, mask: Mask) -> Tensor:
        """Return predictions for the masked tokens, ``[B, M, P]``."""
        x = self.mask_token + self.pos_embed[0, self.num_prefix_tokens :][mask.masked_BM]
        for block in self.cross_blocks:
            x = block(x, latent_BTD)
        return self.predict(self.norm(x))


class CrossAttentionBlock(nn.Module):
    """A transformer block with queries from the masked tokens, and keys and values from the latent."""

    def __init__(self, latent_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(latent_dim, 2 * dim)
        self.project = nn.Linear(dim, dim)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x_BME: Tensor, latent_BTD: Tensor) -> Tensor:
        """Apply attention and MLP."""
        keys_BTE, values_BTE = self.key_value(latent_BTD).chunk(2, dim=-1)
        query, keys, values = map(_split_heads, (self.query(self.norm1(x_BME)), keys_BTE, values_BTE))
        read = attend(query, keys, values).transpose(1, 2).flatten(2)
        x_BME = x_BME + self.project(read)
        return x_BME + self.mlp(self.norm2(x_BME))


class ConvNeXtDecoder(nn.Module):
    """FCMAE's decoder: ConvNeXt V2 blocks on the complete grid, with a learned token at masked positions.

    See ``_AttentionDecoder`` for the arguments.
    """

    def __init__(self, latent_dim: int, dim: int, depth: int, grid: tuple[int, int], token_values: int) -> None:
        super().__init__()
        self.grid = grid
        self.embed = nn.Linear(latent_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        blocks = [ConvNeXtBlock(dim, use_grn=True, ls_init_value=None) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.predict = nn.Linear(dim, token_values)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, latent_BVD: Tensor, mask: Mask) -> Tensor:
        """Return predictions for the masked tokens, ``[B, M, P]``."""
        x_BLE = _fill(self.embed(latent_BVD), mask, self.mask_token, self.grid[0] * self.grid[1])
        sites = Sites((len(x_BLE), *self.grid))
        *others, last = self.blocks
        for block in others:
            x_BLE = x_BLE + residual_branch(x_BLE.unflatten(1, self.grid), block, sites)
        rest_BME = residual_branch(x_BLE.unflatten(1, self.grid), last, sites, mask.masked_BM)
        return self.predict(gather_tokens(x_BLE, mask.masked_BM) + rest_BME)


Decoder = TransformerDecoder | CrossAttentionDecoder | ConvNeXtDecoder


def _split_heads(x_BLE: Tensor) -> Tensor:
    """Return ``[B, heads, L, head width]``."""
    return x_BLE.unflatten(-1, (-1, DECODER_HEAD_DIM)).transpose(1, 2)


def _fill(visible_BVE: Tensor, mask: Mask, token: Tensor, num_tokens: int) -> Tensor:
    """Return all tokens in order, ``[B, L, E]``: the given visible ones, and the mask token elsewhere."""
    B, _, E = visible_BVE.shape
    filled = token.to(visible_BVE.dtype).expand(B, num_tokens, E)
    return filled.scatter(1, mask.visible_BV.unsqueeze(-1).expand(-1, -1, E), visible_BVE)
