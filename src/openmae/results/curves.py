"""Draw training curves: a panel each for loss, accuracy, learning rate, speed and data loading."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from openmae.results import style
from openmae.results.metrics_csv import Row, before_training, series
from openmae.results.style import BLUE
from openmae.results.verdict import ScoredImages
from openmae.spec.metrics import METRICS, is_share
from openmae.storage.printable import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT, _LABELS = 3.5, 2.3, 1.25  # inches: size of a panel, and minimum room for names on its right
_BESIDE, _NAME_SIZE = 0.03, 8.5  # gap between a panel and the names, relative to its width; font size in points
_LEFT, _TOP, _PITCH = 0.75, 0.75, 3.2  # inches
_SMOOTH_FROM = 80  # number of points from which a running mean is drawn over the raw curve


@dataclass(frozen=True)
class _Curve:
    name: str
    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    trend: NDArray[np.float64]  # the running mean, or the values themselves
    reading: float  # the number next to the curve
    colour: str
    dashed: bool = False  # a level to compare the curves with


def _plain(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


@dataclass(frozen=True)
class _Panel:
    """A panel; ``metrics`` maps a metric to the name of its curve, and is empty for the panel of all learning rates."""

    title: str
    metrics: Mapping[str, str]
    text: Callable[[float], str] = _plain
    log_axis: bool = False
    from_zero: bool = False
    noisy: bool = False
    peak: bool = False  # show the highest value next to a curve, not the last one
    levels: bool = False  # show the levels of chance and of the untrained model
    epoch_mean: str = ""  # suffix of the metric whose last value is shown instead, if there is one


_LOSSES = {name: METRICS[name].short for name in sorted(METRICS) if not is_share(name)}
_SHARES = {name: METRICS[name].short for name in sorted(METRICS) if is_share(name)}
_PANELS = (
    _Panel("Loss", _LOSSES, log_axis=True, noisy=True, epoch_mean="_epoch"),
    _Panel("Accuracy", _SHARES, _percent, levels=True),
    _Panel("Learning rate", {}, from_zero=True, peak=True),  # its last value is near 0 by design
    _Panel("Images per second", {"images_per_s": ""}, from_zero=True, noisy=True),
    _Panel("Time spent waiting for data", {"data_wait": ""}, _percent, from_zero=True, noisy=True),
)


def save_curves(rows: Sequence[Row], path: Path, scored: ScoredImages | None = None) -> Path:
    """Draw the metrics of a run over its steps to a PNG and return ``path``.

    There is a panel for each kind of metric in the rows, which are as ``read_metrics`` returns them. The loss has a
    logarithmic axis if it spans more than a factor of 5. Long noisy curves are faint, with their running mean on top.
    Values that are not finite are left out. Dashed lines in the panel of accuracies show the chance level of the
    ``scored`` images and, in pretraining, the accuracies before the first step.

    Raises:
        ValueError: the rows contain none of the metrics.
    """
    panels = [(panel, curves) for panel in _PANELS if (curves := _curves(panel, rows))]
    panels = [(panel, curves + (_levels(curves, rows, scored) if panel.levels else [])) for panel, curves in panels]
    if not panels:
        raise ValueError("there is nothing to draw: no row contains a loss, accuracy, learning rate or speed")
    columns = min(2, len(panels))
    epochs = max(int(row.get("epoch", 1)) for row in rows)
    steps = int(max(row["step"] for row in rows))
    names = [text for panel, curves in panels for _, text in _names(panel, curves)]
    beside = max(_LABELS, _BESIDE * _WIDTH + style.text_width(names, _NAME_SIZE) + 0.15)
    pitch_x = _LEFT + _WIDTH + beside
    height = _TOP + math.ceil(len(panels) / columns) * _PITCH
    subtitle = f"{counted(epochs, 'epoch')} · {counted(steps, 'step')}"
    with style.drawing(path, columns * pitch_x, height, "Training", subtitle) as figure:
        for index, (panel, curves) in enumerate(panels):
            row, column = divmod(index, columns)
            axes = style.add_axes(figure, _LEFT + column * pitch_x, _TOP + 0.35 + row * _PITCH, _WIDTH, _HEIGHT)
            _draw(axes, panel, curves)
            _scale(axes, panel, curves, steps)
            _name_curves(axes, panel, curves)
    return path


def _curves(panel: _Panel, rows: Sequence[Mapping[str, float]]) -> list[_Curve]:
    names = dict(panel.metrics)
    if not names:
        found = dict.fromkeys(name for row in rows for name in row if name.startswith("lr"))
        names = {name: name[2:].strip("-_/") for name in found}
    curves = []
    for number, (metric, name) in enumerate(names.items()):
        steps, values = (np.array(column, dtype=np.float64) for column in series(rows, metric))
        steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
        if len(values):
            trend = _running_mean(values) if panel.noisy and len(values) >= _SMOOTH_FROM else values
            colour = style.SERIES[number] if len(names) <= len(style.SERIES) else BLUE
            reading = float(trend.max() if panel.peak else trend[-1])
            if panel.epoch_mean and (means := series(rows, f"{metric}{panel.epoch_mean}")[1]):
                reading = means[-1]  # the same number as at the top of the report
            curves.append(_Curve(name, steps, values, trend, reading, colour))
    return curves


def _levels(curves: Sequence[_Curve], rows: Sequence[Row], scored: ScoredImages | None) -> list[_Curve]:
    """Return the level of chance and, in pretraining, those of the model before the first step.

    In fine-tuning the head is random before the first step, so that level would only repeat chance.
    """
    colours, first = {curve.name: curve.colour for curve in curves}, before_training(rows)
    levels = []
    if scored is not None:
        name = scored.chance_name
        top1 = "top-1 " if name == "chance" and _SHARES["ACC_top5"] in colours else ""
        levels.append((f"{top1}{name}", scored.chance, style.MUTED))
    for metric, name in _SHARES.items():
        if metric in first and name in colours and "pretrain" in METRICS[metric].stages:
            levels.append(("before training", first[metric], colours[name]))
    ends = np.array([0, rows[-1]["step"]], dtype=np.float64)
    return [
        _Curve(name, ends, np.full(2, value), np.full(2, value), value, colour, dashed=True)
        for name, value, colour in levels
    ]


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over a centred window of 1/20 of the curve, narrower at both ends."""
    window = np.ones(max(3, len(values) // 20))
    sums = np.convolve(values, window, mode="same")
    return np.asarray(sums / np.convolve(np.ones_like(values), window, mode="same"))


def _draw(axes: Axes, panel: _Panel, curves: Sequence[_Curve]) -> None:
    width = 1.6 if panel.metrics or len(curves) <= len(style.SERIES) else 0.8
    for curve in curves:
        if curve.dashed:
            axes.plot(curve.steps, curve.values, color=curve.colour, lw=0.9, ls=(0, (5, 3)))
            continue
        marker = "o" if len(curve.values) == 1 else None
        if curve.trend is not curve.values:
            axes.plot(curve.steps, curve.values, color=curve.colour, lw=0.6, alpha=0.3)
        axes.plot(curve.steps, curve.trend, color=curve.colour, lw=width, marker=marker, markersize=4)
    style.value_grid(axes)
    axes.set_xlabel("step", size=8)
    axes.set_title(panel.title, loc="left", size=10, weight="bold", pad=10)


def _scale(axes: Axes, panel: _Panel, curves: Sequence[_Curve], steps: int) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    lowest = min(curve.values.min() for curve in curves)
    highest = max(curve.values.max() for curve in curves)
    if panel.log_axis and lowest > 0 and highest / lowest > 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter("")
    elif panel.from_zero and lowest >= 0:
        axes.set_ylim(0, 1.08 * highest or 1)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    elif highest == lowest:
        axes.set_ylim(lowest - (abs(lowest) or 1) / 2, lowest + (abs(lowest) or 1) / 2)
    axes.yaxis.set_major_formatter(lambda value, _: panel.text(value))
    axes.set_xlim(-0.02 * steps, 1.02 * steps or 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _names(panel: _Panel, curves: Sequence[_Curve]) -> list[tuple[_Curve, str]]:
    """Return the curves to name next to a panel, from the lowest to the highest, with their texts."""
    ordered = sorted(curves, key=lambda curve: curve.reading)
    if not panel.metrics and len(ordered) > len(style.SERIES):
        ordered = [ordered[0], ordered[-1]]  # with layer decay, there are too many learning rates to name
    peak = "peak" if panel.peak else ""
    return [(curve, "  ".join(filter(None, (curve.name, peak, panel.text(curve.reading))))) for curve in ordered]


def _name_curves(axes: Axes, panel: _Panel, curves: Sequence[_Curve]) -> None:
    named = _names(panel, curves)
    axes.get_ylim()  # applies pending autoscaling before the transform is used
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((curve.steps[-1], curve.reading))[1]) for curve, _ in named]
    look: dict[str, Any] = {"transform": axes.transAxes, "size": _NAME_SIZE, "va": "center_baseline"}
    for (curve, text), height in zip(named, style.spread(wanted, gap=0.09), strict=True):
        axes.text(1 + _BESIDE, height, text, color=curve.colour, **look)
