"""Which parts of a model fully sharded training gathers at a time, by family."""

from __future__ import annotations

from torch import nn

from openmae.models.build import ModelConfig
from openmae.models.mae import MaskedAutoencoder


def sharded_units(model: nn.Module, config: ModelConfig) -> list[nn.Module]:
    """The modules whose weights are gathered together, inner ones first; the rest is the whole model's own.

    A unit's weights are gathered when its ``forward`` is called. Blocks are the natural ones. The sparse ConvNeXt V2
    encoder applies the weights of timm's blocks without calling them, so it is one unit, with the memory of that.
    """
    if not isinstance(model, MaskedAutoencoder):
        return _blocks(model)
    decoder = _blocks(model.decoder)
    if config.architecture.family == "convnextv2":
        return [model.encoder, *decoder]
    return [*_blocks(model.encoder.backbone), *decoder]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The children of ``blocks``: the model's own, or each stage's."""
    holders = model.get_submodule("stages").children() if hasattr(model, "stages") else [model]
    return [block for holder in holders for block in holder.get_submodule("blocks").children()]
