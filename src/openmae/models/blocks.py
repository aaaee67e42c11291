"""The blocks of a model, by family: what fully sharded training gathers, and whose activations are computed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from timm.models.convnext import ConvNeXtBlock
from timm.models.hiera import HieraBlock
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from openmae.models.build import ModelConfig
from openmae.models.decoders import CrossAttentionBlock, CrossAttentionDecoder
from openmae.models.mae import MaskedAutoencoder


def sharded_units(model: nn.Module, config: ModelConfig) -> list[nn.Module]:
    """Return the modules whose weights are gathered together, inner ones first; the root module gathers the rest.

    A module's weights are gathered when its ``forward`` is called, so the natural units are blocks. In pretraining,
    ConvNeXt V2's blocks are not called, only their weights are used. So its encoder and its decoder are one unit each,
    which takes more memory. The last block of a self-attention decoder is not called either; the root module gathers
    its weights.
    """
    if not isinstance(model, MaskedAutoencoder):
        return _blocks(model)
    if config.architecture.family == "convnextv2":
        return [model.encoder, model.decoder]
    decoder = model.decoder
    called = decoder.cross_blocks if isinstance(decoder, CrossAttentionDecoder) else _blocks(decoder)[:-1]
    return [*_blocks(model.encoder.backbone), *called]


def recompute_activations(model: nn.Module) -> None:
    """Let each block keep only its input for the backward pass, and compute its activations again there.

    Results do not change, since the random numbers of drop path are drawn again. A step computes the forward pass of
    the blocks twice, a third more work (Chen et al. 2016, arXiv:1604.06174). The last block of a
    self-attention decoder is not called, and keeps its activations.
    """
    for block in blocks_of(model):
        setattr(block, "recomputes", True)  # noqa: B010 (residual_branch reads it; attributes are typed as tensors)
        setattr(block, "forward", partial(checkpoint, block.forward, use_reentrant=False))  # noqa: B010


@contextmanager
def keeping_activations(block: nn.Module) -> Iterator[None]:
    """Let a block keep its activations within the ``with`` block, after ``recompute_activations``."""
    forward = block.__dict__.pop("forward")
    setattr(block, "recomputes", False)  # noqa: B010
    try:
        yield
    finally:
        block.__dict__["forward"] = forward
        setattr(block, "recomputes", True)  # noqa: B010


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return all blocks of encoder and decoder, in order."""
    kinds = (Block, HieraBlock, ConvNeXtBlock, CrossAttentionBlock)
    return [module for module in model.modules() if isinstance(module, kinds)]


def _blocks(model: nn.Module) -> list[nn.Module]:
    holders = model.get_submodule("stages").children() if hasattr(model, "stages") else [model]
    return [block for holder in holders for block in holder.get_submodule("blocks").children()]
