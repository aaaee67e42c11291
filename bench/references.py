"""References for OpenMAE's speed: the same autoencoders, with the same weights, run by other code.

Each reference copies the weights of an OpenMAE model, takes the same images and mask, and returns the loss. All of
them predict every token, as the published codes do, and leave the visible ones out of the loss.

Shapes: B batch, L tokens of an image, V visible, M masked, P values of a token's square, D latent width.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from openmae.errors import RunError
from openmae.models.mae import MaskedAutoencoder
from openmae.models.masking import Mask, random_mask, split_units
from openmae.models.patches import normalise_units, patchify

_STEM = 4  # px of a site of the first stage


class Reference(nn.Module):
    """An autoencoder whose ``forward(images, mask)`` gives the loss.

    Args:
        openmae: the model whose weights are copied.
    """

    def __init__(self, openmae: MaskedAutoencoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(openmae.encoder)
        self.decoder = copy.deepcopy(openmae.decoder)
        self.norm_pix_loss = openmae.norm_pix_loss

    def loss(self, images_BCHW: Tensor, predicted_BLP: Tensor, tokens: Mask) -> Tensor:
        """Mean squared error of the masked tokens, from predictions of all, as in MAE's ``forward_loss``."""
        target_BLP = patchify(images_BCHW, self.encoder.token_size)
        if self.norm_pix_loss:
            target_BLP = normalise_units(target_BLP)
        error_BL = (predicted_BLP - target_BLP).square().mean(dim=-1)
        masked_BL = torch.zeros_like(error_BL).scatter(1, tokens.masked_BM, 1.0)
        return (error_BL * masked_BL).sum() / masked_BL.sum()


class DenseConvNeXtV2(Reference):
    """The official FCMAE without its sparse engine, which is what NVIDIA TAO runs: every site is computed, in NCHW.

    Blocks and norms are those of the official ConvNeXt V2 code, not timm's, which would drift to channels_last.

    Args:
        openmae: the model whose weights are copied.
        exact: zero the masked sites before every spatial operator, which makes it equal to OpenMAE's; otherwise once,
            after the stem.
    """

    def __init__(self, openmae: MaskedAutoencoder, exact: bool = False) -> None:
        super().__init__(openmae)
        self.exact = exact

    def forward(self, images_BCHW: Tensor, mask: Mask) -> Tensor:
        """The loss."""
        rows, columns = self.encoder.grid
        keep = torch.zeros(len(images_BCHW), rows * columns, device=images_BCHW.device, dtype=images_BCHW.dtype)
        keep_B1HW = keep.scatter(1, mask.visible_BV, 1.0).view(-1, 1, rows, columns)
        decoder = self.decoder
        x = _point_convolution(self.encode(images_BCHW, keep_B1HW), decoder.embed)
        x = x * keep_B1HW + decoder.mask_token.view(1, -1, 1, 1) * (1 - keep_B1HW)
        for block in decoder.blocks:
            x = _convnext_block(x, block, None)
        predicted = _point_convolution(x, decoder.predict)
        return self.loss(images_BCHW, predicted.flatten(2).transpose(1, 2), mask)

    def encode(self, images_BCHW: Tensor, keep_B1HW: Tensor) -> Tensor:
        """Latent ``[B, D, rows, columns]``, of masked units too."""
        backbone = self.encoder.backbone
        x = _norm_channels_first(backbone.stem[0](images_BCHW), backbone.stem[1])
        side = self.encoder.unit // _STEM
        x = x * _enlarged(keep_B1HW, side)
        for stage in backbone.stages:
            if not isinstance(stage.downsample, nn.Identity):
                norm, convolution = stage.downsample
                x, side = convolution(_norm_channels_first(x, norm)), side // 2
            for block in stage.blocks:
                x = _convnext_block(x, block, _enlarged(keep_B1HW, side) if self.exact else None)
        return x


class PlainViT(Reference):
    """MAE's published code over timm's blocks: every patch is embedded, then most are dropped."""

    def forward(self, images_BCHW: Tensor, mask: Mask) -> Tensor:
        """The loss."""
        vit = self.encoder.backbone
        x = _take(vit.patch_embed(images_BCHW) + vit.pos_embed[:, 1:], mask.visible_BV)
        prefix = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        latent = vit.norm(vit.blocks(vit.norm_pre(torch.cat([prefix, x], dim=1))))
        return self.loss(images_BCHW, _decode_all(self.decoder, latent, mask), mask)


class PlainHiera(Reference):
    """timm's Hiera with its own masking, the fusion of the official hiera_mae.py, and a plain decoder."""

    def forward(self, images_BCHW: Tensor, mask: Mask) -> Tensor:
        """The loss."""
        hiera, grid, split = self.encoder.backbone, self.encoder.grid, self.encoder.split
        seen = torch.zeros(len(images_BCHW), grid[0] * grid[1], dtype=torch.bool, device=images_BCHW.device)
        seen = seen.scatter(1, mask.visible_BV, True)
        _, stages = hiera.forward_features(images_BCHW, mask=seen, return_intermediates=True)
        total = stages[-1]
        for head, stage in zip(self.encoder.fusion, stages, strict=False):
            units = stage.flatten(0, 1).permute(0, 3, 1, 2)
            total = total + head(units).permute(0, 2, 3, 1).view_as(total)
        latent = hiera.head.norm(total).flatten(1, 3)
        tokens = split_units(mask, grid, split)
        return self.loss(images_BCHW, _decode_all(self.decoder, latent, tokens), tokens)


class TransformersViT(nn.Module):
    """``transformers.ViTMAEForPreTraining`` with the same weights, as it is installed.

    Args:
        openmae: a ViT.
    """

    def __init__(self, openmae: MaskedAutoencoder) -> None:
        super().__init__()
        import transformers

        vit, decoder = openmae.encoder.backbone, openmae.decoder
        config = transformers.ViTMAEConfig(
            hidden_size=openmae.encoder.dim,
            num_hidden_layers=len(vit.blocks),
            num_attention_heads=vit.blocks[0].attn.num_heads,
            intermediate_size=vit.blocks[0].mlp.fc1.out_features,
            image_size=openmae.encoder.grid[0] * openmae.encoder.unit,
            patch_size=openmae.encoder.unit,
            decoder_hidden_size=decoder.embed.out_features,
            decoder_num_hidden_layers=len(decoder.blocks),
            decoder_num_attention_heads=decoder.blocks[0].attn.num_heads,
            decoder_intermediate_size=decoder.blocks[0].mlp.fc1.out_features,
            layer_norm_eps=vit.norm.eps,
            norm_pix_loss=openmae.norm_pix_loss,
        )
        self.model = transformers.ViTMAEForPreTraining(config)
        self.model.load_state_dict(_transformers_names(openmae.state_dict()))
        self.to(vit.cls_token.device)

    def forward(self, images_BCHW: Tensor, mask: Mask) -> Tensor:
        """The loss."""
        visible, masked = mask.visible_BV.shape[1], mask.masked_BM.shape[1]
        self.model.config.mask_ratio = masked / (visible + masked)
        noise = torch.ones(len(images_BCHW), visible + masked, device=images_BCHW.device)
        return self.model(images_BCHW, noise=noise.scatter(1, mask.visible_BV, 0.0)).loss


def check_same_start(openmae: MaskedAutoencoder, reference: nn.Module, images_BCHW: Tensor, mask_ratio: float) -> None:
    """See that two models are the same one: as many weights to train, and the same loss.

    Raises:
        RunError: they are not, and a comparison of their speed would mean nothing.
    """
    count, expected_count = (
        sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (reference, openmae)
    )
    device = images_BCHW.device
    samples = torch.arange(len(images_BCHW), device=device)
    mask = random_mask(samples, seed=0, epoch=0, num_units=openmae.num_units, mask_ratio=mask_ratio)
    with torch.no_grad():
        loss, expected = float(reference(images_BCHW, mask)), float(openmae(images_BCHW, mask).loss)
    if count != expected_count or not math.isclose(loss, expected, rel_tol=1e-4):
        raise RunError(
            f"{type(reference).__name__} has {count} weights to train and a loss of {loss:.6f}, OpenMAE "
            f"{expected_count} and {expected:.6f}: they are not the same model.",
            "Fix bench/references.py; the versions of timm and transformers may have changed.",
        )


def _convnext_block(x_BCHW: Tensor, block: ConvNeXtBlock, keep_B1HW: Tensor | None) -> Tensor:
    """The block of the official code: depthwise in NCHW, the rest in NHWC."""
    x = x_BCHW if keep_B1HW is None else x_BCHW * keep_B1HW
    conv, norm, mlp = block.conv_dw, block.norm, block.mlp
    y = F.conv2d(x, conv.weight, conv.bias, padding=3, groups=x.shape[1]).permute(0, 2, 3, 1)
    y = F.layer_norm(y, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    y = F.gelu(F.linear(y, mlp.fc1.weight.flatten(1), mlp.fc1.bias))
    pooled = y if keep_B1HW is None else y * keep_B1HW.permute(0, 2, 3, 1)
    energy = torch.norm(pooled, p=2, dim=(1, 2), keepdim=True)
    scale = energy / (energy.mean(dim=-1, keepdim=True) + mlp.grn.eps)
    y = mlp.grn.weight * (y * scale) + mlp.grn.bias + y
    y = F.linear(y, mlp.fc2.weight.flatten(1), mlp.fc2.bias)
    return x_BCHW + y.permute(0, 3, 1, 2)


def _norm_channels_first(x_BCHW: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The official code's LayerNorm over channels, in NCHW."""
    mean = x_BCHW.mean(1, keepdim=True)
    variance = (x_BCHW - mean).pow(2).mean(1, keepdim=True)
    x = (x_BCHW - mean) / torch.sqrt(variance + norm.eps)
    return norm.weight[:, None, None] * x + norm.bias[:, None, None]


def _point_convolution(x_BCHW: Tensor, layer: nn.Linear) -> Tensor:
    return F.conv2d(x_BCHW, layer.weight[:, :, None, None], layer.bias)


def _enlarged(keep_B1HW: Tensor, side: int) -> Tensor:
    return keep_B1HW.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)


def _decode_all(decoder: Any, latent_BTD: Tensor, tokens: Mask) -> Tensor:
    """The published transformer decoder: all tokens through all layers, ``[B, L, P]``."""
    x, prefixes = decoder.embed(latent_BTD), decoder.num_prefix_tokens
    B, _, E = x[:, prefixes:].shape
    filled = torch.cat([x[:, prefixes:], decoder.mask_token.expand(B, tokens.masked_BM.shape[1], E)], dim=1)
    restore_BL = torch.cat([tokens.visible_BV, tokens.masked_BM], dim=1).argsort(dim=1)
    x = torch.cat([x[:, :prefixes], _take(filled, restore_BL)], dim=1) + decoder.pos_embed
    for block in decoder.blocks:
        x = block(x)
    return decoder.predict(decoder.norm(x))[:, prefixes:]


def _take(x_BLE: Tensor, index_BK: Tensor) -> Tensor:
    return x_BLE.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, x_BLE.shape[-1]))


_RENAMES = {  # in this order
    "encoder.backbone.pos_embed": "vit.embeddings.position_embeddings",
    "encoder.backbone.patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "encoder.backbone.cls_token": "vit.embeddings.cls_token",
    "encoder.backbone.blocks": "vit.layers",
    "encoder.backbone.norm": "vit.layernorm",
    "decoder.blocks": "decoder.decoder_layers",
    "decoder.predict": "decoder.decoder_pred",
    "decoder.embed": "decoder.decoder_embed",
    "decoder.pos_embed": "decoder.decoder_pos_embed",
    "decoder.norm": "decoder.decoder_norm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
}


def _transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names to those of transformers 5; query, key and value become three matrices."""
    theirs = {}
    for name, value in state.items():
        for our, other in _RENAMES.items():
            name = name.replace(our, other)
        if "attn.qkv" in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                theirs[name.replace("attn.qkv", f"attention.{part}_proj")] = third
        else:
            theirs[name] = value
    return theirs
