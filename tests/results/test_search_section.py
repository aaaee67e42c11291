"""The figures of a search: correct texts and places, and no failure for any kind of trials."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers.pixels import count_near, read_pixels

from openmae.results import search_section
from openmae.results.search_section import save_history, save_importances, save_parallel_coordinates, save_slices
from openmae.results.style import BLUE, RUST, shorten
from openmae.results.trials import (
    UNSET,
    ParameterAxis,
    SearchResults,
    TrialSummary,
    best_so_far,
    best_trial,
    format_value,
    number_text,
    short_names,
)

LR, ARCH, DEPTH = "train.optim.lr", "model.arch", "model.decoder_depth"
FIGURES = (save_history, save_parallel_coordinates, save_slices)


def trial(number: int, value: float, state: Any = "complete", **params: Any) -> TrialSummary:
    return TrialSummary(number, value, state, 10, {LR: 1e-3, **params}, 30.0)


def study(count: int) -> list[TrialSummary]:
    """A search with every kind of trial and parameter: failures, conditions, categories, a constant."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(1, count + 1):
        params: dict[str, Any] = {LR: float(10 ** rng.uniform(-5, -2)), "train.seed": 7}
        params[ARCH] = ["vit_tiny_patch16", "hiera_tiny", "a name that is far too long for any axis"][number % 3]
        if number % 2:
            params[DEPTH] = int(rng.integers(1, 9))
        state: Any = ["complete", "complete", "stopped early", "failed"][number % 4]
        found.append(trial(number, math.nan if state == "failed" else float(rng.uniform(0.2, 0.9)), state, **params))
    return found


def results(trials: list[TrialSummary], metric: str = "ACC_all", maximize: bool = True) -> SearchResults:
    return SearchResults(trials, metric, maximize=maximize, log_keys={LR}, has_own=True)


class TestBest:
    def test_best_so_far(self) -> None:
        tried = [trial(1, 0.5), trial(2, 0.4), trial(3, 0.7), trial(4, 0.7), trial(5, 0.9)]
        assert [t.number for t in best_so_far(tried, maximize=True)] == [1, 3, 5], "equals counted"
        assert [t.number for t in best_so_far(tried, maximize=False)] == [1, 2]

    def test_trial_without_a_result_is_never_best(self) -> None:
        tried = [trial(1, math.nan, "failed"), trial(2, math.nan, "running"), trial(3, 0.1)]
        assert best_trial(tried, maximize=True) == tried[2]
        assert best_trial(tried[:2], maximize=True) is None

    def test_trial_stopped_early_is_best_only_without_a_complete_one(self) -> None:
        early = trial(1, 0.9, "stopped early")
        assert best_trial([early, trial(2, 0.5)], maximize=True) == trial(2, 0.5)
        assert best_trial([early, trial(2, math.nan, "running")], maximize=True) == early


class TestTexts:
    def test_short_names_are_unique(self) -> None:
        assert short_names([LR, "train.optim.weight_decay"]) == {LR: "lr", "train.optim.weight_decay": "weight_decay"}
        names = short_names(["train.optim.lr", "probe.optim.lr", "decoder.lr", "lr"])
        assert list(names.values()) == ["train.optim.lr", "probe.optim.lr", "decoder.lr", "lr"]

    def test_accuracies_are_percentages(self) -> None:
        def text(metric: str, *values: float) -> str:
            return results([trial(i, value) for i, value in enumerate(values)], metric).text(values[0])

        assert text("ACC_all", 0.9342, 0.5) == "93.4 %"
        assert text("knn_acc", 0.9345, 0.9349) == "93.45 %", "two results that differ look alike"
        assert text("train_loss", 0.9345, 0.5) == "0.9345"

    def test_numbers_are_short(self) -> None:
        numbers = [0, 4, 0.05, 0.00031, 1e-5, 123456, 2e6, 0.9345678]
        assert [number_text(n) for n in numbers] == ["0", "4", "0.05", "3.1e-4", "1e-5", "1.23e5", "2e6", "0.935"]
        assert [format_value(v) for v in (True, None, [0.9, 0.95])] == ["true", "none", "[0.9, 0.95]"]
        assert len(shorten("x" * 99, 18)) == 18

    def test_summary_counts_states(self) -> None:
        states = ("complete", "failed", "stopped early", "running")
        tried = [trial(number, 0.5, state) for number, state in enumerate(states)]
        assert search_section._summary(results(tried)) == (
            "4 trials · 1 complete, 1 stopped early, 1 failed, 1 running · 40 epochs in 0:02:00"
        )


class TestAxes:
    def axis(self, values: list[Any], log: bool = False) -> ParameterAxis:
        tried = [
            TrialSummary(i, 0.5, "complete", 1, {} if v == "absent" else {LR: v}, 1.0) for i, v in enumerate(values)
        ]
        log_keys = {LR} if log else set()
        search = SearchResults(tried, "ACC_all", maximize=True, log_keys=log_keys, has_own=True)
        (axis,) = search.axes(np.zeros(len(tried)))
        return axis

    def test_numbers_are_to_scale(self) -> None:
        assert self.axis([0.0, 1.0, 4.0]).places == pytest.approx([0, 0.25, 1])
        logarithmic = self.axis([1e-5, 1e-3, 1e-1], log=True)
        assert logarithmic.places == pytest.approx([0, 0.5, 1])
        assert [text for _, text in logarithmic.ticks] == ["1e-5", "1e-4", "0.001", "0.01", "0.1"]
        assert [place for place, _ in logarithmic.ticks] == pytest.approx([0, 0.25, 0.5, 0.75, 1])

    def test_whole_numbers_have_whole_ticks(self) -> None:
        assert [text for _, text in self.axis([0, 1, 2]).ticks] == ["0", "1", "2"]

    def test_single_value_is_in_the_middle(self) -> None:
        for log in (False, True):
            axis = self.axis([0.05, 0.05], log)
            assert (list(axis.places), list(axis.ticks)) == ([0.5, 0.5], [(0.5, "0.05")])

    def test_absent_values_are_not_set(self) -> None:
        axis = self.axis([1.0, "absent", 2.0])
        assert list(axis.places) == [0, UNSET, 1]
        assert (UNSET, "not set") in axis.ticks

    def test_categories_have_distinct_places(self) -> None:
        axis = self.axis(["patch16", "patch4", "patch4", True])
        assert [text for _, text in axis.ticks] == ["patch4", "patch16", "true"]
        assert axis.places == pytest.approx([1 / 2, 1 / 6, 1 / 6, 5 / 6])
        alike = self.axis(["vit_small_" + name + "_patch16" for name in ("a", "b")])
        assert alike.places[0] != alike.places[1], "categories with equal short names are merged"


class TestLimits:
    def test_all_values_are_shown_if_none_is_far_behind(self) -> None:
        search = results([trial(i, 0.5 + i / 20) for i in range(9)], "ACC_all", True)
        assert (search.low, search.high) == pytest.approx((0.5, 0.9))
        assert not search.clipped.any()

    @pytest.mark.parametrize("sign", [1, -1])
    def test_values_far_behind_are_clipped(self, sign: int) -> None:
        values = [sign * (10 + i / 10) for i in range(10)] + [-1e30 * sign]
        search = results([trial(i, value) for i, value in enumerate(values)], "score", sign > 0)
        assert sorted([abs(search.low), abs(search.high)]) == pytest.approx([10, 10.9])
        assert list(np.flatnonzero(search.clipped)) == [10]
        assert search.beyond == ("below 10" if sign > 0 else "above -10")

    def test_best_is_always_shown(self) -> None:
        """Trials stopped early may look better than the only one that was trained to its end."""
        early = [trial(i, 0.9 + i / 1000, "stopped early") for i in range(1, 20)]
        search = results([*early, trial(20, 0.1)], "ACC_all", True)
        assert search.trials[search.best].number == 20
        assert not search.clipped[search.best]


class TestFigures:
    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("save", FIGURES)
    @pytest.mark.parametrize("count", [1, 2, 3, 60])
    def test_any_number_of_trials(self, tmp_path: Path, save: Callable[..., Path], count: int) -> None:
        path = save(results(study(count)), tmp_path / "new" / "a.png")
        assert path == tmp_path / "new" / "a.png"
        assert count_near(read_pixels(path), RUST) > 100, "the best does not stand out"

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("save", FIGURES)
    @pytest.mark.parametrize(
        "values",
        [[0.5, 0.5, 0.5], [0.0, 0.0], [1e38, 1e-30], [1e30, *[0.1 + i / 100 for i in range(9)]]],
        ids=["constant", "zero", "huge", "own value far behind"],
    )
    def test_any_values(self, tmp_path: Path, save: Callable[..., Path], values: list[float]) -> None:
        tried = [trial(i, value) for i, value in enumerate(values)]
        assert save(results(tried, "train_loss", False), tmp_path / "a.png") == tmp_path / "a.png"

    def test_drawing_is_deterministic(self, tmp_path: Path) -> None:
        first, second = (save_slices(results(study(20)), tmp_path / name).read_bytes() for name in "ab")
        assert first == second


class TestImportances:
    def test_bars_are_as_long_as_importances(self, tmp_path: Path) -> None:
        equal = save_importances({LR: 0.5, ARCH: 0.5}, tmp_path / "a.png")
        half = save_importances({LR: 4.0, ARCH: 2.0, DEPTH: -1.0, "x": math.nan}, tmp_path / "b.png")
        assert equal is not None
        assert half is not None
        assert count_near(read_pixels(half), BLUE) / count_near(read_pixels(equal), BLUE) == pytest.approx(
            0.75, abs=0.02
        )

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        for importances in ({}, {LR: 0.0}, {LR: math.nan}):
            assert save_importances(importances, tmp_path / "a.png") is None
        assert not list(tmp_path.iterdir())
