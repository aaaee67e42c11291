"""Small deployed models with weights that let every layer matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.hiera import Hiera
from torch import nn

from openmae.engines.metadata import ModelCard
from openmae.engines.module import DeployedModel
from openmae.models.build import ModelConfig, build_classifier, build_feature_extractor

SIZES = {"vit_tiny_patch16": (32, 48), "convnextv2_atto": (64, 96), "hiera_tiny_224": (64, 96)}
ARCHES = tuple(SIZES)

Deployed = tuple[DeployedModel, ModelCard]


def build_small(arch: str, stage: str, **settings) -> Deployed:
    """A model and its card; ``settings`` are the card's, and ``in_chans`` the model's."""
    channels = settings.pop("in_chans", 3)
    classes = 3 if stage == "finetune" else 0
    config = ModelConfig(arch, SIZES[arch], channels, num_classes=classes)
    names = ("a", "b", "c")[:classes]
    card = ModelCard(
        stage, config, (0.4, 0.5, 0.3, 0.6)[:channels], (0.2, 0.3, 0.25, 0.2)[:channels], names, **settings
    )
    torch.manual_seed(0)
    backbone = (build_classifier if classes else build_feature_extractor)(config)
    _remove_equal_blocks(backbone)
    with torch.no_grad():  # a fresh head, GRN and some biases are zero, and would hide what is wrong before them
        for parameter in backbone.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return DeployedModel(backbone, card).eval(), card


def _remove_equal_blocks(backbone: Any) -> None:
    """Keep two of the blocks that are alike: tracing takes seconds."""
    if isinstance(backbone, ConvNeXt):
        backbone.stages[2].blocks = backbone.stages[2].blocks[:2]
    elif isinstance(backbone, Hiera):
        blocks, schedule = backbone.blocks, backbone.reroll.schedule
        third, fourth = (end + 1 for end in backbone.stage_ends[1:3])
        backbone.blocks = nn.ModuleList([*blocks[: third + 2], *blocks[fourth:]])
        schedule[len(backbone.blocks) - 1] = schedule[len(blocks) - 1]
    else:
        backbone.blocks = backbone.blocks[:2]


@pytest.fixture(scope="session")
def deployed() -> Callable[..., Deployed]:
    return build_small
