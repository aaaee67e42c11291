"""Names and shapes of other people's checkpoints -> timm's names for the backbone, ours for the decoder.

Each layout is a table of renamings, applied in order, and at most one function that reshapes values. Sources:
facebookresearch/mae (models_mae.py), facebookresearch/ConvNeXt-V2 (models/fcmae.py, utils.py),
facebookresearch/hiera (hiera_mae.py), NVIDIA TAO's MAE (the same names behind ``model.``). What wraps the weights:
``wrappers.py``; transformers' names: ``huggingface.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from openmae.checkpoints.huggingface import from_transformers, is_transformers
from openmae.checkpoints.wrappers import State, unwrap
from openmae.errors import CheckpointError
from openmae.spec.architectures import Family

_Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class NamedWeights:
    """A checkpoint's tensors under the names that OpenMAE uses.

    Attributes:
        layout: where the names came from, for people to read.
        family: of the backbone.
        backbone: by timm's names; the classifier, where there is one, included.
        rest: fusion heads and decoder by our names (``encoder.fusion.*``, ``decoder.*``), if any.
        note: which of several models in the file was taken, and what was left; empty where there is no choice.
    """

    layout: str
    family: Family
    backbone: State
    rest: State
    note: str = ""


_OURS = "encoder.backbone."
_STEMS = ("stem", "downsample_layers.0", "encoder.downsample_layers.0")

_DECODER: _Rules = (
    (r"^decoder_pred\.", "decoder.predict."),
    (r"^decoder_(embed|pos_embed|blocks|norm)\b", r"decoder.\1"),
    (r"^mask_token$", "decoder.mask_token"),
)
_VIT: _Rules = _DECODER
_HIERA: _Rules = (
    (r"^pos_embed_abs$", "pos_embed"),
    (r"^(encoder_)?norm\.", "head.norm."),
    (r"^head\.projection\.", "head.fc."),
    (r"^multi_scale_fusion_heads\.", "encoder.fusion."),
    *_DECODER,
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


def recognise(raw: Mapping[str, Any], wanted: str = "") -> NamedWeights:
    """Find out whose layout a loaded checkpoint follows, and bring it to the names that OpenMAE uses.

    Args:
        raw: the mapping that the file holds: a state dict, or one wrapped in a dict of other things.
        wanted: the entry or prefix to take, where the file has several models.

    Raises:
        CheckpointError: no layout fits; the text shows the first names.
    """
    wrapped = unwrap(raw, wanted)
    state, note = wrapped.state, str(wrapped) if wrapped.others or wrapped.left else ""
    if any(name.startswith(_OURS) for name in state):
        return replace(_ours(state), note=note)
    if is_transformers(state):
        layout, family, renamed = from_transformers(state, _reorder_predictions)
    else:
        layout, family, rules, reshape = _layout(state, wrapped.entry)
        renamed = {_rename(name, rules): reshape(name, value, state) for name, value in state.items()}
    if "model." in wrapped.prefix:
        layout += " (behind 'model.', as TAO's)"
    backbone, rest = _split(renamed)
    return NamedWeights(layout, family, backbone, rest, note)


def family_of(backbone: Mapping[str, Tensor]) -> Family | None:
    """The family that a backbone's timm or official names belong to; None for none of ours."""
    if any(f"{stem}.0.weight" in backbone for stem in _STEMS):
        return "convnextv2" if any(".grn." in name for name in backbone) else None
    if "blocks.0.norm1.weight" not in backbone or "patch_embed.proj.weight" not in backbone:
        return None
    return "vit" if "cls_token" in backbone else "hiera"


def _layout(state: State, wrapper: str) -> tuple[str, Family, _Rules, Callable[[str, Tensor, State], Tensor]]:
    """(layout, family, renamings, reshaping) of a bare state dict."""
    family = family_of(state)
    with_decoder = "decoder_embed.weight" in state
    if family == "vit":
        official = with_decoder or wrapper == "model"
        return ("official MAE ViT" if official else "timm ViT"), family, _VIT, _keep
    if family == "hiera":
        if "head.norm.weight" in state:
            return "timm Hiera", family, (), _keep
        return ("official Hiera MAE" if with_decoder else "official Hiera"), family, _HIERA, _reshape_hiera
    if family == "convnextv2":
        if "stem.0.weight" in state:
            return "timm ConvNeXt V2", family, (), _keep
        if any(name.endswith(".kernel") for name in state):
            return "official sparse FCMAE", family, _CONVNEXT, _reshape_convnext
        layout = "official ConvNeXt V2" if "head.weight" in state else "official FCMAE"
        return layout, family, _CONVNEXT, _reshape_convnext
    names = ", ".join(list(state)[:5]) or "none"
    raise CheckpointError(
        f"The weights follow no layout that OpenMAE knows; their first names: {names}.",
        "Use a checkpoint of OpenMAE, timm, TAO's MAE, or the official MAE, ConvNeXt V2 or Hiera repository, "
        "for one of the architectures of model.arch.",
    )


def _ours(state: State) -> NamedWeights:
    """A masked autoencoder's own names."""
    backbone = {name.removeprefix(_OURS): value for name, value in state.items() if name.startswith(_OURS)}
    rest = {name: value for name, value in state.items() if not name.startswith(_OURS)}
    family = family_of(backbone)
    if family is None:
        raise CheckpointError("The weights under 'encoder.backbone.' belong to no architecture of model.arch.")
    return NamedWeights("OpenMAE", family, backbone, rest)


def _split(state: State) -> tuple[State, State]:
    """(backbone, rest) of renamed weights."""
    rest = {name: value for name, value in state.items() if name.startswith(("decoder.", "encoder."))}
    return {name: value for name, value in state.items() if name not in rest}, rest


def _rename(name: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _keep(name: str, value: Tensor, state: State) -> Tensor:
    return value


def _reshape_convnext(name: str, value: Tensor, state: State) -> Tensor:
    """Sparse kernels made dense, GRN (up to 6-D in TAO's files) and biases flat, 1x1 kernels matrices."""
    if name.endswith(".kernel"):
        return _dense_kernel(value)
    if ".grn." in name or name.endswith(".bias"):
        return value.reshape(-1)
    if name in ("proj.weight", "pred.weight"):
        return value.flatten(1)
    return value.reshape(1, 1, -1) if name == "mask_token" else value


def _dense_kernel(kernel: Tensor) -> Tensor:
    """MinkowskiEngine's ``[k*k, in, out]`` or depthwise ``[k*k, C]`` -> ``[out, in, k, k]``.

    Its kernel volume is column-major: hence the transposition (ConvNeXt-V2's ``remap_checkpoint_keys``).
    """
    side = math.isqrt(kernel.shape[0])
    if kernel.ndim == 2:
        kernel = kernel.unsqueeze(1)
    return kernel.permute(2, 1, 0).unflatten(2, (side, side)).transpose(2, 3).contiguous()


def _reshape_hiera(name: str, value: Tensor, state: State) -> Tensor:
    """Predictions ordered (channel, row, column) in Hiera's code, (row, column, channel) in ours."""
    if not name.startswith("decoder_pred."):
        return value
    return _reorder_predictions(value, state["patch_embed.proj.weight"].shape[1])


def _reorder_predictions(value: Tensor, channels: int) -> Tensor:
    return value.unflatten(0, (channels, -1)).transpose(0, 1).flatten(0, 1)
