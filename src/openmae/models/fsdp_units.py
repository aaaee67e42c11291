"""The parts of a model that fully sharded training gathers at a time, by family."""

from __future__ import annotations

from torch import nn

from openmae.models.build import ModelConfig
from openmae.models.decoders import CrossAttentionDecoder
from openmae.models.mae import MaskedAutoencoder


def sharded_units(model: nn.Module, config: ModelConfig) -> list[nn.Module]:
    """Return the modules whose weights are gathered together, inner ones first; the model itself gathers the rest.

    A module's weights are gathered when its ``forward`` is called, so the natural units are blocks. ConvNeXt V2's
    pretraining applies the weights of its blocks without calling them: its encoder and its decoder are one unit each,
    at the cost of memory. So does the last block of a self-attention decoder: the model gathers its weights.
    """
    if not isinstance(model, MaskedAutoencoder):
        return _blocks(model)
    if config.architecture.family == "convnextv2":
        return [model.encoder, model.decoder]
    decoder = model.decoder
    called = decoder.cross_blocks if isinstance(decoder, CrossAttentionDecoder) else _blocks(decoder)[:-1]
    return [*_blocks(model.encoder.backbone), *called]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the children of ``blocks`` of the model, or of each stage."""
    holders = model.get_submodule("stages").children() if hasattr(model, "stages") else [model]
    return [block for holder in holders for block in holder.get_submodule("blocks").children()]
