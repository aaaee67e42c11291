"""Pretraining steps: references that are the same models, targets, and the whole benchmark in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench.measure import Comparison, Timing
from tests.helpers.models import all_visible
from torch import nn

from bench import checkpoints, curves, memory, pretrain, references, scaling, steps
from openmae.errors import RunError
from openmae.models.mae import MaskedAutoencoder
from openmae.models.masking import random_mask

SMALL = {"convnextv2_atto": 0.6, "vit_tiny_patch16": 0.75, "hiera_tiny_224": 0.6}  # mask ratios
SIDE = 96


def randomised(arch: str) -> MaskedAutoencoder:
    """GRN and biases start at zero, where a mistake has no effect."""
    model = steps.build(arch, SIDE, SMALL[arch])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    ("arch", "make"),
    [
        ("convnextv2_atto", lambda openmae: references.DenseConvNeXtV2(openmae, exact=True)),
        ("vit_tiny_patch16", references.PlainViT),
        ("vit_tiny_patch16", references.TransformersViT),
        ("hiera_tiny_224", references.PlainHiera),
    ],
)
def test_a_reference_has_our_loss_and_gradients(arch, make) -> None:
    openmae = randomised(arch)
    reference = make(openmae)
    images = torch.randn(2, 3, SIDE, SIDE)
    mask = random_mask(torch.arange(2), seed=3, epoch=0, num_units=openmae.num_units, mask_ratio=SMALL[arch])
    expected, actual = openmae(images, mask).loss, reference(images, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for loss in (actual, expected):
        loss.backward()
    norms = [
        sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None) for model in (reference, openmae)
    ]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=0)


def test_the_dense_model_equals_ours_where_nothing_is_masked() -> None:
    openmae = randomised("convnextv2_atto")
    images, visible = torch.randn(2, 3, SIDE, SIDE), all_visible(2, openmae.num_units).visible_BV
    dense = references.DenseConvNeXtV2(openmae).encode(images, torch.ones(2, 1, *openmae.encoder.grid))
    torch.testing.assert_close(dense.flatten(2).transpose(1, 2), openmae.encoder(images, visible), rtol=1e-3, atol=1e-3)


def test_a_reference_that_is_another_model_is_an_error() -> None:
    openmae = randomised("convnextv2_atto")
    images = torch.randn(2, 3, SIDE, SIDE)
    references.check_same_start(openmae, references.DenseConvNeXtV2(openmae, exact=True), images, 0.6)
    with pytest.raises(RunError, match="not the same model"):
        references.check_same_start(
            openmae, references.DenseConvNeXtV2(openmae), images, 0.6
        )  # masked once: another loss
    larger = references.DenseConvNeXtV2(openmae, exact=True)
    larger.more = nn.Linear(2, 2)
    with pytest.raises(RunError, match="weights to train"):
        references.check_same_start(openmae, larger, images, 0.6)


@pytest.mark.parametrize(("arch", "mask_ratio"), SMALL.items())
def test_our_step_and_the_references_make_the_same_updates(arch, mask_ratio) -> None:
    make = {
        "convnextv2_atto": lambda openmae: references.DenseConvNeXtV2(openmae, exact=True),
        "vit_tiny_patch16": references.PlainViT,
        "hiera_tiny_224": references.PlainHiera,
    }[arch]
    found = curves.train_both(steps.build(arch, 64, mask_ratio), make, mask_ratio, lr=3e-4, updates=3)
    assert len(found.openmae) == 3
    assert found.difference < 1e-4


def test_curves_are_compared_step_by_step() -> None:
    found = curves.Curves((1.0, 0.5, 0.5), (1.0, 0.4, 0.5))
    assert found.difference == pytest.approx(0.25)
    assert found.learned == pytest.approx(0.5)


@pytest.mark.slow(reason="trains pairs of models for 100 steps, minutes")
@pytest.mark.parametrize(
    ("arch", "side", "make"),
    [
        ("convnextv2_atto", 128, lambda openmae: references.DenseConvNeXtV2(openmae, exact=True)),
        ("vit_tiny_patch16", 64, references.TransformersViT),
        ("hiera_tiny_224", 64, references.PlainHiera),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_hundred_steps_learn_what_the_reference_learns(arch, side, make, precision) -> None:
    mask_ratio, bf16 = SMALL[arch], precision == "bf16"
    # at a higher rate, with four images, the curve doubles every rounding: Hiera's in float32 too
    lr = 3e-5 if arch.startswith("hiera") or bf16 else 3e-4
    found = curves.train_both(steps.build(arch, side, mask_ratio), make, mask_ratio, lr=lr, bf16=bf16)
    assert len(found.openmae) == 100
    assert found.learned > 0.3, "a loss that does not fall proves nothing"
    assert found.difference < (5e-2 if bf16 else 1e-3)


@pytest.mark.slow(reason="trains a pair of models for 100 steps, a minute")
def test_masked_once_learns_something_else() -> None:
    found = curves.train_both(steps.build("convnextv2_atto", 128, 0.6), references.DenseConvNeXtV2, 0.6, lr=3e-4)
    assert found.difference > 0.01, "the comparison of curves tells two computations apart"


def test_targets_are_judged_against_every_reference() -> None:
    race = pretrain.Race(
        "vit_base_patch16", {0.75: 1.3}, {name: pretrain._VIT[name] for name in ("transformers", "plain")}, turns=1
    )
    rates = {"transformers": 2.0, "plain": 2.5, "OpenMAE 0.75": 3.0}
    found = Comparison({name: Timing((1 / rate,), 1) for name, rate in rates.items()}, "transformers", 1, None)
    verdicts = {verdict["reference"]: verdict for verdict in pretrain.judge(race, found)}
    assert verdicts["transformers"]["ratio"] == pytest.approx(1.5)
    assert verdicts["transformers"]["met"]
    assert not verdicts["plain"]["met"], "1.2x, at least 1.3x wanted"
    assert pretrain._row(race, found, verdicts["plain"])[-2:] == ("1.20", "1.3x: MISSED")


def test_the_targets_at_a_ratio_of_point_6_are_60_per_cent() -> None:
    targets = {race.arch: race.targets for race in pretrain.RACES}
    assert targets["convnextv2_atto"] == {0.75: 4.0, 0.6: 2.4}
    assert targets["convnextv2_tiny"] == {0.75: 5.5, 0.6: 3.3}


@pytest.mark.slow(reason="trains pairs of models")
def test_pretrain_runs(tmp_path: Path) -> None:
    text = pretrain.run(quick=True).write(tmp_path, "pretrain", quick=True)
    races = json.loads((tmp_path / "pretrain-quick.json").read_text())["results"]
    assert [race["arch"] for race in races] == [race.arch for race in pretrain.QUICK_RACES]
    for race in races:
        assert all(verdict["ratio"] > 0 for verdict in race["verdicts"])
        assert all(verdict["target"] is None for verdict in race["verdicts"]), "a quick run judges nothing"
    assert "| convnextv2_atto  | 0.6" in text


@pytest.mark.slow(reason="starts a process per model")
def test_memory_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "QUICK_RACES", pretrain.QUICK_RACES[:1])
    text = memory.run(quick=True).write(tmp_path, "memory", quick=True)
    assert text.count("| convnextv2_atto") == 2
    found = json.loads((tmp_path / "memory-quick.json").read_text())["results"]
    weights = sum(p.numel() for p in steps.build("convnextv2_atto", 64, 0.75).parameters())
    for held in (line[side] for line in found for side in ("openmae_bytes", "reference_bytes")):
        assert held["total"] > held["step"] > 4 * 4 * weights, "weights, gradients and two moments in float32"


def test_memory_is_judged_without_the_libraries() -> None:
    openmae, reference = {"step": 40, "total": 140}, {"step": 100, "total": 200}
    assert memory.judge(openmae, reference, 0.5) == {"share": 0.4, "target": 0.5, "met": True}
    assert memory.judge(reference, openmae, 0.5)["met"] is False


@pytest.mark.slow(reason="starts training runs")
def test_a_contestant_that_fails_is_an_error() -> None:
    with pytest.raises(RunError, match="The step of nobody failed"):
        memory.peak(0, "nobody", 0.75, quick=True)


def test_an_exponent_is_the_slope_of_logarithms() -> None:
    work = [1, 2, 4, 8]
    assert scaling.fit(work, [3 * w**1.5 for w in work]) == pytest.approx((1.5, 0.0))
    slope, off = scaling.fit([1, 2, 4], [1.0, 2.0, 8.0])
    assert slope == pytest.approx(1.5)
    assert off > 0.1


def test_depth_multiplies_the_encoders_blocks() -> None:
    vit = scaling.build(scaling.Point("vit_tiny_patch16", side=64, depth=0.5))
    assert len(vit.encoder.backbone.blocks) == 6
    convnext = scaling.build(scaling.Point("convnextv2_atto", side=64, depth=2))
    assert [len(stage.blocks) for stage in convnext.encoder.backbone.stages] == [4, 4, 12, 4]


@pytest.mark.slow(reason="starts training runs")
def test_scaling_runs(tmp_path: Path) -> None:
    scaling.run(quick=True).write(tmp_path, "scaling", quick=True)
    found = json.loads((tmp_path / "scaling-quick.json").read_text())["results"]
    assert [line["arch"] for line in found] == list(scaling.ARCHES)
    assert all(line["values"] == [1, 2] for line in found)


@pytest.mark.slow(reason="starts training runs")
def test_checkpoints_runs(tmp_path: Path) -> None:
    checkpoints.run(quick=True).write(tmp_path, "checkpoints", quick=True)
    found = json.loads((tmp_path / "checkpoints-quick.json").read_text())["results"]
    assert list(found["contestants"]) == [checkpoints.NONE, checkpoints.WAITING, checkpoints.BESIDE]
    assert found["bytes"] > 3 * 4 * 5_000_000, "weights and two moments of each"
    assert min(found["held"][checkpoints.WAITING]) > 0


def test_the_work_of_a_mask_ratio_is_what_is_visible() -> None:
    axis = scaling.mask_ratios(32)
    assert [axis.work(ratio) for ratio in axis.values] == [4, 12, 19, 29]
