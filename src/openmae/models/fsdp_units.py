"""Which parts of a model fully sharded training gathers at a time, by family."""

from __future__ import annotations

from torch import nn

from openmae.models.build import ModelConfig
from openmae.models.decoders import CrossAttentionDecoder
from openmae.models.mae import MaskedAutoencoder


def sharded_units(model: nn.Module, config: ModelConfig) -> list[nn.Module]:
    """The modules whose weights are gathered together, inner ones first; the rest is the whole model's own.

    A unit's weights are gathered when its ``forward`` is called. Blocks are the natural ones. In pretraining ConvNeXt
    V2 applies the weights of its blocks without calling them, so its encoder and its decoder are a unit each, with the
    memory of that; a decoder with self-attention does so with its last block, whose weights are the whole model's own.
    """
    if not isinstance(model, MaskedAutoencoder):
        return _blocks(model)
    if config.architecture.family == "convnextv2":
        return [model.encoder, model.decoder]
    decoder = model.decoder
    called = decoder.cross_blocks if isinstance(decoder, CrossAttentionDecoder) else _blocks(decoder)[:-1]
    return [*_blocks(model.encoder.backbone), *called]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The children of ``blocks``: the model's own, or each stage's."""
    holders = model.get_submodule("stages").children() if hasattr(model, "stages") else [model]
    return [block for holder in holders for block in holder.get_submodule("blocks").children()]
