"""Prepare the trials of a search for figures and tables: results, the best trial, axes and texts."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from openmae.results.style import shorten
from openmae.spec.metrics import is_share

Floats = NDArray[np.float64]
State = Literal["complete", "stopped early", "failed", "running"]

_CLIP_FROM = 8  # number of results from which values much worse than the others are drawn at the edge
_MAX_NAMES = 12  # tick labels on an axis of categories
UNSET = -0.17  # place on a parameter's axis, from 0 to 1, of trials without that parameter


@dataclass(frozen=True)
class TrialSummary:
    """A trial, for figures and tables.

    Attributes:
        number: number of the trial.
        value: final metric, or that after the last epoch if the trial was stopped early; NaN without a result.
        state: its state, or how it ended.
        epochs: number of epochs trained.
        params: dotted key of the spec -> value; a key that depends on another one may be missing.
        seconds: duration.
        cause: why it failed.
    """

    number: int
    value: float
    state: State
    epochs: int
    params: Mapping[str, Any]
    seconds: float
    cause: str = ""


def best_so_far(trials: Sequence[TrialSummary], *, maximize: bool) -> list[TrialSummary]:
    """Return the trials that are better than all before them, of the complete ones if there are any."""
    sign = 1 if maximize else -1
    for state in ("complete", "stopped early"):
        found: list[TrialSummary] = []
        for trial in trials:
            if trial.state == state and (not found or sign * trial.value > sign * found[-1].value):
                found.append(trial)
        if found:
            return found
    return []


def best_trial(trials: Sequence[TrialSummary], *, maximize: bool) -> TrialSummary | None:
    """Return the best complete trial, or the best one stopped early if none is complete; None if there is neither."""
    steps = best_so_far(trials, maximize=maximize)
    return steps[-1] if steps else None


@dataclass(frozen=True)
class ParameterAxis:
    """The axis of a parameter: the place [N] of each trial from 0 to 1 (or ``UNSET``), and its ticks."""

    name: str
    places: Floats
    ticks: Sequence[tuple[float, str]]

    @property
    def has_unset(self) -> bool:
        """True if a trial lacks the parameter."""
        return bool((self.places == UNSET).any())


class SearchResults:
    """The trials with a result, and the range of values to show.

    Args:
        tried: all trials, by number; at least one has a result.
        metric: name of the metric.
        maximize: whether larger is better.
        log_keys: parameters whose axes are logarithmic.
        has_own: whether the first trial has the user's own values.

    Attributes:
        trials: trials with a result.
        values: their values [N].
        steps: those that are better than all before them.
        best: index in ``trials`` of the best one.
        own: index in ``trials`` of the one with the user's own values; None if there is none with a result.
        low, high: range of values to show, without values so bad that the good ones could not be distinguished.
        clipped: mask [N] of the values outside the range.
        names: short name of each parameter, by key.
    """

    def __init__(
        self, tried: Sequence[TrialSummary], metric: str, *, maximize: bool, log_keys: Collection[str], has_own: bool
    ) -> None:
        self.tried, self.metric, self.maximize, self.log_keys = tried, metric, maximize, log_keys
        self.steps = best_so_far(tried, maximize=maximize)
        self.trials = [trial for trial in tried if trial.state in ("complete", "stopped early")]
        self.values = np.array([trial.value for trial in self.trials], dtype=np.float64)
        self.best = self.trials.index(self.steps[-1])
        self.own = 0 if has_own and self.trials[0] is tried[0] else None
        signed = self.values if maximize else -self.values
        lead = signed.max() - np.median(signed)
        far = (signed < np.median(signed) - 4 * lead) & (lead > 0) & (len(signed) >= _CLIP_FROM)
        far[self.best] = False  # a trial stopped early may look better than the best one
        self.low, self.high = float(self.values[~far].min()), float(self.values[~far].max())
        self.clipped = (self.values < self.low) | (self.values > self.high)
        self.names = short_names(list(dict.fromkeys(key for trial in self.trials for key in trial.params)))

    @property
    def places(self) -> Floats:
        """Values scaled so that ``low`` is 0 and ``high`` is 1, and clipped."""
        if self.high == self.low:
            return np.full(len(self.values), 0.5)
        return np.clip((self.values - self.low) / (self.high - self.low), 0, 1)

    @property
    def beyond(self) -> str:
        """Description of the values outside the range."""
        return f"below {self.text(self.low)}" if self.maximize else f"above {self.text(self.high)}"

    def text(self, value: float) -> str:
        """Return a value as text, with enough decimals to distinguish the results."""
        if not is_share(self.metric):
            return number_text(value, 4)
        return f"{100 * value:.{2 if 0 < self.high - self.low < 0.01 else 1}f} %"

    def ticks(self) -> list[tuple[float, str]]:
        """Return the values and labels of ticks."""
        factor, unit = (100, " %") if is_share(self.metric) else (1, "")
        shown = linear_ticks(factor * self.low, factor * self.high)
        return [(tick / factor, number_text(tick, 5) + unit) for tick in shown]

    def axes(self, spread: Floats) -> list[ParameterAxis]:
        """Return the axes of the parameters; ``spread`` [N] in [-0.5, 0.5] separates the trials of a category."""
        return [self._axis(key, spread) for key in self.names]

    def _axis(self, key: str, spread: Floats) -> ParameterAxis:
        given = np.array([key in trial.params for trial in self.trials])
        values = [trial.params[key] for trial in self.trials if key in trial.params]
        places = np.full(len(self.trials), UNSET)
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            places[given], ticks = _scale(values, log=key in self.log_keys)
        else:
            texts = [format_value(value) for value in values]
            found = sorted(set(texts), key=_natural)
            at = {text: (i + 0.5) / len(found) for i, text in enumerate(found)}
            places[given] = [at[text] for text in texts]
            places[given] += 0.55 * spread[given] / len(found)
            ticks = [(at[text], shorten(text, 18)) for text in found[:: math.ceil(len(found) / _MAX_NAMES)]]
        return ParameterAxis(self.names[key], places, ticks if given.all() else [(UNSET, "not set"), *ticks])


def _scale(values: Sequence[float], *, log: bool) -> tuple[Floats, list[tuple[float, str]]]:
    """Return places from 0 to 1 and ticks."""
    low, high = min(values), max(values)
    if low == high:
        return np.full(len(values), 0.5), [(0.5, number_text(low))]
    ticks = _log_ticks(low, high) if log else linear_ticks(low, high, all(isinstance(v, int) for v in values))
    texts = [number_text(tick, 4) for tick in ticks]
    ends, numbers, at = np.array([low, high]), np.array(values, dtype=np.float64), np.array(ticks)
    if log:
        ends, numbers, at = np.log10(ends), np.log10(numbers), np.log10(at)
    return np.interp(numbers, ends, (0, 1)), list(zip(np.interp(at, ends, (0, 1)).tolist(), texts, strict=True))


def linear_ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return a few round numbers from ``low`` to ``high``."""
    from matplotlib.ticker import MaxNLocator

    if low == high:
        return [low]
    locator = MaxNLocator(5, integer=whole, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10], min_n_ticks=2)
    slack = 1e-9 * (high - low)
    return [float(tick) for tick in locator.tick_values(low, high) if low - slack <= tick <= high + slack]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return a few round numbers from ``low`` to ``high``, or these two."""
    from matplotlib.ticker import LogLocator

    locator = LogLocator(subs=(1,) if high >= 999 * low else (1, 3), numticks=6)
    ticks = [float(tick) for tick in locator.tick_values(low, high) if low * 0.999 <= tick <= high * 1.001]
    return ticks if len(ticks) > 1 else [low, high]


def _natural(text: str) -> list[int | str]:
    """Return a sort key that puts ``vit_tiny_patch4`` before ``vit_tiny_patch16``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Map each key to its shortest unique ending (``train.optim.lr`` -> ``lr``)."""
    names = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        unique = (end for end in endings if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)
        names[key] = next(unique, key)
    return names


def format_value(value: Any) -> str:
    """Return a parameter value as text."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return number_text(value) if isinstance(value, int | float) else str(value)


def number_text(value: float, digits: int = 3) -> str:
    """Format a number in few characters, such as 0.05, 3.1e-4 or 2e6."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{float(f'{value:.{digits}g}'):g}" if abs(value) < 1e4 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """Format a duration, such as ``0:03:20``."""
    return str(timedelta(seconds=round(seconds)))
