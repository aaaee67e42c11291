"""The examples of docs/ run as they stand, and load every weight."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from openmae.checkpoints.format import CheckpointInfo, save_backbone
from openmae.models.build import ModelConfig, build_encoder
from openmae.spec.architectures import ARCHITECTURES
from openmae.spec.describe import fields, sections, traits
from openmae.spec.load import load_spec

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "downstream.md").read_text(encoding="utf-8")
MIGRATION = (DOCS / "migrating-from-tao.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"## (.*?)\n\n```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title.split()[0] for title, _ in EXAMPLES])
def test_the_backbone_goes_into_other_libraries(title, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ModelConfig("convnextv2_atto", (64, 64))
    state = build_encoder(config).backbone.state_dict()
    save_backbone(tmp_path / "backbone.safetensors", state, CheckpointInfo("pretrain", config))
    names: dict = {}
    exec(compile(code, title, "exec"), names)
    stem = state["stem.0.weight"]
    assert any(value.shape == stem.shape and torch.equal(value, stem) for value in names["model"].parameters()), (
        f"{title}: the stem was not loaded"
    )
    model = names["model"].eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        output = model([images[0]])[0]["boxes"] if "torchvision" in title else model(images)
    assert {"timm": (1, 10), "Segmentation": (1, 5, 64, 64)}.get(title.split()[0], (len(output), 4)) == tuple(
        output.shape
    )


def test_every_architecture_has_its_timm_name_on_the_page():
    for name, row in ARCHITECTURES.items():
        expected = row.timm_name.split(".")[0]
        assert expected in (name, f"{name}_224"), (
            f"docs/downstream.md says otherwise of {name}: timm calls it {expected}"
        )


def test_the_keys_and_defaults_of_the_migration_page_exist():
    """Names in code that look like keys are keys; what the table says of defaults is so."""
    named = set(re.findall(r"`((?:train|model|dataset|evaluate|inference|export|wandb)\.[a-z0-9_.]+)", MIGRATION))
    assert len(named) > 30
    assert not named - fields().keys() - sections() - {"dataset.segment"}
    spec = load_spec(
        {"model": {"arch": "vit_base_patch16"}, "train": {"stage": "finetune"}, "dataset": {"batch_size": 2}}
    )
    optim = spec.train.optim
    assert (optim.backbone_multiplier, optim.layer_decay, optim.momentum, optim.beta2) == (1.0, 0.75, 0.9, 0.999)
    assert (spec.train.keep_checkpoints, spec.model.mask_ratio, spec.model.drop_path_rate) == (3, 0.75, 0.1)
    assert (spec.model.decoder_depth, spec.model.decoder_embed_dim, spec.wandb.project) == (8, 512, "openmae")
    other = load_spec({"model": {"arch": "convnextv2_tiny"}})
    assert (other.model.mask_ratio, other.model.decoder_depth, other.train.optim.beta2) == (0.6, 1, 0.95)


def test_the_migration_page_names_what_tao_ignores():
    for key in fields():
        if not traits(key).ignored_by_tao:
            continue
        assert key in MIGRATION or key.rpartition(".")[2] in MIGRATION, f"{key} is not on the page"
