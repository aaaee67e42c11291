"""Figures of a hyperparameter search: history, parallel coordinates, importances and slices."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openmae.results import style
from openmae.results.style import BLUE, INK, MUTED, PAPER, RUST
from openmae.results.trials import (
    UNSET,
    Floats,
    ParameterAxis,
    SearchResults,
    best_so_far,
    format_value,
    linear_ticks,
    read_axis,
    short_names,
    shorten,
    summarize_states,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_TICK_SIZE = 7.5  # points
# From light grey to dark blue with evenly falling lightness, so that the figure can be read in greyscale.
_SHADES = ("#d0d7df", "#9db9d8", "#5288c0", BLUE, "#143d6d")


def save_history(search: SearchResults, path: Path) -> Path:
    """Draw the value of each trial over its number, with the best value so far, to a PNG.

    Trials stopped early are hollow, failed ones are crosses at the bottom, and running ones are only counted. Values
    much worse than the others are arrows at the edge.
    """
    left, width, height = 0.85, 6.1, 3.0
    failed = [trial.number for trial in search.tried if trial.outcome == "failed"]
    numbers, count = [trial.number for trial in search.tried], len(search.tried)
    first, last = min(numbers), max(numbers)
    with style.drawing():
        figure = style.new_figure(left + width + 1.65, 1.15 + height + 0.6)
        style.headline(figure, "Search history", summarize_states(search.tried))
        axes = style.add_axes(figure, left, 1.15, width, height)
        _value_axis(axes, search, below=0.09 if failed else 0.0)
        steps = best_so_far(search.trials, search.maximize)
        line = [(trial.number, trial.value or 0.0) for trial in steps] + [(last, steps[-1].value or 0.0)]
        axes.step(*zip(*line, strict=True), where="post", color=RUST, linewidth=1.4, zorder=2, label="best so far")
        places = np.array([trial.number for trial in search.trials], dtype=np.float64)
        _draw_points(axes, search, places, size=float(np.clip(2200 / count, 9, 34)))
        if failed:
            look = {"s": np.clip(1500 / count, 8, 26), "color": INK, "linewidth": 1.1, "clip_on": False}
            at = axes.get_xaxis_transform()
            axes.scatter(failed, [0.035] * len(failed), marker="x", transform=at, label="failed", **look)
        _name_own_and_best(axes, search)
        span = max(last - first, 1)
        axes.set_xlim(first - 0.03 * span, last + 0.03 * span)
        ticks = linear_ticks(first, last, whole=True)
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axes.set_xlabel("trial")
        axes.set_ylabel(_direction(search))
        _legend(figure, axes, without=("best", "your values", "best: your values"))  # named next to the axes
        return style.save_figure(figure, path)


def save_parallel_coordinates(search: SearchResults, path: Path, log: Collection[str] = ()) -> Path | None:
    """Draw each trial to a PNG as a line through its parameters to its value; return None without parameters.

    Better trials are darker and on top. The best one has its own colour, and its values are written below the axes.
    The parameters in ``log`` have a logarithmic axis.
    """
    order = np.argsort(np.argsort(search.values, kind="stable")) / len(search.values)
    parameters = _parameter_axes(search, order - 0.5, log)
    if not parameters:
        return None
    count, best = len(parameters), search.trials[search.best]
    found = [shorten(format_value(best.params[key])) if key in best.params else "not set" for key in _keys(search)]
    pitch = max(4.7 / count, min(1.9, 9.0 / count), 1.12)
    left, width, height = 0.65 + max(style.text_width(found[:1], 8, bold=True) / 2, 0.2), pitch * count, 3.1
    subtitle = _count_results(search) + (", the darker the better" if len(search.trials) > 1 else "")
    subtitle += f" · trials {search.beyond} are at the edge" if search.clipped.any() else ""
    with style.drawing():
        figure = style.new_figure(max(left + width + 1.1, 6.6), 1.25 + height + 0.65)
        style.headline(figure, "Trials, from parameters to result", subtitle)
        axes = style.add_axes(figure, left, 1.25, width, height)
        axes.set(xlim=(0, count), ylim=(UNSET - 0.03 if any(map(_has_unset, parameters)) else -0.03, 1.03))
        axes.set_axis_off()
        colours = _colormap()
        _draw_lines(axes, search, np.array([*(axis.places for axis in parameters), search.places]).T, colours)
        for place, axis in enumerate(parameters):
            _draw_axis(axes, place, axis)
        _draw_value_bar(axes, search, colours, count, width=0.15 / pitch)
        for place, text in enumerate([*found, search.text(float(search.values[search.best]))]):
            at = (place, axes.get_ylim()[0])
            axes.annotate(text, at, (0, -16), **_label(RUST, weight="bold", ha="center"))
        axes.annotate("best", (0, 0), (-left * 72 + 18, -16), xycoords="axes fraction", **_label(RUST, weight="bold"))
        return style.save_figure(figure, path)


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


def save_slices(search: SearchResults, path: Path, log: Collection[str] = ()) -> Path | None:
    """Draw the value over each parameter to a PNG, one panel per parameter; return None without parameters.

    The parameters in ``log`` have a logarithmic axis.
    """
    spread = np.array([(trial.number * 0.6180339887) % 1 - 0.5 for trial in search.trials])  # golden ratio: no clumps
    panels = _parameter_axes(search, spread, log)
    if not panels:
        return None
    rows = math.ceil(len(panels) / 4)
    columns = math.ceil(len(panels) / rows)
    left, height, gap = 0.85, 1.9, 0.35
    width = max(2.2, 5.6 / columns - gap)
    lengths = [[style.text_width([text], _TICK_SIZE) for _, text in panel.ticks] for panel in panels]
    turned = [sum(texts) + 0.12 * len(texts) > width for texts in lengths]
    room = [max(texts) / 2 * turn for texts, turn in zip(lengths, turned, strict=True)]  # sin 30° = 1/2
    deepest = [max(room[start : start + columns]) for start in range(0, len(room), columns)]
    tops = [1.25 + row * (height + 0.8) + sum(deepest[:row]) for row in range(rows)]
    with style.drawing():
        figure = style.new_figure(max(left + columns * (width + gap), 6.6), tops[-1] + height + 0.45 + deepest[-1])
        style.headline(figure, "Result by parameter", _count_results(search))
        for number, panel in enumerate(panels):
            row, column = divmod(number, columns)
            axes = style.add_axes(figure, left + column * (width + gap), tops[row], width, height)
            _value_axis(axes, search, named=column == 0)
            _draw_points(axes, search, panel.places, size=float(np.clip(2200 / len(search.trials), 9, 26)))
            axes.set_xlim(UNSET - 0.06 if _has_unset(panel) else -0.06, 1.06)
            turn: dict[str, Any] = {"rotation": 30, "ha": "right"} if turned[number] else {}
            axes.set_xticks([place for place, _ in panel.ticks], [text for _, text in panel.ticks], **turn)
            axes.tick_params(axis="x", labelsize=_TICK_SIZE, labelcolor=MUTED)
            axes.set_title(panel.name, loc="left", size=9, weight="bold", pad=7)
            if number == 0:
                _legend(figure, axes)
        return style.save_figure(figure, path)


def _keys(search: SearchResults) -> list[str]:
    return list(dict.fromkeys(key for trial in search.trials for key in trial.params))


def _parameter_axes(search: SearchResults, spread: Floats, log: Collection[str]) -> list[ParameterAxis]:
    names = short_names(_keys(search))
    return [read_axis(key, name, search.trials, spread, log) for key, name in names.items()]


def _has_unset(axis: ParameterAxis) -> bool:
    return bool((axis.places == UNSET).any())


def _direction(search: SearchResults) -> str:
    return f"{search.metric}, {'higher' if search.maximize else 'lower'} is better"


def _count_results(search: SearchResults) -> str:
    early = sum(trial.state == "stopped early" for trial in search.trials)
    text = f"{_direction(search)} · {style.plural(len(search.trials), 'trial')} with a result"
    return text + (f", {early:,} of them stopped early" if early else "")


def _label(colour: str, **more: Any) -> dict[str, Any]:
    """Return the settings of a text that is offset from its anchor in points, also outside the axes."""
    return {"textcoords": "offset points", "annotation_clip": False, "size": 8, "color": colour, **more}


def _value_axis(axes: Axes, search: SearchResults, *, below: float = 0.0, named: bool = True) -> None:
    """Scale the vertical axis, and leave a share ``below`` of its length free at the bottom."""
    span = search.high - search.low or abs(search.low) or 1.0
    low, high = search.low - 0.07 * span, search.high + 0.07 * span
    axes.set_ylim(low - below * (high - low) / (1 - below), high)
    ticks = search.ticks(low, high)
    axes.set_yticks([value for value, _ in ticks], [text if named else "" for _, text in ticks])
    style.value_grid(axes)


def _draw_points(axes: Axes, search: SearchResults, x: Floats, size: float) -> None:
    """Draw a dot per trial at ``x`` [N], hollow if stopped early, or an arrow for values outside the axis."""
    margin = 0.045 * (search.high - search.low)
    y = np.clip(search.values, search.low - margin, search.high + margin)
    early = np.array([trial.state == "stopped early" for trial in search.trials])
    plain = ~search.clipped
    plain[[search.best, *([] if search.own is None else [search.own])]] = False
    hollow = {"facecolor": PAPER, "edgecolor": BLUE, "linewidth": 0.8, "zorder": 2.5}
    arrow = {"color": MUTED, "linewidth": 0, "marker": "v" if search.maximize else "^", "zorder": 3}
    filled = {"color": BLUE, "linewidth": 0, "alpha": 0.75 if len(y) < 60 else 0.5, "zorder": 3}
    for chosen, label, look in (
        (~early & plain, "complete", filled),
        (early & plain, "stopped early", hollow),
        (search.clipped, search.beyond, arrow),
    ):
        if chosen.any():
            axes.scatter(x[chosen], y[chosen], s=size, label=label, **look)  # type: ignore[arg-type]
    large = 2 * max(size, 26)
    edge: dict[str, Any] = {"edgecolor": PAPER, "linewidth": 0.9}
    best, own = search.best, search.own
    if own is not None and own != best and not search.clipped[own]:
        axes.scatter(x[own], y[own], marker="D", s=large / 1.5, color=INK, label="your values", zorder=4, **edge)
    label = "best: your values" if own == best else "best"
    axes.scatter(x[best], y[best], s=large, color=RUST, label=label, zorder=5, **edge)


def _name_own_and_best(axes: Axes, search: SearchResults) -> None:
    low, high = axes.get_ylim()
    best, own = search.best, search.own
    note = "your values" if own == best else f"trial {search.trials[best].number}"
    names = [(float(search.values[best]), best, RUST, "best", note)]
    if own is not None and own != best:
        shown = float(np.clip(search.values[own], search.low, search.high))
        names.append((shown, own, INK, "your values", f"trial {search.trials[own].number}"))
        axes.axhline(shown, color=INK, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1.5)
        names.sort(key=lambda name: (name[0], (name[1] == best) == search.maximize))
    heights = style.spread([(value - low) / (high - low) for value, *_ in names], gap=0.16)
    for height, (_, index, colour, name, note) in zip(heights, names, strict=True):
        look = _label(colour, xycoords="axes fraction", va="center_baseline")
        text = f"{name} {search.text(float(search.values[index]))}"
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


def _colormap() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("openmae", _SHADES)


def _shade(good: Floats) -> Floats:
    """Return places in the colormap for results from the worst (0) to the best (1); good ones differ most in shade."""
    return np.asarray(good**2.5)


def _draw_lines(axes: Axes, search: SearchResults, places: Floats, colours: Colormap) -> None:
    """Draw a line per trial through ``places`` [N, axes], horizontal at each axis, with better trials on top."""
    from matplotlib.collections import LineCollection

    share = np.linspace(0, 1, 25)
    ease = share * share * (3 - 2 * share)
    x = (np.arange(places.shape[1] - 1)[:, None] + share).ravel()
    y = (places[:, :-1, None] + (places[:, 1:, None] - places[:, :-1, None]) * ease).reshape(len(places), -1)
    good = search.places if search.maximize else 1 - search.places
    order = np.argsort(good, kind="stable")
    paths = [np.stack([x, y[i]], axis=1) for i in order]
    shade, few = _shade(good[order]), min(1.0, 30 / len(paths))
    alpha = few + (1 - few) * (0.3 + 0.6 * shade**2)
    widths = 0.6 + 0.3 * few + (0.4 + 0.4 * few) * shade
    axes.add_collection(LineCollection(paths, colors=colours(shade), linewidths=widths, alpha=alpha, zorder=2))
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


def _draw_value_bar(axes: Axes, search: SearchResults, colours: Colormap, place: int, width: float) -> None:
    """Draw the axis of the result, which is also the colour bar; ``width`` is relative to the distance between axes."""
    good = np.linspace(0, 1, 256)[:, None]
    shades = _shade(good if search.maximize else 1 - good)
    extent, limits = (place, place + width, 0.0, 1.0), axes.get_ylim()
    axes.imshow(colours(shades), origin="lower", extent=extent, aspect="auto", zorder=4, clip_on=False)
    axes.set(xlim=(0, place), ylim=limits)
    span = search.high - search.low
    for value, text in search.ticks(search.low, search.high):
        at = (value - search.low) / span if span else 0.5
        axes.annotate(text, (place + width, at), (4, 0), **_label(INK, va="center_baseline", zorder=5))
    _name_axis(axes, place, search.metric)
