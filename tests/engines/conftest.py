"""Small deployed models with weights that let every layer matter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

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
    if arch.startswith("vit"):
        backbone.blocks = backbone.blocks[:2]  # of twelve that are alike: tracing takes seconds
    with torch.no_grad():  # a fresh head, GRN and some biases are zero, and would hide what is wrong before them
        for parameter in backbone.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return DeployedModel(backbone, card).eval(), card


@pytest.fixture(scope="session")
def deployed() -> Callable[..., Deployed]:
    return build_small
