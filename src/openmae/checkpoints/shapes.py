"""The model that a file holds: what its header says, compared with its tensors, or what their shapes tell.

A header decides what is allocated, so nothing of it is believed that the tensors do not confirm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from openmae.checkpoints.foreign_names import NamedWeights
from openmae.checkpoints.matching import OTHER_ARCHITECTURES, foreign_parts, has_blocks_of, likely_arch, width_of
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig
from openmae.spec.architectures import get_architecture

_HIERA_STRIDE = 4  # px of a token
_DEFAULT_SIDE = 224
_HEADS = ("head.fc.weight", "head.weight")
_KERNELS = {"vit": "patch_embed.proj.weight", "hiera": "patch_embed.proj.weight", "convnextv2": "stem.0.weight"}
_WIDEST = 2**14  # px: what no tensor of a ConvNeXt tells
_VIT_NORMS = ("norm.weight", "fc_norm.weight")


def count_classes(backbone: Mapping[str, Tensor]) -> int:
    """Outputs of the classifier that a file holds; 0 for none."""
    head = _head(backbone)
    return 0 if head is None else head.shape[0]


def _head(backbone: Mapping[str, Tensor]) -> Tensor | None:
    head = next((backbone[name] for name in _HEADS if name in backbone), None)
    return head if head is not None and head.ndim == 2 else None


def _head_differences(arch: str, backbone: Mapping[str, Tensor]) -> Iterator[tuple[str, object, str]]:
    """A classifier of another width would be allocated in the model's own."""
    head = _head(backbone)
    if head is not None and head.shape[1] != width_of(arch):
        yield "the classifier's width", width_of(arch), f"the file has a classifier of {list(head.shape)}"


def patch_size_of(weights: NamedWeights) -> int | None:
    """Side of a ViT's patches in pixels; None for the other families."""
    kernel = weights.backbone.get(_KERNELS["vit"])
    return kernel.shape[-1] if weights.family == "vit" and kernel is not None and kernel.ndim == 4 else None


def guess_config(weights: NamedWeights, arch: str | None = None) -> ModelConfig:
    """The model of another program's file, from the shapes of its tensors.

    A ViT without any final norm is one that NVIDIA TAO has fine-tuned: it classifies the mean of the patch tokens.

    Raises:
        CheckpointError: the shapes fit no architecture.
    """
    arch = arch or likely_arch(weights)
    if arch is None:
        kinds = ", ".join(foreign_parts(weights.backbone))
        raise CheckpointError(
            f"The weights ({weights.layout} layout) fit no architecture of the table"
            f"{f': they have {kinds}' if kinds else ''}.",
            OTHER_ARCHITECTURES if kinds else "Name the nearest: load_backbone(path, arch=...).",
        )
    row, backbone, classes = get_architecture(arch), weights.backbone, count_classes(weights.backbone)
    for _, width, found in _head_differences(arch, backbone):
        raise CheckpointError(f"{arch} has {width} features, but {found}.", "Use another checkpoint.")
    kernel = backbone[_KERNELS[weights.family]]
    if kernel.ndim != 4 or not kernel.numel():
        raise CheckpointError(
            f"{_KERNELS[weights.family]} has the shape {list(kernel.shape)}, not that of a convolution.",
            "Use another checkpoint.",
        )
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
    """Compare what a header says of a model with the tensors that come with it.

    Raises:
        CheckpointError: they differ; the text names the field, and both values.
    """
    wrong = [f"{field} is {said}, but {found}" for field, said, found in _differences(config, weights)]
    if wrong:
        raise CheckpointError(
            f"The header does not fit the tensors of the file: {'; '.join(wrong)}.",
            "The file is damaged or was made up: use another checkpoint.",
        )


def _differences(config: ModelConfig, weights: NamedWeights) -> Iterator[tuple[str, object, str]]:
    """(field, what the header says, what the tensors say)."""
    backbone, row = weights.backbone, config.architecture
    if row.family != weights.family:
        yield "arch", config.arch, f"the tensors are of the {weights.family} family"
        return
    if not has_blocks_of(weights, config.arch):
        yield "arch", config.arch, f"the blocks are of {likely_arch(weights) or 'no architecture of the table'}"
    classes = count_classes(backbone)
    if config.num_classes != classes:
        yield "num_classes", config.num_classes, f"the classifier has {classes} outputs"
    yield from _head_differences(config.arch, backbone)
    kernel = backbone.get(_KERNELS[row.family])
    if kernel is None or kernel.ndim != 4:
        yield "arch", config.arch, f"the file has no {_KERNELS[row.family]}"
    else:
        if kernel.shape[1] != config.in_chans:
            yield "in_chans", config.in_chans, f"the first convolution takes {kernel.shape[1]}"
        if row.family == "vit" and kernel.shape[-1] != config.unit:
            yield "patch_size", config.unit, f"the patch embedding has {kernel.shape[-1]}"
    yield from _position_differences(config, weights)
    if weights.rest:
        yield from _decoder_differences(config, weights.rest)


def _position_differences(config: ModelConfig, weights: NamedWeights) -> Iterator[tuple[str, object, str]]:
    positions = weights.backbone.get("pos_embed")
    if max(config.input_size) > _WIDEST:
        yield "input_size", list(config.input_size), f"images have up to {_WIDEST} pixels a side"
    if weights.family == "convnextv2":
        return
    if positions is None or positions.ndim != 3:
        yield "input_size", list(config.input_size), "the file has no position embedding"
        return
    is_vit = weights.family == "vit"
    stride = config.unit if is_vit else _HIERA_STRIDE
    height, width = config.input_size
    if (height // stride) * (width // stride) + is_vit != positions.shape[1]:
        yield "input_size", list(config.input_size), f"the position embedding has {positions.shape[1]} tokens"


def _decoder_differences(config: ModelConfig, rest: Mapping[str, Tensor]) -> Iterator[tuple[str, object, str]]:
    blocks = {match[1] for name in rest if (match := re.match(r"decoder\.(?:cross_)?blocks\.(\d+)\.", name))}
    if len(blocks) != config.decoder_depth:
        yield "decoder_depth", config.decoder_depth, f"the decoder has {len(blocks)} blocks"
    token = rest.get("decoder.mask_token")
    if token is not None and token.shape[-1:] != (config.decoder_embed_dim,):
        yield "decoder_embed_dim", config.decoder_embed_dim, f"the mask token has {list(token.shape)}"
