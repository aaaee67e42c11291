"""``mae evaluate``: the training's own numbers, for every family and stage."""

from __future__ import annotations

import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import openmae
from openmae.actions import evaluate as action
from openmae.actions.evaluate import match_classes
from openmae.actions.load_model import open_model
from openmae.cli.main import main
from openmae.data.index import ImageIndex, index_folder
from openmae.errors import DataError
from openmae.results.metrics_csv import read_metrics
from openmae.results.status import read_status
from openmae.spec.load import load_spec

pytestmark = pytest.mark.xdist_group("actions")

FAMILIES = ("vit", "convnextv2", "hiera")


def evaluate(checkpoint, source, results, *overrides):
    spec = {
        "evaluate": {"checkpoint": str(checkpoint)},
        "dataset": {"val_data_sources": str(source), "num_workers_per_gpu": 0},
        "results_dir": str(results),
    }
    return openmae.evaluate(spec, overrides)


def last_validation(folder):
    return next(row for row in reversed(read_metrics(folder / "metrics.csv")) if "val_loss" in row)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_has_the_accuracy_of_training(trained, family, photos, tmp_path):
    run = trained(family, "finetune")
    metrics = evaluate(run.checkpoint, photos.val, tmp_path)
    trained_metrics = last_validation(run.folder)
    assert set(metrics) == {"ACC_all", "ACC_top5", "val_loss"}
    assert metrics["ACC_all"] == trained_metrics["ACC_all"]
    assert metrics["val_loss"] == pytest.approx(trained_metrics["val_loss"], abs=1e-5)
    folder = tmp_path / "evaluate"
    assert {path.name for path in folder.iterdir()} == {
        *("status.json", "experiment.yaml", "report.html", "confusion_matrix.png"),
    }
    lines = read_status(folder / "status.json")
    assert [line["status"] for line in lines] == ["STARTED", "RUNNING", "SUCCESS"]
    assert lines[1]["kpi"] == metrics


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pretrained_model_has_the_training_validation_loss(trained, family, photos, tmp_path):
    run = trained(family, "pretrain")
    metrics = evaluate(run.checkpoint, photos.val, tmp_path)
    trained_metrics = last_validation(run.folder)
    assert set(metrics) == {"val_loss", "knn_acc", "probe_acc"}
    for name, value in metrics.items():
        assert value == pytest.approx(trained_metrics[name], abs=1e-5)
    folder = tmp_path / "evaluate"
    assert {path.name for path in folder.iterdir()} == {
        *("status.json", "experiment.yaml", "report.html", "reconstructions"),
    }
    assert (folder / "reconstructions" / "validation.png").stat().st_size > 1000


def test_the_training_seed_is_used(trained, photos, tmp_path):
    overrides = [o for o in trained("vit", "pretrain").overrides if not o.startswith("results_dir=")]
    more = ["train.seed=7", f"results_dir={tmp_path}"]
    assert main(["train", *overrides, *more]) == 0
    checkpoint = tmp_path / "train" / "model_best.pth"
    expected = last_validation(tmp_path / "train")["val_loss"]
    assert evaluate(checkpoint, photos.val, tmp_path)["val_loss"] == pytest.approx(expected, abs=1e-6)
    other = evaluate(checkpoint, photos.val, tmp_path, "train.seed=8")["val_loss"]
    assert abs(other - expected) > 1e-5, "a typed seed gives other masks"
    resolved = yaml.safe_load((tmp_path / "evaluate" / "experiment.yaml").read_text())
    assert resolved["train"]["seed"] == 8
    assert resolved["dataset"]["batch_size"] == 4, "as in training"


def test_images_without_classes_give_only_the_loss(trained, photos, tmp_path):
    assert set(evaluate(trained("vit", "pretrain").checkpoint, photos.plain, tmp_path)) == {"val_loss"}
    report = (tmp_path / "evaluate" / "report.html").read_text()
    assert "kNN" not in re.sub(r"base64,[^\"]*", "", report)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_another_input_size_than_in_training(trained, family, stage, photos, tmp_path, caplog):
    size = "dataset.augmentation.input_size=[96,64]"
    metrics = evaluate(trained(family, stage).checkpoint, photos.val, tmp_path, size)
    assert metrics["val_loss"] > 0
    written = yaml.safe_load((tmp_path / "evaluate" / "experiment.yaml").read_text())
    assert written["dataset"]["augmentation"]["input_size"] == [96, 64]
    side = 32 if family == "vit" else 64
    assert f"The model was trained at {side}x{side} px, and this run uses 96x64 px. Remove " in caplog.text


def test_the_resolved_spec_reproduces_the_metrics(trained, photos, tmp_path):
    metrics = evaluate(trained("hiera", "finetune").checkpoint, photos.val, tmp_path)
    assert openmae.evaluate(tmp_path / "evaluate" / "experiment.yaml") == metrics


def test_the_training_spec_is_accepted(trained, photos, tmp_path):
    run = trained("convnextv2", "finetune")
    overrides = [f"evaluate.checkpoint={run.checkpoint}", f"results_dir={tmp_path}"]
    metrics = openmae.evaluate(run.folder / "experiment.yaml", overrides)
    assert metrics["ACC_all"] == last_validation(run.folder)["ACC_all"]


def test_a_subset_of_the_classes_keeps_their_numbers(trained, photos, tmp_path):
    run = trained("vit", "finetune")
    red_only = tmp_path / "set"
    shutil.copytree(photos.val / "red", red_only / "red")
    metrics = evaluate(run.checkpoint, red_only, tmp_path)
    assert read_status(tmp_path / "evaluate" / "status.json")[1]["message"] == "Evaluated on 3 images"
    everything = evaluate(run.checkpoint, photos.val, tmp_path)
    assert metrics["ACC_all"] in (0, 1 / 3, 2 / 3, 1)
    assert everything["ACC_all"] * 9 >= metrics["ACC_all"] * 3 - 1e-9
    assert [line["status"] for line in read_status(tmp_path / "evaluate" / "status.json")].count("SUCCESS") == 2


def test_classes_are_matched_by_name(photos, caplog):
    index = index_folder(photos.two_classes, True)
    assert index.labels == (0, 1)
    matched = match_classes(index, ("blue", "green", "red"))
    assert matched.labels == (0, 2)
    assert matched.class_names == ("blue", "green", "red")
    assert "no images of 1 of the 3 classes of the checkpoint: green" in caplog.text
    with pytest.raises(DataError, match=r"has 1 class.* that the checkpoint does not have: red"):
        match_classes(replace(index), ("blue", "green"))
    assert match_classes(replace(index, labels=(1, -1)), ("blue", "green", "red")).labels == (2, -1)


def test_classes_are_matched_in_any_unicode_form():
    index = ImageIndex(Path(), ("a.png", "b.png"), (0, 1), ("caf\u00e9", "x"))
    assert match_classes(index, ("x", "cafe\u0301")).labels == (1, 0)


def test_an_archive_is_a_source(trained, photos, tmp_path):
    with tarfile.open(tmp_path / "images_val.tar.gz", "w:gz") as archive:
        archive.add(photos.val, "val")
    run = trained("vit", "finetune")
    metrics = evaluate(run.checkpoint, tmp_path / "images_val.tar.gz", tmp_path)
    assert metrics["ACC_all"] == last_validation(run.folder)["ACC_all"]


@pytest.mark.parametrize(
    ("trained_in", "fast", "precision"),
    [
        ("bf16", True, "bf16"),
        ("bf16", False, "fp32"),
        ("fp32", True, "fp32"),
        ("fp16", True, "fp32"),
        (None, True, "fp32"),
    ],
)
def test_the_precision_of_training_is_used_if_it_is_fast(
    trained_in, fast, precision, trained, photos, tmp_path, monkeypatch
):
    run = trained("vit", "finetune")
    spec = load_spec(None, [f"evaluate.checkpoint={run.checkpoint}", f"dataset.val_data_sources={photos.val}"])
    model = open_model(spec, "evaluate")
    recorded = {"train": {"precision": trained_in}} if trained_in else {}
    model = replace(model, info=replace(model.info, spec=recorded))
    monkeypatch.setattr(action, "has_fast_bf16", lambda on_gpu: fast)
    request = action.Request("evaluate", spec, tmp_path, model, index_folder(photos.val, True))
    assert request._precision() == precision
    assert replace(request, model=replace(model, network=None))._precision() == "fp32", "an exported model has its own"


def test_half_precision_gives_nearly_the_same_loss(trained, photos, tmp_path, monkeypatch):
    losses = {}
    for name in ("fp32", "bf16"):
        monkeypatch.setattr(action.Request, "_precision", lambda _, name=name: name)
        options = [f"evaluate.checkpoint={trained('vit', 'finetune').checkpoint}", f"results_dir={tmp_path / name}"]
        losses[name] = openmae.evaluate({}, [*options, f"dataset.val_data_sources={photos.val}"])["val_loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"], "it was computed in fp32"
