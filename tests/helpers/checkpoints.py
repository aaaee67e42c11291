"""Small checkpoints: of OpenMAE's training, and of another program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from openmae.checkpoints.format import CheckpointInfo
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.models.mae import MaskedAutoencoder

State = dict[str, Tensor]

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "vit": ModelConfig("vit_tiny_patch16", input_size=(32, 64), decoder_depth=1, decoder_embed_dim=32),
    "hiera": ModelConfig("hiera_tiny_224", input_size=(32, 64), decoder_depth=1, decoder_embed_dim=32),
    "convnextv2": ModelConfig("convnextv2_atto", input_size=(32, 64), decoder_depth=1, decoder_embed_dim=32),
}
CROSS = {family: replace(CONFIGS[family], decoder_attention="cross") for family in ("vit", "hiera")}
SMALL = CONFIGS["vit"]
INFO = CheckpointInfo("pretrain", SMALL, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), spec={"model": {}})


def behind(prefix: str, state: State) -> State:
    """Return a state dict with a prefix in front of every name."""
    return {prefix + name: value for name, value in state.items()}


def save_model(path: Path, model: nn.Module, info: CheckpointInfo, ema: nn.Module | None = None) -> Path:
    """Write a checkpoint as training does, with additional entries of an older version; return its path."""
    content: dict[str, Any] = {"openmae": info.to_dict(), "epoch": 3, "loops": {}}
    for key, source in (("state_dict", model), ("ema_state_dict", ema)):
        if source is not None:
            content[key] = behind("model.", source.state_dict())
    content["state_dict"]["criterion.weight"] = torch.ones(1)
    torch.save(content, path)
    return path


def classifier_payload(config: ModelConfig, **header: Any) -> dict[str, Any]:
    """Return the content of a fine-tuned checkpoint, with other values in the model entry of its header."""
    values = CheckpointInfo("finetune", config, mean=(0.5,) * 3, std=(0.2,) * 3).to_dict()
    values["model"] |= header
    return {"openmae": values, "state_dict": behind("model.", build_classifier(config).state_dict())}


@pytest.fixture(scope="session")
def pretrained(randomise: Callable[..., None], built: Callable[..., Any]) -> dict[str, MaskedAutoencoder]:
    """A masked autoencoder of each family with random weights."""
    models = {family: built(build_autoencoder, config).eval() for family, config in CONFIGS.items()}
    for model in models.values():
        randomise(model)
    return models


@pytest.fixture(scope="session")
def files(pretrained: dict[str, MaskedAutoencoder], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pretrained checkpoint of each family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        family: save_model(folder / f"{family}.pth", model, replace(INFO, model=CONFIGS[family]))
        for family, model in pretrained.items()
    }


@pytest.fixture(scope="session")
def model() -> Any:
    """Another program's classifier: a timm ViT for 32 x 32 pixels and four classes."""
    torch.manual_seed(7)
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32).eval()


@pytest.fixture
def state(model: nn.Module) -> State:
    """The state dict of ``model``."""
    return model.state_dict()
