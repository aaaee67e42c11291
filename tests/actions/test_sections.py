"""``report.html`` after every action: there, whole, and asking nothing of the network."""

from __future__ import annotations

import re

import numpy as np
import pytest

import openmae
from openmae.actions.sections import best_epoch, class_table
from openmae.cli.main import main
from openmae.results.metrics_csv import read_metrics
from openmae.spec.metrics import informative

from .conftest import train_arguments

pytestmark = pytest.mark.xdist_group("actions")


def check(path, *texts):
    html = path.read_text(encoding="utf-8")
    for text in texts:
        assert text in html, text
    assert not re.search(r"https?://|<script|<link|@import|url\(", html)
    pictures = re.findall(r'<img[^>]*src="([^"]{0,40})', html)
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    return len(pictures)


def test_after_training(trained):
    pretrained = check(
        trained("vit", "pretrain").folder / "report.html",
        *("OpenMAE train", "vit_tiny_patch16 · pretrain · 32 x 32 px", "validation loss", "kNN accuracy"),
        *("Curves", "Reconstructions", "Recipe", "8 to train, 9 to validate", "decoder_depth: 1"),
    )
    assert pretrained == 2
    html = trained("hiera", "finetune").folder / "report.html"
    assert check(html, "top-1 accuracy", "hiera_tiny_224 · finetune", "learning rate") == 1
    text = html.read_text()
    assert text.index("top-1 accuracy") < text.index("validation loss") < text.index("training loss")


@pytest.mark.parametrize(("stage", "texts"), [("pretrain", "Reconstructions"), ("finetune", "Confusion matrix")])
def test_after_evaluating(trained, photos, stage, texts, tmp_path):
    spec = {
        "evaluate": {"checkpoint": str(trained("vit", stage).checkpoint)},
        "dataset": {"val_data_sources": str(photos.val), "num_workers_per_gpu": 0},
        "results_dir": str(tmp_path),
    }
    openmae.evaluate(spec)
    assert check(tmp_path / "evaluate" / "report.html", "OpenMAE evaluate", "9 images", texts, "Spec") == 1


@pytest.mark.parametrize(
    ("stage", "texts"),
    [("pretrain", ("read_table", "dimensions")), ("finetune", ("Examples", "second class"))],
)
def test_after_inference(trained, photos, stage, texts, tmp_path):
    spec = {
        "inference": {"checkpoint": str(trained("vit", stage).checkpoint)},
        "dataset": {"test_data_sources": str(photos.plain), "num_workers_per_gpu": 0},
        "results_dir": str(tmp_path),
    }
    openmae.inference(spec)
    assert check(tmp_path / "inference" / "report.html", "OpenMAE inference", *texts, "Spec") == 1


def test_the_report_of_training_names_the_best_epoch_the_weights_and_the_duration(photos, trained, tmp_path, capsys):
    pretrained = trained("vit", "pretrain").folder / "backbone.safetensors"
    overrides = [*train_arguments(photos, "vit", "finetune"), f"results_dir={tmp_path}", "train.num_epochs=3"]
    assert main(["train", *overrides, f"train.pretrained_model_path={pretrained}"]) == 0
    rows = [row for row in read_metrics(tmp_path / "train" / "metrics.csv") if "ACC_all" in row and row["step"]]
    best = max(rows, key=lambda row: row["ACC_all"])
    text = f"Best ACC_all: {100 * best['ACC_all']:.1f} %, epoch {best['epoch']} (model_best.pth)"
    shown = " ".join(capsys.readouterr().err.split())
    assert text in shown
    verdict = f"Top-1 accuracy: {100 * rows[-1]['ACC_all']:.1f} % after 3 epochs; chance is 33.3 %"
    assert shown.index(text) < shown.index(verdict) < shown.rindex("Results are in"), "it is not at the end"
    weights = f"{pretrained}: loaded 100 % of vit_tiny_patch16&#39;s backbone from the OpenMAE layout"
    check(tmp_path / "train" / "report.html", text, weights, "duration", "0:0")


def test_the_report_and_the_terminal_end_with_the_verdict(photos, tmp_path, capsys):
    overrides = [*train_arguments(photos, "vit", "pretrain"), f"results_dir={tmp_path}"]
    assert main(["train", *overrides]) == 0
    before, *_, after = (row for row in read_metrics(tmp_path / "train" / "metrics.csv") if "probe_acc" in row)
    start = (
        f"Linear probe: {100 * before['probe_acc']:.1f} % before, {100 * after['probe_acc']:.1f} % after 2 steps; kNN: "
    )
    verdict, results = capsys.readouterr().err.splitlines()[-2:]
    assert verdict.startswith(start)
    assert results.startswith("Results are in ")
    page = (tmp_path / "train" / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert verdict in page
    assert page.index(verdict) < page.index("<h2>Final metrics")
    assert "Dashed: the accuracy of always guessing the most frequent class" in page


def test_the_first_of_equally_good_epochs_is_the_best(tmp_path):
    rows = "step,epoch,train_loss,train_loss_epoch,val_loss\n0,0,,,1\n"  # the untrained model is as good
    rows += "1,1,0.5,,\n1,1,,0.7,2\n2,2,,0.5,1\n3,3,,0.6,1\n"
    (tmp_path / "metrics.csv").write_text(rows)
    assert best_epoch(tmp_path, "val_loss", 1.0) == "Best val_loss: 1.0000, epoch 2 (model_best.pth)"
    assert best_epoch(tmp_path, "train_loss", 0.5) == "Best train_loss: 0.5000, epoch 2 (model_best.pth)"
    assert best_epoch(tmp_path, "val_loss", None) == ""


def test_the_spec_of_a_report_has_only_options_of_the_action(trained, photos, tmp_path):
    spec = {
        "evaluate": {"checkpoint": str(trained("vit", "finetune").checkpoint)},
        "dataset": {"val_data_sources": str(photos.val), "num_workers_per_gpu": 0},
        "results_dir": str(tmp_path),
    }
    openmae.evaluate(spec)
    page = (tmp_path / "evaluate" / "report.html").read_text()
    for key in ("input_size: [32, 32]", "stage: finetune", "checkpoint: ", "val_data_sources: "):
        assert key in page
    for key in ("num_epochs", "lr: ", "mixup", "inference:", "wandb"):
        assert key not in page
        assert key in (tmp_path / "evaluate" / "experiment.yaml").read_text()
    assert "num_epochs: 1" in (trained("vit", "finetune").folder / "report.html").read_text()


def test_top_5_accuracy_of_few_classes_is_not_shown(trained, photos, tmp_path, capsys):
    spec = {
        "evaluate": {"checkpoint": str(trained("vit", "finetune").checkpoint)},
        "dataset": {"val_data_sources": str(photos.val), "num_workers_per_gpu": 0},
        "results_dir": str(tmp_path),
    }
    capsys.readouterr()
    assert openmae.evaluate(spec)["ACC_top5"] == 1
    assert "ACC_top5" in (tmp_path / "evaluate" / "status.json").read_text()
    shown = capsys.readouterr().err
    assert "ACC_all" in shown
    assert "ACC_top5" not in shown
    for folder in (trained("vit", "finetune").folder, tmp_path / "evaluate"):
        page = (folder / "report.html").read_text()
        assert "top-1 accuracy" in page
        assert "top-5 accuracy" not in page
    assert informative({"ACC_top5": 0.9}, 6) == {"ACC_top5": 0.9}


def test_class_table():
    confusion = np.array([[3, 1, 0], [0, 2, 2], [0, 0, 0]])
    table = class_table(confusion, ["a", "b", "c"])
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["a"] == (4, 1.0, 0.75, pytest.approx(6 / 7))
    assert rows["b"] == (4, pytest.approx(2 / 3), 0.5, pytest.approx(4 / 7))
    assert rows["c"] == (0, 0.0, None, 0.0)
    assert [row[0] for row in table.rows] == ["c", "b", "a"], "the weakest first"
