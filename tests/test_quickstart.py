"""``mae quickstart``: its data and folders; slow tests run it on three seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from openmae import quickstart
from openmae.errors import UserError
from openmae.spec.load import load_spec


def test_digits_are_split_without_overlap(tmp_path: Path) -> None:
    quickstart.write_digits(tmp_path)
    names = {
        part: {p.name for p in (tmp_path / part).rglob("*.png")} for part in ("unlabelled", "labelled", "held_out")
    }
    assert {part: len(found) for part, found in names.items()} == {"unlabelled": 1297, "labelled": 100, "held_out": 500}
    assert not names["unlabelled"] & names["held_out"], "held-out digits must not be pretrained on"
    assert names["labelled"] <= names["unlabelled"]
    assert sorted(p.name for p in (tmp_path / "labelled").iterdir()) == [str(d) for d in range(10)]
    with Image.open(next((tmp_path / "unlabelled").iterdir())) as image:
        assert (image.size, image.mode) == ((32, 32), "L")
        assert image.getpixel((0, 16)) >= 250, "ink is dark on white paper"


def test_specs_load_without_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_spec(quickstart._pretrain_spec(tmp_path, 0), action="train")
    load_spec(quickstart._finetune_spec(tmp_path, "finetune", 0, tmp_path / "backbone.safetensors"), action="train")
    assert not caplog.text


def test_only_an_earlier_quickstart_is_replaced(tmp_path: Path) -> None:
    folder = quickstart._clear(tmp_path / "q")
    (folder / "old.txt").write_text("x")
    assert not (quickstart._clear(folder) / "old.txt").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty, and was not created by an earlier quickstart"):
        quickstart._clear(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.slow(reason="four training runs, of two minutes in all")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pretraining_wins(tmp_path: Path, seed: int) -> None:
    accuracies = quickstart.run(tmp_path / "quickstart", seed)
    assert accuracies["pretrained"] > max(accuracies["scratch"], accuracies["scratch_equal_time"]) + 0.05, accuracies
    assert (tmp_path / "quickstart" / "report.html").stat().st_size > 50_000
