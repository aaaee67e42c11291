"""The benchmark of recipes: its image sets, its trainings, and its table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bench.image_sets import LABELS, SETS, write_set
from bench.recipes import QUICK, WITHOUT, Plan, Results, Training, report, trainings_of
from PIL import Image

from bench import recipes
from openmae.spec.describe import fields


@pytest.mark.parametrize("name", ["digits", "textures"])
def test_a_set_has_its_parts(name: str, tmp_path: Path) -> None:
    found = write_set(name, tmp_path, most=400)
    assert found.classes == 10
    unlabelled = {path.name for path in (tmp_path / "unlabelled").iterdir()}
    held_out = {path.name for path in (tmp_path / "held_out").rglob("*.png")}
    assert len(unlabelled) + len(held_out) == 400
    assert not unlabelled & held_out, "images of the test are trained on"
    for count in LABELS:
        classes = [len(list(folder.iterdir())) for folder in found.labelled(count).iterdir()]
        assert max(classes) <= count
        assert {path.name for path in found.labelled(count).rglob("*.png")} <= unlabelled
    with Image.open(next((tmp_path / "unlabelled").iterdir())) as image:
        assert image.size == (SETS[name][0],) * 2
    again = write_set(name, tmp_path, most=10)
    assert again == found, "a set that is there was written again"


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.image_sets.STAMPS", tmp_path)
    monkeypatch.setattr("bench.image_sets.FONTS", tmp_path)
    for name, package in (("stamps", "tuxpaint-stamps-default"), ("glyphs", "fonts-liberation2")):
        with pytest.raises(FileNotFoundError, match=f"apt-get install .*{package}"):
            write_set(name, tmp_path / name)


def test_every_training_has_its_own_results() -> None:
    trainings = set(trainings_of(Plan()))
    assert len({training.name for training in trainings}) == len(trainings)
    assert all(key in fields() for values in WITHOUT.values() for key in values)
    assert Training("digits", "vit_tiny_patch16", "auto", 1, 10, True, "no mixing").source.without == ""
    assert (
        Training("digits", "vit_tiny_patch16", "auto", 1, 10, True, "small decoder").source.without == "small decoder"
    )


def test_the_table_shows_what_is_known(tmp_path: Path) -> None:
    plan = replace(
        QUICK,
        sets=("digits",),
        labels=(10,),
        seeds=(0, 1),
        without=("no mixing",),
        part=("digits",),
        decoders=("vit_tiny_patch16",),
    )
    (tmp_path / "metrics").mkdir()
    first = Training("digits", "vit_tiny_patch16", "auto", 0, 10, pretrained=True)
    for training, values in (
        (first, {"ACC_all": 0.5, "epochs": 40}),
        (replace(first, seed=1), {"ACC_all": 0.75, "epochs": 40}),
        (first.source, {"knn_acc": 0.25, "epochs": 8}),
        (replace(first, pretrained=False), {"ACC_all": 0.125, "epochs": 40}),
    ):
        (tmp_path / "metrics" / f"{training.name}.json").write_text(json.dumps(values))
    rows = report(Results(tmp_path, plan), plan).rows
    start = ("digits", "vit_tiny_patch16", "10")
    assert rows[0] == (*start, "auto", "62.5 (50.0 to 75.0)", "12.5 (12.5 to 12.5)", "25.0 (25.0 to 25.0)", "8 + 40")
    assert rows[1][:5] == (*start, "auto without small decoder, epochs of auto", "-")
    assert rows[2][:5] == (*start, "auto without no mixing", "-")


def test_what_starts_from_the_same_backbone_is_trained_together() -> None:
    trainings = list(dict.fromkeys(trainings_of(Plan())))
    groups = list(recipes._groups(trainings))
    assert [training for group in groups for training in group] == trainings
    assert all(len({training.source for training in group}) == 1 for group in groups)
    assert len(groups[0]) == 2, "pretrained and from scratch"


@pytest.mark.slow(reason="trains twice and pretrains")
def test_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "recipes")
    text = recipes.run(quick=True).write(tmp_path, "recipes", quick=True)
    assert "| textures | vit_tiny_patch16 | 5 " in text
    kept = sorted(path.name for path in (tmp_path / "recipes-quick" / "metrics").iterdir())
    assert len(kept) == 3, "pretraining, fine-tuning, from scratch"
