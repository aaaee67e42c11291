"""Names of Hugging Face's transformers -> timm's for the backbone, ours for the decoder.

Both spellings of a ViT are read: the one that ``save_pretrained`` writes and the Hub has
(``encoder.layer.0.attention.attention.query``), and that of the modules of transformers 5
(``layers.0.attention.q_proj``).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from openmae.spec.architectures import Family

State = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]

_VIT_BLOCK: Rules = (
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
_VIT: Rules = (
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
    *_VIT_BLOCK,
)
_HIERA: Rules = (
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
_CONVNEXTV2: Rules = (
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
_UNUSED = ("pooler.dense.", "embeddings.mask_token")  # beside the features: transformers' own pooling, DINOv2's masks


def is_transformers(state: State) -> bool:
    """Whether the names are those of transformers."""
    return any("embeddings.patch_embeddings." in name for name in state)


def from_transformers(state: State, predictions: Callable[[Tensor, int], Tensor]) -> tuple[str, Family, State]:
    """(layout, family, weights by timm's and our names).

    Args:
        state: by transformers' names.
        predictions: Hiera's decoder weights and the image's channels -> the weights in our order.
    """
    state = {name: value for name, value in state.items() if not name.endswith(_UNUSED) and _UNUSED[0] not in name}
    if any(name.endswith("embeddings.cls_token") for name in state):
        return "transformers ViT", "vit", _joined_attention(_renamed(state, _VIT))
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state):
        named = _renamed(_numbered(state), _HIERA)
        channels = named["patch_embed.proj.weight"].shape[1]
        for name in ("decoder.predict.weight", "decoder.predict.bias"):
            if name in named:
                named[name] = predictions(named[name], channels)
        return "transformers Hiera", "hiera", named
    named = _renamed(state, _CONVNEXTV2)
    flat = {name: value.reshape(-1) if ".grn." in name else value for name, value in named.items()}
    return "transformers ConvNeXt V2", "convnextv2", flat


def _renamed(state: State, rules: Rules) -> State:
    return {_rename(name, rules): value for name, value in state.items()}


def _rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _joined_attention(state: State) -> State:
    """Query, key and value of a block as one layer."""
    joined = dict(state)
    for name in state:
        parts = [re.sub(r"\.attn\.q\.", f".attn.{part}.", name) for part in "qkv"]
        if ".attn.q." in name and all(part in state for part in parts):
            joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([joined.pop(part) for part in parts])
    return joined


def _numbered(state: State) -> State:
    """Blocks counted through all stages, as timm's Hiera has them."""
    place = re.compile(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.")
    found = sorted({(int(match[1]), int(match[2])) for name in state if (match := place.search(name))})
    number = {block: index for index, block in enumerate(found)}
    return {
        place.sub(lambda match: f"blocks.{number[int(match[1]), int(match[2])]}.", name): value
        for name, value in state.items()
    }
