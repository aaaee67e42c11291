"""Training curves: panels, the numbers next to them, and values that are not finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.helpers.pixels import read_pixels

from openmae.results import curves, style
from openmae.results.curves import save_curves
from openmae.results.verdict import ScoredImages


def _run(steps: int) -> list[dict[str, float]]:
    return [
        {
            "step": i,
            "epoch": 1 + i // 10,
            "train_loss": 2.0 * 0.97**i,
            "lr": 1e-3,
            "images_per_s": 100,
            "data_wait": 0.1,
        }
        for i in range(1, steps + 1)
    ]


def test_panels_appear_for_what_was_measured(tmp_path: Path) -> None:
    one = read_pixels(save_curves([{"step": 1, "epoch": 1, "train_loss": 1.0}], tmp_path / "one.png"))
    four = read_pixels(save_curves(_run(200), tmp_path / "four.png"))
    assert four.shape[1] == 2 * one.shape[1]
    assert four.shape[0] > one.shape[0]


def test_training_loss_is_the_epoch_mean() -> None:
    """One number for one thing: the mean of the last epoch, at the top of the report and next to the curve."""
    rows = [*_run(20), {"step": 20, "epoch": 2, "train_loss_epoch": 0.857, "val_loss": 0.9}]
    train, validation = curves._curves(curves._PANELS[0], rows)
    assert (train.reading, validation.reading) == (0.857, 0.9)
    (unfinished,) = curves._curves(curves._PANELS[0], _run(20))
    assert unfinished.reading == unfinished.values[-1]


def test_non_finite_values_leave_gaps(tmp_path: Path) -> None:
    rows = [*_run(100), {"step": 101, "epoch": 10, "train_loss": float("nan"), "val_loss": float("inf")}]
    assert save_curves(rows, tmp_path / "c.png").exists()


def _levels(first: dict[str, float], last: dict[str, float], scored: ScoredImages | None) -> dict[str, float]:
    rows = [{"step": 0, "epoch": 0, **first}, {"step": 9, "epoch": 1, **last}]
    (panel,) = (panel for panel in curves._PANELS if panel.levels)
    solid = curves._curves(panel, rows)
    found = solid + curves._levels(solid, rows, scored)
    assert [(curve.steps.tolist(), curve.dashed) for curve in found] == [
        ([0, 9], curve not in solid) for curve in found
    ]
    return {text: curve.values[0] for curve, text in curves._names(panel, found) if curve.dashed}


def test_accuracies_are_compared_with_chance_and_the_untrained_model() -> None:
    probes = {"knn_acc": 0.4, "probe_acc": 0.5}
    trained = {"knn_acc": 0.6, "probe_acc": 0.75}
    assert _levels(probes, trained, ScoredImages.of([0, 1])) == {
        "chance  50 %": 0.5,
        "before training  40 %": 0.4,
        "before training  50 %": 0.5,
    }
    assert "most frequent class  75 %" in _levels(probes, trained, ScoredImages.of([0, 0, 0, 1]))
    assert len(_levels(probes, trained, None)) == 2


def test_a_classifier_is_compared_with_chance_only() -> None:
    """Before the first step its head is random."""
    top1, top5 = {"ACC_all": 0.2}, {"ACC_top5": 0.7}
    assert _levels(top1, top1, ScoredImages.of(range(4))) == {"chance  25 %": 0.25}
    assert _levels(top1 | top5, top1 | top5, ScoredImages.of(range(8))) == {"top-1 chance  12.5 %": 0.125}


def test_levels_are_drawn(tmp_path: Path) -> None:
    rows = [{"step": step, "epoch": step, "probe_acc": 0.5, "knn_acc": 0.5} for step in (0, 9)]
    scored = ScoredImages(8, 4, 0.25)
    without, drawn = (read_pixels(save_curves(rows, tmp_path / "c.png", each)) for each in (None, scored))
    assert without.shape[0] == drawn.shape[0]
    assert not np.array_equal(without[:, :500], drawn[:, :500])


def test_many_learning_rates(tmp_path: Path) -> None:
    rows = [{"step": s, "epoch": 1, **{f"lr_{i}": 0.1 * 0.65**i for i in range(14)}} for s in (0, 1, 2)]
    assert save_curves(rows, tmp_path / "c.png").exists()


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        save_curves([], tmp_path / "c.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        save_curves([{"step": 1, "epoch": 1, "train_loss": float("nan")}], tmp_path / "c.png")


def test_spread_moves_overlapping_names_apart() -> None:
    assert style.spread([0.1, 0.5, 0.9], gap=0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert style.spread([0.5, 0.5], gap=0.1) == pytest.approx([0.45, 0.55])
    spread = style.spread([0.3, 0.5, 0.5, 0.56], gap=0.1)
    assert np.diff(spread).min() >= 0.1 - 1e-9
