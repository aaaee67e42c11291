"""Figures of a hyperparameter search: history, parallel coordinates, importances and slices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from openmae.results import style
from openmae.results.style import BLUE, INK, MUTED, PAPER, RUST, shorten
from openmae.results.trials import (
    UNSET,
    Floats,
    ParameterAxis,
    SearchResults,
    State,
    duration,
    format_value,
    short_names,
)
from openmae.storage.printable import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TICK_SIZE = 7.5  # points
# From light grey to dark blue with evenly falling lightness, so that the figure can be read in greyscale.
_SHADES = ("#d0d7df", "#9db9d8", "#5288c0", BLUE, "#143d6d")


def save_history(search: SearchResults, path: Path) -> Path:
    """Draw the value of each trial over its number, with the best value so far, to a PNG.

    Trials stopped early are hollow, failed ones are crosses at the bottom, and running ones are only counted. Values
    much worse than the others are arrows at the edge.
    """
    from matplotlib.ticker import MaxNLocator

    left, width, height = 0.85, 6.1, 3.0
    failed = [trial.number for trial in search.tried if trial.state == "failed"]
    first, last, count = search.tried[0].number, search.tried[-1].number, len(search.tried)
    with style.drawing(path, left + width + 1.65, 1.15 + height + 0.6, "Search history", _summary(search)) as figure:
        axes = style.add_axes(figure, left, 1.15, width, height)
        _value_axis(axes, search, below=0.09 if failed else 0.0)
        numbers, values = [trial.number for trial in search.steps], [trial.value for trial in search.steps]
        axes.step(
            [*numbers, last], [*values, values[-1]], where="post", color=RUST, linewidth=1.4, zorder=2,
            label="best so far",
        )  # fmt: skip
        places = np.array([trial.number for trial in search.trials], dtype=np.float64)
        _draw_points(axes, search, places, size=float(np.clip(2200 / count, 9, 34)))
        if failed:
            look = {"s": np.clip(1500 / count, 8, 26), "color": INK, "linewidth": 1.1, "clip_on": False}
            at = axes.get_xaxis_transform()
            axes.scatter(failed, [0.035] * len(failed), marker="x", transform=at, label="failed", **look)
        _name_own_and_best(axes, search)
        margin = 0.03 * max(last - first, 1)
        axes.set(xlim=(first - margin, last + margin), xlabel="trial", ylabel=_direction(search))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        _legend(figure, axes, without=("best", "your values", "best: your values"))  # named next to the axes
    return path


def save_parallel_coordinates(search: SearchResults, path: Path) -> Path:
    """Draw each trial to a PNG as a line through its parameters to its value.

    Better trials are darker and on top. The best one has its own colour, and its values are written below the axes.
    """
    order = np.argsort(np.argsort(search.values, kind="stable")) / len(search.values)
    parameters, best = search.axes(order - 0.5), search.trials[search.best]
    found = [shorten(format_value(best.params[key]), 18) if key in best.params else "not set" for key in search.names]
    count = len(parameters)
    pitch = max(4.7 / count, min(1.9, 9.0 / count), 1.12)
    left, width, height = 0.65 + max(style.text_width(found[:1], 8, bold=True) / 2, 0.2), pitch * count, 3.1
    subtitle = _count_results(search) + (", the darker the better" if len(search.trials) > 1 else "")
    subtitle += f" · trials {search.beyond} are at the edge" if search.clipped.any() else ""
    size = (max(left + width + 1.1, 6.6), 1.25 + height + 0.65)
    with style.drawing(path, *size, "Trials, from parameters to result", subtitle) as figure:
        axes = style.add_axes(figure, left, 1.25, width, height)
        axes.set(xlim=(0, count), ylim=((UNSET if any(axis.has_unset for axis in parameters) else 0) - 0.03, 1.03))
        axes.set_axis_off()
        _draw_lines(axes, search, np.array([*(axis.places for axis in parameters), search.places]).T)
        for place, axis in enumerate(parameters):
            _draw_axis(axes, place, axis)
        _draw_value_bar(axes, search, count, width=0.15 / pitch)
        for place, text in enumerate([*found, search.text(best.value)]):
            at = (place, axes.get_ylim()[0])
            axes.annotate(text, at, (0, -16), **_label(RUST, weight="bold", ha="center"))
        axes.annotate("best", (0, 0), (-left * 72 + 18, -16), xycoords="axes fraction", **_label(RUST, weight="bold"))
    return path


def save_importances(importances: Mapping[str, float], path: Path) -> Path | None:
    """Draw each parameter's share of the total importance to a PNG, the largest on top; return None if the total is 0.

    Negative importances count as 0; those that are not finite are left out.
    """
    found = {key: max(value, 0.0) for key, value in importances.items() if math.isfinite(value)}
    total = sum(found.values())
    if not total:
        return None
    names, bars = short_names(list(found)), []
    for key in sorted(found, key=lambda key: -found[key]):
        share = found[key] / total
        text = f"{100 * share:.0f} %" if share >= 0.01 or not share else "< 1 %"
        bars.append((names[key], share, text, BLUE))
    subtitle = "share of the differences between the results of the trials"
    return style.save_bars(path, "Which parameters mattered", subtitle, bars)


def save_slices(search: SearchResults, path: Path) -> Path:
    """Draw the value over each parameter to a PNG, one panel per parameter."""
    spread = np.array([(trial.number * 0.6180339887) % 1 - 0.5 for trial in search.trials])  # golden ratio: no clumps
    panels = search.axes(spread)
    rows = math.ceil(len(panels) / 4)
    columns = math.ceil(len(panels) / rows)
    left, height, gap = 0.85, 1.9, 0.35
    width = max(2.2, 5.6 / columns - gap)
    turned = [sum(style.text_width([text], _TICK_SIZE) + 0.12 for _, text in axis.ticks) > width for axis in panels]
    deep = [0.55 * any(turned[start : start + columns]) for start in range(0, len(panels), columns)]
    tops = [1.25 + row * (height + 0.8) + sum(deep[:row]) for row in range(rows)]
    size = (max(left + columns * (width + gap), 6.6), tops[-1] + height + 0.45 + deep[-1])
    with style.drawing(path, *size, "Result by parameter", _count_results(search)) as figure:
        for number, panel in enumerate(panels):
            row, column = divmod(number, columns)
            axes = style.add_axes(figure, left + column * (width + gap), tops[row], width, height)
            _value_axis(axes, search, named=column == 0)
            _draw_points(axes, search, panel.places, size=float(np.clip(2200 / len(search.trials), 9, 26)))
            axes.set_xlim((UNSET if panel.has_unset else 0) - 0.06, 1.06)
            turn: dict[str, Any] = {"rotation": 30, "ha": "right"} if turned[number] else {}
            axes.set_xticks([place for place, _ in panel.ticks], [text for _, text in panel.ticks], **turn)
            axes.tick_params(axis="x", labelsize=_TICK_SIZE, labelcolor=MUTED)
            axes.set_title(panel.name, loc="left", size=9, weight="bold", pad=7)
            if number == 0:
                _legend(figure, axes)
    return path


def _summary(search: SearchResults) -> str:
    """Return a line with the number of trials, their states, epochs and time."""
    counts = Counter(trial.state for trial in search.tried)
    states = [f"{counts[state]:,} {state}" for state in get_args(State) if counts[state]]
    epochs = counted(sum(trial.epochs for trial in search.tried), "epoch")
    time = duration(sum(trial.seconds for trial in search.tried))
    return f"{counted(len(search.tried), 'trial')} · {', '.join(states)} · {epochs} in {time}"


def _direction(search: SearchResults) -> str:
    return f"{search.metric}, {'higher' if search.maximize else 'lower'} is better"


def _count_results(search: SearchResults) -> str:
    early = sum(trial.state == "stopped early" for trial in search.trials)
    text = f"{_direction(search)} · {counted(len(search.trials), 'trial')} with a result"
    return text + (f", {early:,} of them stopped early" if early else "")


def _label(colour: str, **more: Any) -> dict[str, Any]:
    """Return the settings of a text that is offset from its anchor in points, also outside the axes."""
    return {"textcoords": "offset points", "annotation_clip": False, "size": 8, "color": colour, **more}


def _value_axis(axes: Axes, search: SearchResults, *, below: float = 0.0, named: bool = True) -> None:
    """Scale the vertical axis, and leave a share ``below`` of its length free at the bottom."""
    span = search.high - search.low or abs(search.low) or 1.0
    low, high = search.low - 0.07 * span, search.high + 0.07 * span
    axes.set_ylim(low - below * (high - low) / (1 - below), high)
    ticks = search.ticks()
    axes.set_yticks([value for value, _ in ticks], [text if named else "" for _, text in ticks])
    style.value_grid(axes)


def _draw_points(axes: Axes, search: SearchResults, x: Floats, size: float) -> None:
    """Draw a dot per trial at ``x`` [N], hollow if stopped early, or an arrow for values outside the axis."""
    margin = 0.045 * (search.high - search.low)
    y = np.clip(search.values, search.low - margin, search.high + margin)
    best = "best: your values" if search.own == search.best else "best"
    names = np.array([trial.state for trial in search.trials], dtype=object)
    names[search.clipped] = search.beyond
    if search.own is not None and not search.clipped[search.own]:
        names[search.own] = "your values"
    names[search.best] = best
    arrow = "v" if search.maximize else "^"
    large, edge = 2 * max(size, 26), {"edgecolor": PAPER, "linewidth": 0.9}
    looks: dict[str, dict[str, Any]] = {
        "complete": {"s": size, "color": BLUE, "linewidth": 0, "alpha": 0.75 if len(y) < 60 else 0.5, "zorder": 3},
        "stopped early": {"s": size, "facecolor": PAPER, "edgecolor": BLUE, "linewidth": 0.8, "zorder": 2.5},
        search.beyond: {"s": size, "color": MUTED, "linewidth": 0, "marker": arrow, "zorder": 3},
        "your values": {"s": large / 1.5, "color": INK, "marker": "D", "zorder": 4, **edge},
        best: {"s": large, "color": RUST, "zorder": 5, **edge},
    }
    for name, look in looks.items():
        chosen = names == name
        if chosen.any():
            axes.scatter(x[chosen], y[chosen], label=name, **look)


def _name_own_and_best(axes: Axes, search: SearchResults) -> None:
    y = np.clip(search.values, search.low, search.high)
    names = {search.best: ("best", RUST)}
    if search.own is not None and search.own != search.best:
        names[search.own] = ("your values", INK)
        axes.axhline(y[search.own], color=INK, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1.5)
    low, high = axes.get_ylim()
    upwards = sorted(names, key=lambda index: y[index])
    heights = style.spread([(y[index] - low) / (high - low) for index in upwards], gap=0.16)
    for height, index in zip(heights, upwards, strict=True):
        name, colour = names[index]
        text = f"{name} {search.text(search.trials[index].value)}"
        note = "your values" if search.own == search.best else f"trial {search.trials[index].number}"
        look = _label(colour, xycoords="axes fraction", va="center_baseline")
        axes.annotate(text, (1, height), (8, 5), **{**look, "weight": "bold"})
        axes.annotate(note, (1, height), (8, -6), **{**look, "color": MUTED, "size": 7.5})


def _legend(figure: Figure, axes: Axes, without: Collection[str] = ()) -> None:
    """Draw a legend of ``axes`` in one line below the headline, with marks of equal size."""
    from matplotlib.collections import PathCollection

    marks = {name: mark for mark, name in zip(*axes.get_legend_handles_labels(), strict=True) if name not in without}
    width, height = figure.get_size_inches()
    spacing: dict[str, Any] = {"handlelength": 1.4, "handletextpad": 0.3, "columnspacing": 1.4, "borderpad": 0}
    legend = figure.legend(
        list(marks.values()), list(marks), loc="upper left", bbox_to_anchor=(0.25 / width, 1 - 0.74 / height),
        ncols=max(len(marks), 1), frameon=False, fontsize=8, labelcolor=MUTED, borderaxespad=0, **spacing,
    )  # fmt: skip
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([26])


def _colours(good: Floats) -> tuple[Floats, Floats]:
    """Return colours and their depth for results from the worst (0) to the best (1); good ones differ most."""
    from matplotlib.colors import LinearSegmentedColormap

    depth = np.asarray(good**2.5)
    return np.asarray(LinearSegmentedColormap.from_list("openmae", _SHADES)(depth)), depth


def _draw_lines(axes: Axes, search: SearchResults, places: Floats) -> None:
    """Draw a line per trial through ``places`` [N, axes], horizontal at each axis, with better trials on top."""
    from matplotlib.collections import LineCollection

    share = np.linspace(0, 1, 25)
    ease = share * share * (3 - 2 * share)
    x = (np.arange(places.shape[1] - 1)[:, None] + share).ravel()
    y = (places[:, :-1, None] + (places[:, 1:, None] - places[:, :-1, None]) * ease).reshape(len(places), -1)
    good = search.places if search.maximize else 1 - search.places
    order = np.argsort(good, kind="stable")
    paths = [np.stack([x, y[i]], axis=1) for i in order]
    (colours, depth), few = _colours(good[order]), min(1.0, 30 / len(paths))
    alpha = few + (1 - few) * (0.3 + 0.6 * depth**2)
    widths = 0.6 + 0.3 * few + (0.4 + 0.4 * few) * depth
    axes.add_collection(LineCollection(paths, colors=colours, linewidths=widths, alpha=alpha, zorder=2))
    for width, colour in ((4.4, PAPER), (2.4, RUST)):
        axes.plot(x, y[search.best], color=colour, linewidth=width, zorder=3, solid_capstyle="round", clip_on=False)


def _draw_axis(axes: Axes, place: int, axis: ParameterAxis) -> None:
    from matplotlib.patheffects import withStroke

    axes.plot([place, place], [0, 1], color=MUTED, linewidth=0.8, zorder=4, clip_on=False)
    halo = [withStroke(linewidth=2.6, foreground=PAPER, alpha=0.9)]
    for at, text in axis.ticks:
        axes.plot([place - 0.02, place], [at, at], color=MUTED, linewidth=0.8, zorder=4, clip_on=False)
        look = _label(INK if at != UNSET else MUTED, zorder=5, va="center_baseline", path_effects=halo)
        axes.annotate(text, (place, at), (5, 0), **{**look, "size": _TICK_SIZE})
    _name_axis(axes, place, axis.name)


def _name_axis(axes: Axes, place: int, name: str) -> None:
    """Write a key above an axis, wrapped after underscores and dots at about 14 characters."""
    lines = [""]
    for part in name.replace("_", "_\n").replace(".", ".\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > 14:
            lines.append("")
        lines[-1] += part
    axes.annotate("\n".join(lines), (place, 1), (0, 10), **_label(INK, weight="bold", ha="center", va="bottom"))


def _draw_value_bar(axes: Axes, search: SearchResults, place: int, width: float) -> None:
    """Draw the axis of the result, which is also the colour bar; ``width`` is relative to the distance between axes."""
    good = np.linspace(0, 1, 256)[:, None]
    colours, _ = _colours(good if search.maximize else 1 - good)
    extent, limits = (place, place + width, 0.0, 1.0), axes.get_ylim()
    axes.imshow(colours, origin="lower", extent=extent, aspect="auto", zorder=4, clip_on=False)
    axes.set(xlim=(0, place), ylim=limits)
    span = search.high - search.low
    for value, text in search.ticks():
        at = (value - search.low) / span if span else 0.5
        axes.annotate(text, (place + width, at), (4, 0), **_label(INK, va="center_baseline", zorder=5))
    _name_axis(axes, place, search.metric)
