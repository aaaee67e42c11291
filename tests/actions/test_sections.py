"""``report.html`` after every action: there, whole, and asking nothing of the network."""

from __future__ import annotations

import re

import numpy as np
import pytest

import openmae
from openmae.actions.sections import class_table

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


def test_class_table():
    confusion = np.array([[3, 1, 0], [0, 2, 2], [0, 0, 0]])
    table = class_table(confusion, ["a", "b", "c"])
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["a"] == (4, 1.0, 0.75, pytest.approx(6 / 7))
    assert rows["b"] == (4, pytest.approx(2 / 3), 0.5, pytest.approx(4 / 7))
    assert rows["c"] == (0, 0.0, None, 0.0)
    assert [row[0] for row in table.rows] == ["c", "b", "a"], "the weakest first"
