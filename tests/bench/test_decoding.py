"""The benchmarks of decoders that do less: what is timed, what is trained, what is said of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.decoding import DECODERS, Decoder
from bench.decoding_cost import FINETUNE, PRETRAIN, Plan, Table

from bench import decoding, decoding_cost, steps
from openmae import quickstart

SELF, PART, CROSS = Decoder("self", 1.0), Decoder("self", 0.5), Decoder("cross", 0.25)


@pytest.mark.slow(reason="trains pairs of models")
def test_decoding_runs(tmp_path: Path) -> None:
    text = decoding.run(quick=True).write(tmp_path, "decoding", quick=True)
    found = json.loads((tmp_path / "decoding-quick.json").read_text())["results"]
    assert [line["arch"] for line in found] == list(decoding.QUICK_ARCHES)
    assert list(found[0]["contestants"]) == [str(decoder) for decoder in DECODERS]
    assert list(found[1]["contestants"]) == ["self 1", "self 0.5", "self 0.25"], "ConvNeXt V2 has no cross-attention"
    assert all(line["reference"] == "self 1" for line in found)
    assert "| convnextv2_atto  | self" in text


def test_less_is_computed_where_less_is_decoded() -> None:
    """By hand, of 8 blocks over 17 tokens or 11, and of 3 queries over 5: projections, MLP, attention's products."""
    whole, part, cross = (decoding.operations("vit_tiny_patch16", one, 64) for one in (SELF, PART, CROSS))
    width, latent = 512, 192
    dropped = 8 * (17 * (24 * width**2 + 4 * 17 * width) - 11 * (24 * width**2 + 4 * 11 * width))
    assert whole - part == pytest.approx(dropped, rel=0.05)
    reading = 8 * (3 * 20 * width**2 + 5 * 4 * latent * width + 3 * 4 * 5 * width)
    encoder = 12 * 5 * (24 * latent**2 + 4 * 5 * latent)
    assert cross == pytest.approx(encoder + reading, rel=0.05)
    assert cross < part < whole


def test_a_step_predicts_what_the_decoder_is_to() -> None:
    model = steps.build("vit_tiny_patch16", 64, 0.75, "cross")
    predicted: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: predicted.append(output.predicted_BMP.shape[1]))
    loss = steps.openmae_step(model, steps.random_images(2, 64), 0.75, targets=CROSS.targets)()
    assert predicted == [3], "a quarter of 12"
    assert torch.isfinite(loss)


class Trainings:
    """FAKE trainings: metrics that follow from seed and decoder, and a backbone."""

    def __init__(self) -> None:
        self.specs: list[dict[str, Any]] = []

    def __call__(self, tree: dict[str, Any]) -> Mapping[str, float]:
        self.specs.append(tree)
        folder = Path(tree["results_dir"]) / "train"
        folder.mkdir(parents=True, exist_ok=True)
        if tree["train"].get("stage") == "finetune":
            assert Path(tree["train"]["pretrained_model_path"]).is_file(), "it was pretrained before"
            worse = 0.1 * ("cross" in str(folder))
            return {"ACC_all": 0.9 - worse - 0.01 * tree["train"]["seed"]}
        (folder / "backbone.safetensors").touch()
        return {"knn_acc": 0.5, "probe_acc": 0.6, "val_loss": 0.7}


def table_of(folder: Path, epochs: int | None = None) -> tuple[Table, Trainings]:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    trainings = Trainings()
    return Table(folder, epochs, trainings), trainings


def test_the_trainings_are_the_quickstarts_with_another_decoder(tmp_path: Path) -> None:
    table, trainings = table_of(tmp_path)
    for decoder in (SELF, CROSS):
        for stage in (PRETRAIN, FINETUNE):
            table.metrics(decoder, 1, stage)
    own, fine, other, _ = trainings.specs
    assert own["model"].pop("decoder_attention") == "self"
    assert own["model"].pop("decoder_targets") == 1
    place = Path(own["results_dir"]).parent
    expected = quickstart._pretrain_spec(place, 1)
    for tree in (own, expected):
        for name in ("train_data_sources", "val_data_sources"):
            tree["dataset"][name] = Path(tree["dataset"][name]).name
    assert own == expected
    assert (other["model"]["decoder_attention"], other["model"]["decoder_targets"]) == ("cross", 0.25)
    assert fine["train"]["pretrained_model_path"] == str(place / "pretrain" / "train" / "backbone.safetensors")
    assert fine["dataset"]["train_data_sources"] == str(tmp_path / "images" / "labelled")


def test_what_was_trained_is_kept_and_what_was_cut_goes_on(tmp_path: Path) -> None:
    table, trainings = table_of(tmp_path)
    before = table.metrics(SELF, 0, PRETRAIN)
    table, trainings = table_of(tmp_path)
    assert table.metrics(SELF, 0, PRETRAIN) == before
    assert not trainings.specs, "it was in the table"
    table.metrics(SELF, 0, FINETUNE)
    assert [tree["train"].get("stage") for tree in trainings.specs] == ["finetune"], "its backbone was there"
    assert not list((tmp_path / "trainings").iterdir()), "checkpoints that nobody needs any more"
    table, trainings = table_of(tmp_path, epochs=3)
    table.metrics(SELF, 0, FINETUNE)
    assert [tree["train"]["num_epochs"] for tree in trainings.specs] == [3, 3], "of other epochs: trained again"


def test_costs_are_of_the_same_seed(tmp_path: Path) -> None:
    plan = Plan((SELF, CROSS), (0, 2))
    report = decoding_cost.report(table_of(tmp_path)[0], plan)
    assert report.rows[0] == ("self", "1", *("50.0 (50.0 to 50.0)", "60.0 (60.0 to 60.0)"),
                              "89.0 (88.0 to 90.0)", "", "0.7000")  # fmt: skip
    assert report.rows[1][-3:] == ("79.0 (78.0 to 80.0)", "-10.0 (-10.0 to -10.0)", "0.7000")
    assert report.data[1]["ACC_all"] == pytest.approx([80.0, 78.0])


def test_seed_by_seed_everything_is_trained() -> None:
    found = decoding_cost.trainings_of(Plan((SELF, PART), (0, 1)))
    assert len(found) == 8
    assert [seed for _, seed, _ in found] == [0] * 4 + [1] * 4
    assert [stage for *_, stage in found][:2] == [PRETRAIN, FINETUNE]


@pytest.mark.slow(reason="pretrains and fine-tunes twice for two epochs, a minute")
def test_decoding_cost_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = decoding_cost.run(quick=True).write(tmp_path, "decoding_cost", quick=True)
    found = json.loads((tmp_path / "decoding_cost-quick.json").read_text())["results"]
    assert [line["attention"] for line in found] == ["self", "cross"]
    assert all(0 <= share <= 100 for line in found for share in line["ACC_all"])
    assert "2 epochs of pretraining, then 2 of fine-tuning" in text
