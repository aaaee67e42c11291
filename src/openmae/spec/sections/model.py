"""The section ``model``: the backbone, and the decoder that pretraining adds to it."""

from __future__ import annotations

from typing import Literal

from openmae.spec.architectures import Architecture, get_architecture
from openmae.spec.option import FINETUNE, PRETRAIN, ArchName, PositiveShare, Search, Section, option


class ModelSpec(Section):
    """``model``."""

    arch: ArchName = option(
        "convnextv2_base",
        "architecture of the backbone",
        popular=True,
        recipe=True,
        changes_loss=True,
        on_resume="refuse",
    )
    num_classes: int | None = option(
        None,
        "number of classes for fine-tuning; unset: as in the data",
        ge=1,
        stages=FINETUNE,
        automl=False,
        on_resume="allow",
    )
    in_chans: Literal[1, 3, 4] = option(
        3, "image channels: 1 grey, 3 RGB, 4 RGB and alpha", recipe=True, tao="lacks", automl=False, on_resume="refuse"
    )
    patch_size: int | None = option(
        None,
        "side of a ViT patch in pixels; unset: as in the name",
        ge=1,
        recipe=True,
        tao="lacks",
        automl=False,
        on_resume="refuse",
    )
    mask_ratio: float = option(
        None,
        "share of mask units hidden in pretraining; unset: 0.75 ViT, 0.6 Hiera and ConvNeXt V2",
        gt=0,
        lt=1,
        stages=PRETRAIN,
        search=Search(0.4, 0.9),
        on_resume="refuse",
        changes_loss=True,
    )
    norm_pix_loss: bool = option(
        True,
        "normalise the pixels of each patch before computing the loss",
        stages=PRETRAIN,
        tao="ignores",
        on_resume="refuse",
        changes_loss=True,
    )
    decoder_depth: int = option(
        None,
        "decoder blocks; unset: 8 ViT and Hiera, 1 ConvNeXt V2",
        ge=1,
        recipe=True,
        stages=PRETRAIN,
        tao="ignores",
        search=Search(1, 8),
        changes_loss=True,
        on_resume="refuse",
    )
    decoder_embed_dim: int = option(
        None,
        "decoder width; unset: 512",
        ge=1,
        recipe=True,
        stages=PRETRAIN,
        tao="ignores",
        search=Search(128, 512, step=64),
        changes_loss=True,
        on_resume="refuse",
    )
    decoder_attention: Literal["self", "cross"] = option(
        "self",
        "tokens that masked tokens attend to in the decoder: self: all tokens; cross: visible tokens only, as in "
        "CrossMAE, which is faster (ViT and Hiera)",
        stages=PRETRAIN,
        tao="lacks",
        automl=False,
        on_resume="refuse",
    )
    decoder_targets: PositiveShare = option(
        1.0,
        "share of the masked units that a training step predicts, drawn again in each step; validation predicts all. "
        "A lower share is faster and learns from less",
        stages=PRETRAIN,
        tao="lacks",
        search=Search(0.25, 1.0),
        changes_loss=True,
    )
    drop_path_rate: float = option(
        None,
        "stochastic depth; unset: as in the paper for pretraining, 0.1 for fine-tuning",
        ge=0,
        lt=1,
        recipe=True,
        tao="ignores",
        search=Search(0.0, 0.4),
    )
    global_pool: bool = option(
        True,
        "classify the mean of the tokens; false: the class token, ViT only",
        stages=FINETUNE,
        tao="ignores",
        on_resume="refuse",
    )

    @property
    def architecture(self) -> Architecture:
        """The row of ``arch`` in the table of architectures."""
        return get_architecture(self.arch)

    @property
    def mask_unit(self) -> int:
        """Side in pixels of the square that is masked as one: a patch for ViT."""
        return self.patch_size or self.architecture.mask_unit
