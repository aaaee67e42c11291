"""The report of a search with simulated jobs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.helpers.simulation import BrokenError, loss, make_spec, make_worker

from openmae.automl.search_report import write_search_report


def test_report(tmp_path: Path) -> None:
    def learn(overrides: Mapping[str, Any], epoch: int) -> float:
        if overrides["train.results_dir"].endswith("001"):
            raise BrokenError("the disk is wet")
        return loss(overrides, epoch)

    worker, _ = make_worker(make_spec(tmp_path, algorithm="random"), learn)
    worker.run()
    folder = worker.study.folder
    (folder / "best.yaml").write_text("train: {}\n")
    counts = {"train": 10, "val": 5, "classes": 2}
    final = {"knn_acc": 0.75, "val_loss": 0.25, "ACC_top5": 1.0}
    path = write_search_report(worker.study, {"knn_acc": 0.5}, final, counts)
    html = path.read_text(encoding="utf-8")
    assert "ACC_top5" not in html, "of two classes it is always 1"
    for text in (
        *("Best values", "starting checkpoint", "History", "Parallel coordinates", "Importances", "Slices"),
        *("Limits of this metric", "All trials", "failed: data: the disk is wet", "Search settings", "train: {}"),
    ):
        assert text in html, text
    assert "The search chose the trial by the same images" not in html, "train_loss is not of the validation images"
    figures = sorted(file.name for file in (folder / "pictures").iterdir())
    assert ">your values<" in html
    assert figures == ["history.png", "importances.png", "parallel_coordinates.png", "slices.png"]


def test_first_trial_without_the_values_of_the_spec_is_not_yours(tmp_path: Path) -> None:
    worker, _ = make_worker(make_spec(tmp_path, ranges={"train.optim.lr": [1e-3, 2e-3]}, max_recommendations=2))
    worker.run()
    (worker.study.folder / "best.yaml").write_text("train: {}\n")
    path = write_search_report(worker.study, {}, {}, {"train": 10, "val": 0, "classes": 0})
    assert "your values" not in path.read_text(encoding="utf-8")
