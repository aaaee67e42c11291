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

from openmae.results.style import plural
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
        number: number of the trial; the trial with the lowest one has the user's own values.
        value: final metric, or that after the last epoch if the trial was stopped early; None or not finite without a
            result.
        state: its state, or how it ended.
        epochs: number of epochs trained.
        params: dotted key of the spec -> value; a key that depends on another one may be missing.
        seconds: duration.
        cause: why it failed.
    """

    number: int
    value: float | None
    state: State
    epochs: int
    params: Mapping[str, Any]
    seconds: float
    cause: str = ""

    @property
    def outcome(self) -> State:
        """The state, or "failed" if the trial ended without a finite value."""
        finite = self.value is not None and math.isfinite(self.value)
        return self.state if finite or self.state == "running" else "failed"


@dataclass(frozen=True)
class SearchResults:
    """The trials with a result, by number, and the range of values to show.

    Attributes:
        tried: all trials.
        trials: trials with a result.
        values: their values [N].
        best: index in ``trials`` of the best one.
        own: index in ``trials`` of the one with the user's own values; None if it has no result.
        low, high: range of values to show.
        metric: name of the metric.
        maximize: whether larger is better.
    """

    tried: Sequence[TrialSummary]
    trials: Sequence[TrialSummary]
    values: Floats
    best: int
    own: int | None
    low: float
    high: float
    metric: str
    maximize: bool

    @property
    def clipped(self) -> NDArray[np.bool_]:
        """Mask [N] of the values outside the range."""
        return (self.values < self.low) | (self.values > self.high)

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

    def ticks(self, low: float, high: float) -> list[tuple[float, str]]:
        """Return the places and labels of ticks in a range."""
        if low == high:
            return [(low, self.text(low))]
        if is_share(self.metric):
            shown = linear_ticks(100 * max(low, 0), 100 * min(high, 1))
            return [(tick / 100, f"{number_text(tick, 5)} %") for tick in shown]
        return [(tick, number_text(tick, 5)) for tick in linear_ticks(low, high)]


@dataclass(frozen=True)
class ParameterAxis:
    """The axis of a parameter: the place [N] of each trial from 0 to 1 (or ``UNSET``), and its ticks."""

    name: str
    places: Floats
    ticks: Sequence[tuple[float, str]]


def best_trial(trials: Sequence[TrialSummary], *, maximize: bool) -> TrialSummary | None:
    """Return the best complete trial, or the best one stopped early if none is complete; None if there is neither."""
    steps = best_so_far(trials, maximize)
    return steps[-1] if steps else None


def best_so_far(trials: Sequence[TrialSummary], maximize: bool) -> list[TrialSummary]:
    """Return the trials, by number, that are better than all before them, of the complete ones if there are any."""
    sign = 1 if maximize else -1
    for state in ("complete", "stopped early"):
        found: list[TrialSummary] = []
        for trial in sorted(trials, key=lambda trial: trial.number):
            if trial.outcome == state and (not found or sign * (trial.value or 0) > sign * (found[-1].value or 0)):
                found.append(trial)
        if found:
            return found
    return []


def read_search(trials: Sequence[TrialSummary], metric: str, maximize: bool) -> SearchResults | None:
    """Return the results of a search; None if no trial has one."""
    best = best_trial(trials, maximize=maximize)
    if best is None:
        return None
    shown = [trial for trial in trials if trial.outcome in ("complete", "stopped early")]
    shown.sort(key=lambda trial: trial.number)
    values = np.array([trial.value for trial in shown], dtype=np.float64)
    own = 0 if shown[0].number == min(trial.number for trial in trials) else None
    low, high = _limits(values, maximize, None if own is None else float(values[own]))
    index = shown.index(best)  # a trial stopped early may look better than the best one
    low, high = min(low, float(values[index])), max(high, float(values[index]))
    return SearchResults(trials, shown, values, index, own, low, high, metric, maximize)


def _limits(values: Floats, maximize: bool, own: float | None) -> tuple[float, float]:
    """Return the range of values to show, without values so bad that the good ones could not be distinguished."""
    sign = 1 if maximize else -1
    signed = sign * values
    best, middle, floor = float(signed.max()), float(np.median(signed)), float(signed.min())
    if len(values) >= _CLIP_FROM and middle - floor > 4 * (best - middle) > 0:
        floor = float(signed[signed >= middle - 3 * (best - middle)].min())
        if own is not None and sign * own >= middle - 8 * (best - middle):
            floor = min(floor, sign * own)
    return (floor, best) if maximize else (-best, -floor)


def read_axis(
    key: str, name: str, trials: Sequence[TrialSummary], spread: Floats, log: Collection[str]
) -> ParameterAxis:
    """Return the axis of a parameter; ``spread`` [N] in [-0.5, 0.5] separates the trials of a category."""
    given = np.array([key in trial.params for trial in trials])
    values = [trial.params[key] for trial in trials if key in trial.params]
    places = np.full(len(trials), UNSET)
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        places[given], ticks = _scale(values, log=key in log)
    else:
        names = sorted({format_value(value) for value in values}, key=_natural)
        at = {text: (i + 0.5) / len(names) for i, text in enumerate(names)}
        places[given] = [at[format_value(value)] for value in values]
        places[given] += 0.55 * spread[given] / len(names)
        ticks = [(at[text], shorten(text)) for text in names[:: math.ceil(len(names) / _MAX_NAMES)]]
    return ParameterAxis(name, places, ticks if given.all() else [(UNSET, "not set"), *ticks])


def _scale(values: Sequence[float], log: bool) -> tuple[Floats, list[tuple[float, str]]]:
    """Return places from 0 to 1 and ticks; on a logarithmic axis, zeros are placed below the other values."""
    x = np.array(values, dtype=np.float64)
    if not log or x.min() < 0 or x.max() <= 0:
        whole = all(isinstance(value, int) for value in values)
        ticks = [(tick, number_text(tick, 4)) for tick in linear_ticks(x.min(), x.max(), whole)]
    else:
        positive = x[x > 0]
        ticks = [(math.log10(tick), number_text(tick)) for tick in _log_ticks(positive.min(), positive.max())]
        powers = np.log10(positive)
        zero = powers.min() - 0.2 * max(np.ptp(powers), 1.0)
        x = np.where(x > 0, np.log10(x, where=x > 0, out=np.zeros_like(x)), zero)
        if len(positive) < len(x):
            ticks = [(zero, "0"), *ticks]
    low, high = float(x.min()), float(x.max())
    if low == high:
        return np.full(len(x), 0.5), [(0.5, number_text(values[0]))]
    return (x - low) / (high - low), [((tick - low) / (high - low), text) for tick, text in ticks]


def linear_ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return a few round numbers from ``low`` to ``high``."""
    from matplotlib.ticker import MaxNLocator

    if low == high:
        return [low]
    locator = MaxNLocator(5, integer=whole, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10], min_n_ticks=2)
    slack = 1e-9 * (high - low)
    return [float(tick) for tick in locator.tick_values(low, high) if low - slack <= tick <= high + slack]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return a few round numbers, powers of ten if there are enough; both ends if there are too few round numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 6)]
    return ticks if len(ticks) == 2 else [low, high]


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


def shorten(text: str) -> str:
    """Shorten a text to at most 18 characters."""
    return text if len(text) <= 18 else f"{text[:10]}…{text[-7:]}"


def number_text(value: float, digits: int = 3) -> str:
    """Format a number in few characters, such as 0.05, 3.1e-4 or 2e6."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{float(f'{value:.{digits}g}'):g}" if abs(value) < 1e4 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """Format a duration, such as ``0:03:20``."""
    return str(timedelta(seconds=round(seconds)))


def summarize_states(trials: Sequence[TrialSummary]) -> str:
    """Return a line with the number of trials, their states, epochs and time."""
    states: tuple[State, ...] = ("complete", "stopped early", "failed", "running")
    counts = {state: sum(trial.outcome == state for trial in trials) for state in states}
    parts = [plural(len(trials), "trial"), ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)]
    if epochs := sum(trial.epochs for trial in trials):
        parts.append(f"{plural(epochs, 'epoch')} in {duration(sum(trial.seconds for trial in trials))}")
    return " · ".join(parts)
