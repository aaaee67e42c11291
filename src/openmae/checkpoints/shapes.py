"""Derive a file's model from the shapes of its tensors, or check the file's header against them.

A header determines how much memory is allocated, so it is trusted only if the tensors confirm it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import timm
import torch
from torch import Tensor

from openmae.checkpoints.foreign_names import NamedWeights
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig
from openmae.spec.architectures import ARCHITECTURES, get_architecture
from openmae.storage.printable import counted

_HIERA_STRIDE = 4  # px per token
_DEFAULT_SIDE = 224
_MAX_SIDE = 2**14  # px; no tensor of a ConvNeXt depends on the image size
_HEADS = ("head.fc.weight", "head.weight")
_KERNELS = {"vit": "patch_embed.proj.weight", "hiera": "patch_embed.proj.weight", "convnextv2": "stem.0.weight"}
_VIT_NORMS = ("norm.weight", "fc_norm.weight")
OTHER_ARCHITECTURES = (
    "Use weights of this architecture; DINOv2, DeiT III, EVA and CLIP models, for example, are different ones."
)
_FOREIGN_PARTS = (
    (r"\.(ls[12]\.gamma|gamma(_[12])?)$", "LayerScale"),
    (r"\breg_tokens?$|register_tokens", "register tokens"),
    (r"\b[qk]_norm\.", "query and key norms"),
    (r"rope|rotary|\bfreqs", "rotary positions"),
    (r"rel_pos|relative_position", "relative positions"),
    (r"\bdist_token$|head_dist", "a distillation token"),
    (r"\bnorm_pre\.|norm_post\.", "another norm"),
    (r"\bmlp\.(w12|w3|fc1_g|fc1_x|norm)\b", "a gated MLP"),
)


def foreign_parts(names: Iterable[str]) -> list[str]:
    """Return the parts with these tensor names that no supported architecture has."""
    names = list(names)
    return [part for pattern, part in _FOREIGN_PARTS if any(re.search(pattern, name) for name in names)]


def likely_arch(weights: NamedWeights) -> str | None:
    """Return the architecture whose blocks have exactly these tensor names and sizes, or None."""
    sizes = _block_sizes(weights.backbone)
    rows = (row for row in ARCHITECTURES.values() if row.family == weights.family)
    return next((row.name for row in rows if _timm_shape(row.timm_name)[0] == sizes), None)


def count_classes(backbone: Mapping[str, Tensor]) -> int:
    """Return the number of outputs of the classifier in a file; 0 if it has none."""
    head = _head(backbone)
    return 0 if head is None else head.shape[0]


def patch_size_of(weights: NamedWeights) -> int | None:
    """Return the side of a ViT's patches in pixels; None for the other families."""
    kernel = weights.backbone.get(_KERNELS["vit"])
    return kernel.shape[-1] if weights.family == "vit" and kernel is not None and kernel.ndim == 4 else None


def guess_config(weights: NamedWeights, arch: str | None = None) -> ModelConfig:
    """Derive the model of another program's file from the shapes of its tensors.

    If the shapes fit no architecture, ``arch`` is assumed. A ViT without a final norm is taken for one that NVIDIA TAO
    has fine-tuned: it classifies the mean of the patch tokens.

    Raises:
        CheckpointError: The shapes fit no architecture.
    """
    arch = likely_arch(weights) or arch
    if arch is None:
        problem = f"The weights ({weights.layout} layout) fit no supported architecture"
        if parts := foreign_parts(weights.backbone):
            raise CheckpointError(f"{problem}: they have {', '.join(parts)}.", OTHER_ARCHITECTURES)
        raise CheckpointError(f"{problem}.", "Name the closest one: load_backbone(path, arch=...).")
    return _config_of(arch, weights)


def _config_of(arch: str, weights: NamedWeights) -> ModelConfig:
    row, backbone, classes = get_architecture(arch), weights.backbone, count_classes(weights.backbone)
    head, width = _head(backbone), _timm_shape(row.timm_name)[1]
    if head is not None and head.shape[1] != width:  # it would be allocated with the model's width
        raise CheckpointError(
            f"{arch} has {width} features, but the file has a classifier of {list(head.shape)}.",
            "Use another checkpoint.",
        )
    name = _KERNELS[weights.family]
    kernel = backbone.get(name)
    if kernel is None or kernel.ndim != 4 or not kernel.numel():
        raise CheckpointError(f"{name} is not the weight of a convolution.", "Use another checkpoint.")
    if weights.family == "convnextv2":
        return ModelConfig(arch, in_chans=kernel.shape[1], num_classes=classes)
    is_vit = weights.family == "vit"
    stride = kernel.shape[-1] if is_vit else _HIERA_STRIDE
    positions = backbone.get("pos_embed")
    side = _DEFAULT_SIDE
    if positions is not None and positions.ndim == 3:
        side = math.isqrt(max(positions.shape[1] - is_vit, 0)) * stride
    normed = any(name in backbone for name in _VIT_NORMS)
    return ModelConfig(
        arch,
        input_size=(side, side),
        in_chans=kernel.shape[1],
        patch_size=stride if is_vit and row.family == "vit" and stride != row.mask_unit else None,
        global_pool="fc_norm.weight" in backbone or not normed,
        final_norm=normed or not is_vit,
        num_classes=classes,
    )


def check_header(config: ModelConfig, weights: NamedWeights) -> None:
    """Compare the model that a header describes with the tensors in the file.

    Raises:
        CheckpointError: They differ; the message names the fields and both values.
    """
    wrong = [f"{field} is {said}, but the tensors have {held}" for field, said, held in _differences(config, weights)]
    if wrong:
        raise CheckpointError(
            f"The header does not fit the tensors of the file: {'; '.join(wrong)}.",
            "The file is damaged or was manipulated: use another checkpoint.",
        )


def _differences(config: ModelConfig, weights: NamedWeights) -> Iterator[tuple[str, object, str]]:
    """Yield (field, value in the header, description of the tensors)."""
    row = config.architecture
    if row.family != weights.family or _block_sizes(weights.backbone) != _timm_shape(row.timm_name)[0]:
        yield "arch", config.arch, f"the shapes of {likely_arch(weights) or 'no supported architecture'}"
        return
    found, size = _config_of(config.arch, weights), list(config.input_size)
    if config.num_classes != found.num_classes:
        yield "num_classes", config.num_classes, f"{found.num_classes} outputs"
    if config.in_chans != found.in_chans:
        yield "in_chans", config.in_chans, counted(found.in_chans, "channel")
    if weights.family == "vit" and config.unit != found.unit:
        yield "patch_size", config.unit, f"patches of {found.unit}"
    if max(size) > _MAX_SIDE:
        yield "input_size", size, f"at most {_MAX_SIDE} pixels per side"
    if weights.family != "convnextv2":
        is_vit, positions = weights.family == "vit", weights.backbone.get("pos_embed")
        stride = config.unit if is_vit else _HIERA_STRIDE
        tokens = positions.shape[1] if positions is not None and positions.ndim == 3 else 0
        if (size[0] // stride) * (size[1] // stride) + is_vit != tokens:
            yield "input_size", size, f"positions of {tokens} tokens"
    blocks = {match[1] for name in weights.rest if (match := re.match(r"decoder\.(?:cross_)?blocks\.(\d+)\.", name))}
    if weights.rest and len(blocks) != config.decoder_depth:
        yield "decoder_depth", config.decoder_depth, f"{len(blocks)} blocks"
    token = weights.rest.get("decoder.mask_token")
    if token is not None and token.shape[-1:] != (config.decoder_embed_dim,):
        yield "decoder_embed_dim", config.decoder_embed_dim, f"a mask token of {list(token.shape)}"


def _head(backbone: Mapping[str, Tensor]) -> Tensor | None:
    head = next((backbone[name] for name in _HEADS if name in backbone), None)
    return head if head is not None and head.ndim == 2 else None


def _block_sizes(backbone: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: value.numel() for name, value in backbone.items() if name.startswith(("blocks.", "stages."))}


@functools.cache
def _timm_shape(timm_name: str) -> tuple[dict[str, int], int]:
    """Return the sizes of a timm model's block tensors, and the width of its classifier's input."""
    with torch.device("meta"):
        model = timm.create_model(timm_name, num_classes=0)
    return _block_sizes(model.state_dict()), model.num_features
