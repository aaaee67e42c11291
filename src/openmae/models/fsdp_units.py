"""The modules of a model that fully sharded training gathers one at a time, by family."""

from __future__ import annotations

from torch import nn

from openmae.models.build import ModelConfig
from openmae.models.decoders import CrossAttentionDecoder
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


def _blocks(model: nn.Module) -> list[nn.Module]:
    holders = model.get_submodule("stages").children() if hasattr(model, "stages") else [model]
    return [block for holder in holders for block in holder.get_submodule("blocks").children()]
