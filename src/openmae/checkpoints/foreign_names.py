"""Rename the tensors of other programs' checkpoints: timm's names for the backbone, OpenMAE's for the decoder.

Each layout is a table of substitutions, applied in order, and at most one function that reshapes values. Sources:
facebookresearch/mae (models_mae.py), facebookresearch/ConvNeXt-V2 (models/fcmae.py, utils.py),
facebookresearch/hiera (hiera_mae.py), NVIDIA TAO's MAE (the same names, prefixed with ``model.``), Hugging Face
transformers. Both of transformers' spellings of a ViT are read: ``encoder.layer.0.attention.attention.query``
(``save_pretrained`` and the Hub) and ``layers.0.attention.q_proj`` (modules of transformers 5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from openmae.checkpoints.wrappers import State, unwrap
from openmae.errors import CheckpointError
from openmae.spec.architectures import Family

_Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class NamedWeights:
    """A checkpoint's tensors under the names that OpenMAE uses.

    Attributes:
        layout: original naming scheme, for messages.
        backbone: tensors of the backbone by timm's names, with the classifier if there is one.
        rest: fusion heads and decoder by OpenMAE's names (``encoder.fusion.*``, ``decoder.*``), if any.
        note: see ``Wrapped.note``.
    """

    layout: str
    family: Family
    backbone: State
    rest: State
    note: str = ""


_OWN = "encoder.backbone."
_STEMS = ("stem", "downsample_layers.0", "encoder.downsample_layers.0")

_VIT: _Rules = (
    (r"^decoder_pred\.", "decoder.predict."),
    (r"^decoder_(embed|pos_embed|blocks|norm)\b", r"decoder.\1"),
    (r"^mask_token$", "decoder.mask_token"),
)
_HIERA: _Rules = (
    (r"^pos_embed_abs$", "pos_embed"),
    (r"^(encoder_)?norm\.", "head.norm."),
    (r"^head\.projection\.", "head.fc."),
    (r"^multi_scale_fusion_heads\.", "encoder.fusion."),
    *_VIT,
)
_CONVNEXT: _Rules = (
    (r"^encoder\.", ""),
    (r"\.kernel$", ".weight"),
    (r"\.(ln|linear)\.", "."),
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^decoder\.(\d+)\.", r"decoder.blocks.\1."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^proj\.", "decoder.embed."),
    (r"^pred\.", "decoder.predict."),
    (r"^mask_token$", "decoder.mask_token"),
)
_HF_VIT: _Rules = (
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^decoder\.decoder_(encoder\.layer|layers)\.(\d+)\.", r"decoder.blocks.\2."),
    (r"^decoder\.decoder_pred\.", "decoder.predict."),
    (r"^decoder\.decoder_(pos_embed|embed|norm)\b", r"decoder.\1"),
    (r"\.attention\.(attention\.)?(query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.)?(key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.)?(value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
_HF_HIERA: _Rules = (
    (r"^hiera\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(pooler\.layernorm|encoder_norm)\.", "head.norm."),
    (r"^classifier\.", "head.fc."),
    (r"^multiscale_fusion\.multi_scale_fusion_heads\.", "encoder.fusion."),
    (r"^decoder\.decoder_block\.layers\.(\d+)\.", r"decoder.blocks.\1."),
    (r"^decoder\.decoder_position_embeddings$", "decoder.pos_embed"),
    (r"^decoder\.decoder_embeddings\.", "decoder.embed."),
    (r"^decoder\.decoder_pred\.", "decoder.predict."),
    (r"^decoder\.decoder_norm\.", "decoder.norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
_HF_CONVNEXT: _Rules = (
    (r"^convnextv2\.", ""),
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^layernorm\.", "head.norm."),
    (r"^classifier\.", "head.fc."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.layernorm\.", ".norm."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.grn\.", ".mlp.grn."),
)
_HF_UNUSED = re.compile(r"pooler\.dense\.|embeddings\.mask_token$")  # transformers' own pooling, DINOv2's masks


def recognise(raw: Mapping[str, Any], wanted: str = "") -> NamedWeights:
    """Identify the layout of a file's content, and rename its tensors; see ``unwrap`` for the arguments.

    Raises:
        CheckpointError: No layout fits; the message shows the first names.
    """
    wrapped = unwrap(raw, wanted)
    state = wrapped.state
    if any(name.startswith(_OWN) for name in state):
        return replace(_own(state), note=wrapped.note)
    if any("embeddings.patch_embeddings." in name for name in state):
        layout, family, renamed = _from_transformers(state)
    else:
        layout, family, renamed = _from_official(state, wrapped.entry)
    if "model." in wrapped.prefix:
        layout += " (behind 'model.', as TAO's)"
    rest = {name: value for name, value in renamed.items() if name.startswith(("decoder.", "encoder."))}
    backbone = {name: value for name, value in renamed.items() if name not in rest}
    return NamedWeights(layout, family, backbone, rest, wrapped.note)


def family_of(backbone: Mapping[str, Tensor]) -> Family | None:
    """Return the family of a backbone with timm's or official names, or None."""
    if any(f"{stem}.0.weight" in backbone for stem in _STEMS):
        return "convnextv2" if any(".grn." in name for name in backbone) else None
    if "blocks.0.norm1.weight" not in backbone or "patch_embed.proj.weight" not in backbone:
        return None
    return "vit" if "cls_token" in backbone else "hiera"


def _own(state: State) -> NamedWeights:
    """Split the state dict of a ``MaskedAutoencoder``."""
    backbone = {name.removeprefix(_OWN): value for name, value in state.items() if name.startswith(_OWN)}
    rest = {name: value for name, value in state.items() if not name.startswith(_OWN)}
    family = family_of(backbone)
    if family is None:
        raise CheckpointError("The weights under 'encoder.backbone.' belong to no supported architecture.")
    return NamedWeights("OpenMAE", family, backbone, rest)


def _from_official(state: State, entry: str) -> tuple[str, Family, State]:
    """Return the layout, the family and the renamed tensors of a file with timm's or official names."""
    family = family_of(state)
    with_decoder = "decoder_embed.weight" in state
    if family == "vit":
        return ("official MAE ViT" if with_decoder or entry == "model" else "timm ViT"), family, _rename(state, _VIT)
    if family == "hiera":
        if "head.norm.weight" in state:
            return "timm Hiera", family, state
        named = _reorder_predictions(_rename(state, _HIERA))
        return ("official Hiera MAE" if with_decoder else "official Hiera"), family, named
    if family == "convnextv2":
        if "stem.0.weight" in state:
            return "timm ConvNeXt V2", family, state
        layout = "official ConvNeXt V2" if "head.weight" in state else "official FCMAE"
        if any(name.endswith(".kernel") for name in state):
            layout = "official sparse FCMAE"
        dense = {name: _reshape_convnext(name, value) for name, value in state.items()}
        return layout, family, _rename(dense, _CONVNEXT)
    names = ", ".join(list(state)[:5]) or "none"
    raise CheckpointError(
        f"The weights follow no layout that OpenMAE knows; their first names: {names}.",
        "Use a checkpoint of OpenMAE, timm, transformers, TAO's MAE, or the official MAE, ConvNeXt V2 or Hiera code "
        "whose architecture model.arch supports.",
    )


def _from_transformers(state: State) -> tuple[str, Family, State]:
    state = {name: value for name, value in state.items() if not _HF_UNUSED.search(name)}
    if any(name.endswith("embeddings.cls_token") for name in state):
        return "transformers ViT", "vit", _join_attention(_rename(state, _HF_VIT))
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state):
        return "transformers Hiera", "hiera", _reorder_predictions(_rename(_number_blocks(state), _HF_HIERA))
    flat = {name: value.reshape(-1) if ".grn." in name else value for name, value in state.items()}
    return "transformers ConvNeXt V2", "convnextv2", _rename(flat, _HF_CONVNEXT)


def _rename(state: State, rules: _Rules) -> State:
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _reshape_convnext(name: str, value: Tensor) -> Tensor:
    """Convert sparse kernels to dense ones, GRN (up to 6-D in TAO's files) and biases to 1-D, 1x1 kernels to 2-D."""
    if name.endswith(".kernel"):
        return _dense_kernel(value)
    if ".grn." in name or name.endswith(".bias"):
        return value.reshape(-1)
    if name in ("proj.weight", "pred.weight"):
        return value.flatten(1)
    return value.reshape(1, 1, -1) if name == "mask_token" else value


def _dense_kernel(kernel: Tensor) -> Tensor:
    """Convert MinkowskiEngine's ``[k*k, in, out]`` or depthwise ``[k*k, C]`` to ``[out, in, k, k]``.

    MinkowskiEngine's kernels are column-major, so they are transposed (ConvNeXt-V2's ``remap_checkpoint_keys``).
    """
    side = math.isqrt(kernel.shape[0])
    if kernel.ndim == 2:
        kernel = kernel.unsqueeze(1)
    return kernel.permute(2, 1, 0).unflatten(2, (side, side)).transpose(2, 3).contiguous()


def _reorder_predictions(named: State) -> State:
    """Reorder Hiera's predictions from (channel, row, column) to OpenMAE's (row, column, channel)."""
    channels = named["patch_embed.proj.weight"].shape[1]
    return {
        name: value.unflatten(0, (channels, -1)).transpose(0, 1).flatten(0, 1)
        if name.startswith("decoder.predict.")
        else value
        for name, value in named.items()
    }


def _join_attention(state: State) -> State:
    """Join the query, key and value layers of each block into timm's ``qkv``."""
    joined = dict(state)
    for name in state:
        parts = [re.sub(r"\.attn\.q\.", f".attn.{part}.", name) for part in "qkv"]
        if ".attn.q." in name and all(part in state for part in parts):
            joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([joined.pop(part) for part in parts])
    return joined


def _number_blocks(state: State) -> State:
    """Renumber Hiera's blocks consecutively across stages, as timm does."""
    place = re.compile(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.")
    found = sorted({(int(match[1]), int(match[2])) for name in state if (match := place.search(name))})
    number = {block: index for index, block in enumerate(found)}
    return {
        place.sub(lambda match: f"blocks.{number[int(match[1]), int(match[2])]}.", name): value
        for name, value in state.items()
    }
