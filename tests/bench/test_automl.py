"""The benchmark of searches: who trains what, what is counted, what is said of it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.automl import Budget, Search, Step, Table
from PIL import Image

from bench import automl

ROOT = Path(__file__).parents[2]
OWN = {
    "train.optim.backbone_multiplier": 1.0,
    "train.optim.lr": 5e-4,
    "train.optim.momentum": 0.9,
    "train.optim.warmup_epochs": 1,
    "train.optim.weight_decay": 0.05,
}


class Formula(Table):
    """FAKE trainings: an accuracy that follows from the learning rate and the epoch."""

    def __init__(self, folder: Path, tree: Mapping[str, Any], epochs: int) -> None:
        super().__init__(folder, tree, epochs)
        self.trained: list[tuple[float, int]] = []

    def _train(self, params: Mapping[str, Any], epoch: int, folder: Path) -> float | None:
        self.trained.append((params["train.optim.lr"], epoch))
        return (1 - 0.1 * abs(math.log10(params["train.optim.lr"] / 1e-3))) * epoch / self.epochs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``labelled`` (12) and ``held_out`` (6) pictures of two classes, as the quickstart lays them out."""
    root = tmp_path_factory.mktemp("digits") / "images"
    rng = np.random.default_rng(0)
    for name, count in {"labelled/0": 6, "labelled/1": 6, "held_out/0": 3, "held_out/1": 3}.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture = rng.integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(picture).save(root / name / f"{number}.png")
    return root


def tree_of(pictures: Path, folder: Path, epochs: int) -> dict[str, Any]:
    """The benchmark's spec for a few pictures, from random weights."""
    backbone = folder / "digits" / "pretrain" / "train" / "backbone.safetensors"
    backbone.parent.mkdir(parents=True)
    backbone.touch()  # where there is one, none is made
    tree = automl.finetuning(folder, Budget(epochs=epochs))
    tree["dataset"] |= {name: str(pictures / part) for name, part in _SOURCES.items()}
    tree["train"]["pretrained_model_path"] = ""
    return tree


_SOURCES = {"train_data_sources": "labelled", "val_data_sources": "held_out"}


def test_the_own_values_are_the_quickstarts_shortened(pictures: Path, tmp_path: Path) -> None:
    tree = tree_of(pictures, tmp_path, 9)
    assert tree["train"]["num_epochs"] == 9
    assert tree["train"]["optim"]["warmup_epochs"] == 1, "5 of 40 epochs are 1 of 9"
    assert tree["train"]["optim"]["lr"] == OWN["train.optim.lr"]


def test_searches_share_what_was_trained_and_count_it_each(pictures: Path, tmp_path: Path) -> None:
    budget = Budget(epochs=9, trials=5, seeds=(3,))
    table = Formula(tmp_path, tree_of(pictures, tmp_path, 9), 9)
    found = {name: searches[3] for name, searches in automl.measure(table, budget).items()}
    assert len(table.trained) == len(set(table.trained)), "something was trained twice"
    assert tuple(found) == automl.ALGORITHMS
    assert {len({step.number for step in search.steps}) for search in found.values()} == {5}
    for name, search in found.items():
        reached = {step.number: step.epoch for step in search.steps if step.value is not None}
        assert search.epochs == sum(reached.values()), f"{name}: the study counts other epochs than were trained"
        assert search.own == pytest.approx(1 - 0.1 * math.log10(2)), name
    values = {step.number: step.value for step in found["random"].steps}
    asha = {step.number: step.value for step in found["asha"].steps if step.epoch == 9}
    assert {step.epoch for step in found["asha"].steps} == {3, 9}
    assert asha == {number: values[number] for number in asha}, "asha must draw what random draws with the same seed"
    assert found["asha"].epochs < found["random"].epochs
    assert found["random"].best == max(value for value in values.values() if value is not None)


def test_a_training_that_fails_is_one_trial_less(pictures: Path, tmp_path: Path) -> None:
    class Fails(Formula):
        def _train(self, params: Mapping[str, Any], epoch: int, folder: Path) -> float | None:
            value = super()._train(params, epoch, folder)
            return None if len(self.trained) == 2 else value

    table = Fails(tmp_path, tree_of(pictures, tmp_path, 9), 9)
    search = automl.search_with("random", 0, table, Budget(trials=3))
    assert [step.value is None for step in search.steps] == [False, True, False]
    assert search.best == max(step.value for step in search.steps if step.value is not None)


def test_a_table_is_kept_for_the_same_trainings_alone(pictures: Path, tmp_path: Path) -> None:
    tree = tree_of(pictures, tmp_path, 9)
    first = Formula(tmp_path, tree, 9)
    value = first.value(OWN, 3)
    again = Formula(tmp_path, tree, 9)
    assert (again.value(OWN, 3), again.trained) == (value, []), "a run that was cut must not train it again"
    tree["train"]["seed"] = 1
    other = Formula(tmp_path, tree, 9)
    other.value(OWN, 3)
    assert other.trained == [(5e-4, 3)], "another spec has other values"


def test_a_training_that_paused_has_the_accuracy_of_one_that_did_not(pictures: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        paused, whole = tmp_path / "paused", tmp_path / "whole"
        table = Table(paused, tree_of(pictures, paused, 3), 3)
        assert [0 <= (table.value(OWN, epoch) or 0) <= 1 for epoch in (1, 3)] == [True, True]
        assert Table(whole, tree_of(pictures, whole, 3), 3).value(OWN, 3) == table.value(OWN, 3)
        assert not list(paused.glob("trainings/*")), "the weights of a training at its end are of no use any more"
    finally:
        torch.set_num_threads(threads)


def test_epochs_are_counted_until_a_training_ends_as_well() -> None:
    steps = (Step(0, 1, 0.9), Step(0, 9, 0.5), Step(1, 1, 0.1), Step(2, 1, None), Step(3, 9, 0.7))
    search = Search(steps, 21, full=9)
    assert (search.own, search.best) == (0.5, 0.7)
    assert search.epochs_until(0.5) == 9
    assert search.epochs_until(0.6) == 9 + 1 + 1 + 9, "a rung's 0.9 is no training that ended"
    assert search.epochs_until(0.8) is None


@pytest.mark.parametrize(("bayesian", "asha", "words"), [(0.62, 6, ("met", "met")), (0.515, 9, ("MISSED", "MISSED"))])
def test_targets_are_judged(bayesian: float, asha: int, words: tuple[str, str]) -> None:
    def search(best: float, epochs: int, number: int = 1) -> Search:
        return Search((Step(0, 9, 0.5), Step(number, 9, best)), epochs, full=9)

    found = {
        "random": {0: search(0.6, 54), 1: search(0.6, 54)},
        "bayesian": {0: search(bayesian, 54), 1: search(bayesian, 54)},
        "asha": {0: search(0.6, 18), 1: search(0.6 if asha == 6 else 0.55, 18)},
    }
    made = automl.report(found, Budget(seeds=(0, 1)), 60.0)
    cells = {row[0]: dict(zip(made.columns, row, strict=True)) for row in made.rows}
    assert cells["bayesian"]["target"].endswith(words[0])
    assert cells["asha"]["target"].endswith(words[1]), "a seed in which it does not get there misses the target"
    assert cells["asha"]["reached random's best"] == ("2 of 2" if asha == 6 else "1 of 2")
    assert cells["asha"]["epochs until then / random's"].startswith("0.33 (0.33 to 0.33")
    assert cells["own values"]["best"] == "50.0%"
    assert cells["random"]["target"] == ""
    json.dumps(made.data, allow_nan=False)


@pytest.mark.slow(reason="pretrains an epoch and fine-tunes a few times, a minute")
def test_automl_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "automl", "--quick"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "results/bench/automl-quick.json").read_text()
    searches = json.loads(text)["results"]["searches"]
    assert set(searches) == set(automl.ALGORITHMS)
    for place in (str(tmp_path), str(ROOT), sys.prefix):
        assert place not in text + done.stdout, "a path of this machine was written"
