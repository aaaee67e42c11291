"""Learning rates of every group and step, verified against the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch

from openmae.errors import CheckpointError, SpecError
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.spec.sections.train import OptimSpec
from openmae.training.optim import (
    Schedule,
    build_adamw,
    finetuning_groups,
    freeze,
    load_moments,
    pretraining_groups,
    set_learning_rate,
)


def rates(arch: str, layer_decay: float, backbone_multiplier: float = 1.0, lr: float = 1.0) -> dict[str, float]:
    """The learning rate of each parameter of a classifier."""
    config = ModelConfig(arch, num_classes=3)
    with torch.device("meta"):
        model = build_classifier(config)
    groups = finetuning_groups(model, config, 0.05, layer_decay, backbone_multiplier)
    optimizer = torch.optim.AdamW(groups)
    set_learning_rate(optimizer, lr)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    return found


@pytest.mark.parametrize("multiplier", [1.0, 0.1])
def test_vit_b_at_065(multiplier):
    """MAE: lr * .65 ** (13 - layer), the embeddings layer 0, the head 13."""
    found = rates("vit_base_patch16", 0.65, multiplier, lr=1e-3)
    assert found["head.weight"] == found["fc_norm.bias"] == 1e-3
    assert found["pos_embed"] == found["patch_embed.proj.weight"] == pytest.approx(1e-3 * 0.65**13 * multiplier)
    for block in range(12):
        expected = 1e-3 * 0.65 ** (12 - block) * multiplier
        assert found[f"blocks.{block}.mlp.fc1.bias"] == pytest.approx(expected)


def test_hiera_b_at_07():
    found = rates("hiera_base_224", 0.7)
    assert found["head.fc.weight"] == 1.0
    assert found["pos_embed"] == found["patch_embed.proj.bias"] == pytest.approx(0.7**25)
    assert found["blocks.0.attn.qkv.weight"] == pytest.approx(0.7**24)
    assert found["blocks.23.mlp.fc2.weight"] == pytest.approx(0.7)


def test_convnextv2_atto_at_09():
    """ConvNeXt V2, single: 12 blocks, the head 13; a downsampling layer goes with its stage's first block."""
    found = rates("convnextv2_atto", 0.9, 0.5)
    assert found["head.fc.weight"] == 1.0
    assert found["stem.0.weight"] == found["stages.0.blocks.0.norm.bias"] == pytest.approx(0.5 * 0.9**12)
    assert found["stages.2.downsample.1.weight"] == pytest.approx(0.5 * 0.9**8)
    assert found["stages.2.blocks.5.mlp.grn.weight"] == pytest.approx(0.5 * 0.9**3)
    assert found["stages.3.blocks.1.conv_dw.weight"] == pytest.approx(0.5 * 0.9)


def test_convnextv2_base_at_06():
    """ConvNeXt V2, grouped: lr * .6 ** (13 - group)."""
    found = rates("convnextv2_base", 0.6)
    assert found["head.norm.weight"] == 1.0
    assert found["stem.1.weight"] == pytest.approx(0.6**13)
    assert found["stages.0.blocks.2.conv_dw.bias"] == pytest.approx(0.6**12)
    assert found["stages.1.downsample.0.weight"] == pytest.approx(0.6**11)
    assert [found[f"stages.2.blocks.{b}.mlp.fc1.weight"] for b in (0, 2, 3, 26)] == pytest.approx(
        [0.6**10, 0.6**10, 0.6**9, 0.6**2]
    )
    assert found["stages.3.blocks.0.mlp.fc2.bias"] == pytest.approx(0.6)


def test_weight_decay_of_the_groups():
    config = ModelConfig("vit_tiny_patch16", num_classes=3)
    with torch.device("meta"):
        model = build_classifier(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in finetuning_groups(model, config, 0.05, 0.75, 1.0):
        kinds = {names[id(p)].rpartition(".")[2] for p in group["params"]}
        matrices = all(p.ndim > 1 for p in group["params"]) and not kinds & {"pos_embed", "cls_token"}
        assert group["weight_decay"] == (0.05 if matrices else 0.0)
        assert group["name"].endswith(", no decay") != matrices


@pytest.mark.parametrize("arch", ["vit_tiny_patch16", "hiera_tiny_224", "convnextv2_atto"])
def test_pretraining_has_two_groups_without_frozen_parameters(arch):
    with torch.device("meta"):
        model = build_autoencoder(ModelConfig(arch, input_size=(64, 64), decoder_depth=1, decoder_embed_dim=32))
    decayed, free = sorted(pretraining_groups(model, 0.05), key=lambda group: -group["weight_decay"])
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert decayed["lr_scale"] == free["lr_scale"] == 1.0
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in (decayed, free) for p in group["params"]} == trained
    assert any(p is model.decoder.mask_token for p in decayed["params"])


def test_cosine():
    """MAE, util/lr_sched.py: half a cosine over the epochs after the warmup, down to 0."""
    schedule = Schedule(OptimSpec(lr_scheduler="cosine", warmup_epochs=2), 1.0, epochs=10, steps_per_epoch=4)
    found = [schedule.rate(step) for step in range(41)]
    assert found[:8] == pytest.approx([(step + 1) / 8 for step in range(8)])
    expected = [0.5 * (1 + math.cos(math.pi * (step / 4 - 2) / 8)) for step in range(8, 41)]
    assert found[8:] == pytest.approx(expected)
    assert max(found) == found[8] == 1.0
    assert found[40] == pytest.approx(0.0, abs=1e-12)


def test_multistep_has_a_warmup():
    schedule = Schedule(OptimSpec(milestones=(4, 6)), 1.0, epochs=10, steps_per_epoch=2)
    found = [schedule.rate(step) for step in range(20)]
    assert found == pytest.approx([0.5, 1.0, *[1.0] * 6, *[0.1] * 4, *[0.01] * 8])


def test_a_milestone_within_the_warmup_applies_after_it():
    schedule = Schedule(OptimSpec(warmup_epochs=4, milestones=(2,)), 1.0, epochs=10, steps_per_epoch=1)
    assert [schedule.rate(step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.1])


@pytest.mark.parametrize("kind", ["cosine", "MultiStep"])
def test_no_warmup(kind):
    assert Schedule(OptimSpec(lr_scheduler=kind, warmup_epochs=0), 1.0, 5, 3).rate(0) == 1.0


def test_a_warmup_as_long_as_the_run_only_rises():
    schedule = Schedule(OptimSpec(lr_scheduler="cosine", warmup_epochs=2), 1.0, epochs=2, steps_per_epoch=3)
    assert [schedule.rate(step) for step in range(6)] == pytest.approx([n / 6 for n in range(1, 7)])
    assert schedule.rate(6) >= 0


def layers() -> torch.nn.Module:
    return torch.nn.ModuleDict(
        {"patch_embed": torch.nn.Linear(2, 2), "blocks": torch.nn.Sequential(*[torch.nn.Linear(2, 2)] * 2)}
    )


def test_freezing_by_name():
    model = layers()
    freeze(model, ["patch_embed"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["blocks.0.weight", "blocks.0.bias"]


def test_an_unknown_name_lists_similar_ones():
    with pytest.raises(SpecError, match=r"train\.freeze: the model has no module 'block\.0'") as caught:
        freeze(layers(), ["block.0"])
    assert caught.value.fix.startswith("Similar names: blocks.0, ")


def test_a_name_without_similar_ones_lists_the_top_level_modules():
    with pytest.raises(SpecError) as caught:
        freeze(layers(), ["zzz"])
    assert caught.value.fix == "Similar names: patch_embed, blocks."


def test_freezing_everything_is_an_error():
    with pytest.raises(SpecError, match=r"train\.freeze: nothing is left to train\."):
        freeze(layers(), ["patch_embed", "blocks"])


def test_moments_of_other_parameters_are_an_error():
    model = layers()
    state = build_adamw(pretraining_groups(model, 0.1), 1e-3, 0.9, 0.95).state_dict()
    freeze(model, ["patch_embed"])
    optimizer = build_adamw(pretraining_groups(model, 0.1), 1e-3, 0.9, 0.95)
    with pytest.raises(CheckpointError, match="the trained parameters differ from those in the checkpoint"):
        load_moments(optimizer, state)


def test_moments_of_other_shapes_are_an_error():
    model, other = torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)  # as many parameters
    before = build_adamw([{"params": [*other.parameters()], "lr_scale": 1.0}], 1e-3, 0.9, 0.95)
    other(torch.ones(2, 4)).sum().backward()
    before.step()
    optimizer = build_adamw([{"params": [*model.parameters()], "lr_scale": 1.0}], 1e-3, 0.9, 0.95)
    with pytest.raises(CheckpointError, match=r"\(moments of \(3, 4\) for a parameter of \(4, 3\)\)") as caught:
        load_moments(optimizer, before.state_dict())
    assert "train.freeze" in caught.value.fix
    load_moments(before, before.state_dict())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: {}, "is not AdamW's, or damaged"),
        (lambda state: {**state, "state": {0: {"momentum_buffer": torch.zeros(2)}}}, "momentum_buffer instead of"),
        (lambda state: {**state, "state": []}, "is not AdamW's, or damaged"),
        (lambda state: {**state, "param_groups": [{}]}, "is not AdamW's, or damaged"),
        (
            lambda state: {**state, "state": {0: {**state["state"][0], "exp_avg_sq": torch.zeros(3)}}},
            "the trained parameters differ",
        ),
    ],
    ids=["empty", "sgd", "list", "no parameters", "shape"],
)
def test_a_foreign_optimizer_state_is_an_error(change, said):
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = build_adamw([{"params": [parameter], "lr_scale": 1.0}], 1e-3, 0.9, 0.999)
    parameter.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(CheckpointError, match=said):
        load_moments(optimizer, change(optimizer.state_dict()))
