"""The objective: the metric of each stage, its value in status.json, and when train_loss is misleading."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from openmae.automl.objective import MISLEADING, Objective, find_misleading, make_objective
from openmae.errors import SpecError
from openmae.results.status import StatusLog
from openmae.spec.load import load_spec
from openmae.spec.schema import ExperimentSpec


def _spec(stage: str, val: bool, *overrides: str, **automl: Any) -> ExperimentSpec:
    data = {"train_data_sources": "images", "batch_size": 8} | ({"val_data_sources": "others"} if val else {})
    return load_spec({"dataset": data, "train": {"stage": stage}, "automl": automl}, overrides, action="automl")


@pytest.mark.parametrize(
    ("stage", "val", "automl", "expected"),
    [
        ("pretrain", False, {}, Objective("train_loss", maximize=False, of_best_epoch=True)),
        ("pretrain", True, {"metric": "val_loss"}, Objective("val_loss", maximize=False, of_best_epoch=True)),
        ("pretrain", True, {}, Objective("train_loss", maximize=False, of_best_epoch=False)),
        ("pretrain", True, {"metric": "knn_acc"}, Objective("knn_acc", maximize=True, of_best_epoch=False)),
        ("finetune", True, {}, Objective("ACC_all", maximize=True, of_best_epoch=True)),
        ("finetune", True, {"metric": "val_loss"}, Objective("val_loss", maximize=False, of_best_epoch=False)),
        ("finetune", True, {"direction": "maximize"}, Objective("ACC_all", maximize=True, of_best_epoch=True)),
    ],
)
def test_metric_of_each_stage(stage: str, val: bool, automl: dict[str, Any], expected: Objective) -> None:
    assert make_objective(_spec(stage, val, **automl)) == expected


def test_best_epoch_counts_only_if_its_checkpoint_is_kept() -> None:
    assert make_objective(_spec("finetune", True, "train.optim.monitor_name=val_loss")).of_best_epoch is False
    pbt = {"algorithm": "pbt", "max_recommendations": 10}
    assert make_objective(_spec("finetune", True, **pbt)).of_best_epoch is False, (
        "weights are handed on at the last one"
    )


@pytest.mark.parametrize(
    ("stage", "val", "automl", "problem", "fix"),
    [
        (
            "finetune",
            False,
            {},
            "automl.metric: ACC_all is measured on validation images with classes, but dataset.val_data_sources is not "
            "set.",
            "Set it.",
        ),
        (
            "pretrain",
            False,
            {"metric": "knn_acc"},
            "automl.metric: knn_acc is measured on validation images with classes, but dataset.val_data_sources is not "
            "set.",
            "Set it, or use automl.metric=train_loss.",
        ),
        (
            "pretrain",
            False,
            {"metric": "val_loss"},
            "automl.metric: val_loss is measured on validation images, but dataset.val_data_sources is not set.",
            "Set it, or use automl.metric=train_loss.",
        ),
        (
            "pretrain",
            True,
            {"metric": "ACC_all"},
            "automl.metric: pretrain has no metric 'ACC_all'.",
            "Use one of: probe_acc, knn_acc, val_loss, train_loss.",
        ),
        (
            "finetune",
            True,
            {"direction": "minimize"},
            "automl.direction: ACC_all is better when larger, got minimize.",
            "Remove automl.direction, or set it to maximize.",
        ),
        (
            "pretrain",
            False,
            {"direction": "maximize"},
            "automl.direction: train_loss is better when smaller, got maximize.",
            "Remove automl.direction, or set it to minimize.",
        ),
    ],
)
def test_impossible_metrics_are_rejected(stage: str, val: bool, automl: dict[str, Any], problem: str, fix: str) -> None:
    with pytest.raises(SpecError) as caught:
        make_objective(_spec(stage, val, **automl))
    assert (caught.value.problem, caught.value.fix) == (problem, fix)


def _write(folder: Path, *epochs: float) -> None:
    status = StatusLog(folder, append=True)
    status.write("STARTED", "train started")
    for number, value in enumerate(epochs, start=1):
        status.write("RUNNING", f"Epoch {number}", kpi={"images_per_s": 3.0, "ACC_all": value})
    status.write("SUCCESS", "train finished")


def test_value_is_of_the_best_or_the_last_epoch(tmp_path: Path) -> None:
    _write(tmp_path, 0.4, 0.8, 0.6)
    assert Objective("ACC_all", maximize=True, of_best_epoch=True).value_of(tmp_path) == 0.8
    assert Objective("ACC_all", maximize=False, of_best_epoch=True).value_of(tmp_path) == 0.4
    assert Objective("ACC_all", maximize=True, of_best_epoch=False).value_of(tmp_path) == 0.6


def test_values_that_are_not_finite_do_not_count(tmp_path: Path) -> None:
    last, best = (Objective("ACC_all", maximize=True, of_best_epoch=flag) for flag in (False, True))
    assert last.value_of(tmp_path / "nothing") is None
    _write(tmp_path, float("nan"))
    assert last.value_of(tmp_path) is best.value_of(tmp_path) is None
    _write(tmp_path, 0.5, float("inf"))
    assert last.value_of(tmp_path) is None, "an earlier epoch's value stands for weights that are lost"
    assert best.value_of(tmp_path) == 0.5


def test_values_as_text() -> None:
    accuracy, loss = make_objective(_spec("finetune", True)), make_objective(_spec("pretrain", False))
    assert (accuracy.shown(0.98765), loss.shown(0.98765), loss.shown(math.nan)) == ("98.77%", "0.9877", "-")
    assert (accuracy.direction, loss.direction) == ("maximize", "minimize")


def test_loss_is_misleading_across_mask_ratios() -> None:
    spec = _spec("pretrain", True)
    objective = make_objective(spec)
    assert find_misleading(spec, objective, ("train.optim.lr", "model.mask_ratio")) == MISLEADING
    assert find_misleading(spec, objective, ("train.optim.lr",)) == ""
    judged = _spec("pretrain", True, metric="knn_acc")
    assert find_misleading(judged, make_objective(judged), ("model.mask_ratio",)) == ""
    tuned = _spec("finetune", True, metric="train_loss")
    assert find_misleading(tuned, make_objective(tuned), ("model.arch",)) == ""
