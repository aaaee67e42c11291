"""The pictures of a hyper-parameter search: history, parallel coordinates, importances and slices."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from openmae.results import style
from openmae.results.style import BLUE, HAIRLINE, INK, MUTED, PAPER, RUST
from openmae.results.trials import (
    UNSET,
    Axis,
    Floats,
    Search,
    Trial,
    best_so_far,
    best_trial,
    linear_ticks,
    outcome,
    read_axis,
    read_keys,
    read_search,
    short_names,
    summary,
    value_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_TICK_SIZE = 7.5  # of a slice, in points

__all__ = [
    "Trial",
    "best_trial",
    "save_history",
    "save_importances",
    "save_parallel_coordinates",
    "save_slices",
]


def save_history(trials: Sequence[Trial], path: Path, *, metric: str, maximize: bool) -> Path | None:
    """Draw each trial's value over its number, with the best so far, and return ``path``; None without a result.

    Trials stopped early are hollow, failed ones crosses along the bottom; running ones are only counted. Values far
    behind the others are arrows at the edge. Metrics named ``*acc*`` whose values are shares are written as percent.
    """
    search = read_search(trials, metric, maximize)
    if search is None:
        return None
    left, width, height = 0.85, 6.1, 3.0
    failed = [trial.number for trial in trials if outcome(trial) == "failed"]
    numbers = [trial.number for trial in trials]
    with style.drawing():
        figure = style.new_figure(left + width + 1.65, 1.15 + height + 0.6)
        style.headline(figure, "Search history", summary(trials))
        axes = style.add_axes(figure, left, 1.15, width, height)
        _value_axis(axes, search, below=0.09 if failed else 0.0)
        steps = best_so_far(trials, maximize)
        line_x = [*(trial.number for trial in steps), max(numbers)]
        line_y = [*(trial.value or 0.0 for trial in steps), steps[-1].value or 0.0]
        axes.step(line_x, line_y, where="post", color=RUST, linewidth=1.4, zorder=2, label="best so far")
        places = np.array([trial.number for trial in search.trials], dtype=np.float64)
        _draw_points(axes, search, places, size=float(np.clip(2200 / len(trials), 9, 34)))
        if failed:
            at = axes.get_xaxis_transform()
            dots = {"s": np.clip(1500 / len(trials), 8, 26), "color": INK, "linewidth": 1.1, "clip_on": False}
            axes.scatter(failed, [0.035] * len(failed), marker="x", transform=at, label="failed", **dots)
        _name_first_and_best(axes, search)
        span = max(max(numbers) - min(numbers), 1)
        axes.set_xlim(min(numbers) - 0.03 * span, max(numbers) + 0.03 * span)
        ticks = linear_ticks(min(numbers), max(numbers), whole=True)
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axes.set_xlabel("trial")
        axes.set_ylabel(search.better)
        _legend(figure, axes, without=("best", "your values", "best: your values"))  # named beside the axes
        return style.save_figure(figure, path)


def save_parallel_coordinates(
    trials: Sequence[Trial], path: Path, *, metric: str, maximize: bool, log: Collection[str] = frozenset()
) -> Path | None:
    """Draw each trial as a line across one axis a parameter to its value; None without a result or a parameter.

    Better trials are darker and lie on top; the best one is drawn in a colour of its own and its values are written
    beneath the axes. Numbers have an axis to scale, anything else one with a place a category.

    Args:
        trials: to draw; those without a result are left out.
        path: the PNG to write.
        metric: the value's name.
        maximize: whether higher is better.
        log: keys of the parameters with a logarithmic axis.
    """
    search = read_search(trials, metric, maximize)
    keys = read_keys(search.trials) if search else []
    if search is None or not keys:
        return None
    order = np.argsort(np.argsort(search.values, kind="stable")) / len(search.values)
    axes_of = [read_axis(key, name, search.trials, order - 0.5, log) for key, name in short_names(keys).items()]
    pitch = max(4.7 / len(keys), min(1.9, 9.0 / len(keys)), 1.12)
    best = search.trials[search.best]
    found = [value_text(best.params[key]) if key in best.params else "not set" for key in keys]
    left, width, height = 0.65 + max(style.text_width(found[:1], 8, bold=True) / 2, 0.2), pitch * len(keys), 3.1
    shades = ", the darker the better" if len(search.trials) > 1 else ""
    note = f" · trials {search.beyond} lie at the edge" if search.clipped.any() else ""
    with style.drawing():
        figure = style.new_figure(max(left + width + 1.1, 6.6), 1.25 + height + 0.65)
        style.headline(figure, "Trials, from parameters to result", _results(search) + shades + note)
        axes = style.add_axes(figure, left, 1.25, width, height)
        axes.set(xlim=(0, len(keys)), ylim=(UNSET - 0.03 if any(_unset(a) for a in axes_of) else -0.03, 1.03))
        axes.set_axis_off()
        colours = _shades()
        _draw_lines(axes, search, np.array([*(axis.places for axis in axes_of), search.places]).T, colours)
        for place, (text, axis) in enumerate(zip(found, axes_of, strict=True)):
            _draw_axis(axes, place, axis)
            _below(axes, place, text)
        _draw_value_bar(axes, search, colours, len(keys), width=0.15 / pitch)
        axes.annotate("best", (0, 0), (-left * 72 + 18, -16), xycoords="axes fraction", **_label(RUST, weight="bold"))
        return style.save_figure(figure, path)


def save_importances(importances: Mapping[str, float], path: Path) -> Path | None:
    """Draw how much each parameter mattered, largest on top, as shares of their sum; None where that is not positive.

    Args:
        importances: dotted key -> importance; not finite ones are left out, negative ones count as 0.
        path: the PNG to write.
    """
    found = {key: max(value, 0.0) for key, value in importances.items() if math.isfinite(value)}
    total = sum(found.values())
    if not total:
        return None
    names = short_names(list(found))
    ranked = sorted(found.items(), key=lambda item: -item[1])
    shares = [value / total for _, value in ranked]
    left = 0.4 + style.text_width(names.values(), 9)
    with style.drawing():
        figure = style.new_figure(max(left + 4.6, 5.6), 0.95 + 0.3 * len(ranked) + 0.2)
        style.headline(
            figure, "Which parameters mattered", "share of the differences between the results of the trials"
        )
        axes = style.add_axes(figure, left, 0.9, 3.5, 0.3 * len(ranked))
        rows = range(len(ranked))
        axes.barh(rows, shares, height=0.68, color=BLUE)
        axes.set(xlim=(0, max(shares)), ylim=(len(ranked) - 0.5, -0.5), xticks=[])
        axes.set_yticks(rows, [names[key] for key, _ in ranked])
        axes.spines[:].set_visible(False)
        axes.tick_params(left=False)
        for row, share in zip(rows, shares, strict=True):
            text = f"{100 * share:.0f} %" if share >= 0.01 or not share else "< 1 %"
            axes.annotate(text, (share, row), (5, 0), va="center_baseline", **_label(MUTED))
        return style.save_figure(figure, path)


def save_slices(
    trials: Sequence[Trial], path: Path, *, metric: str, maximize: bool, log: Collection[str] = frozenset()
) -> Path | None:
    """Draw the value over each parameter, a panel a parameter; None without a result or a parameter.

    Trials of one category are spread over its column by their numbers, always alike. Arguments are those of
    ``save_parallel_coordinates``.
    """
    search = read_search(trials, metric, maximize)
    keys = read_keys(search.trials) if search else []
    if search is None or not keys:
        return None
    golden = np.array([(trial.number * 0.6180339887) % 1 - 0.5 for trial in search.trials])
    panels = [read_axis(key, name, search.trials, golden, log) for key, name in short_names(keys).items()]
    lines = math.ceil(len(panels) / 4)
    columns = math.ceil(len(panels) / lines)
    left, height, gap = 0.85, 1.9, 0.35
    width = max(2.2, 5.6 / columns - gap)
    lengths = [[style.text_width([text], _TICK_SIZE) for _, text in panel.ticks] for panel in panels]
    turned = [sum(texts) + 0.12 * len(texts) > width for texts in lengths]
    room = [max(texts) / 2 * turn for texts, turn in zip(lengths, turned, strict=True)]  # the sine of 30 degrees
    deepest = [max(room[start : start + columns]) for start in range(0, len(room), columns)]
    tops = [1.25 + row * (height + 0.8) + sum(deepest[:row]) for row in range(lines)]
    with style.drawing():
        figure = style.new_figure(max(left + columns * (width + gap), 6.6), tops[-1] + height + 0.45 + deepest[-1])
        style.headline(figure, "Result by parameter", _results(search))
        for number, panel in enumerate(panels):
            row, column = divmod(number, columns)
            axes = style.add_axes(figure, left + column * (width + gap), tops[row], width, height)
            _value_axis(axes, search, named=column == 0)
            _draw_points(axes, search, panel.places, size=float(np.clip(2200 / len(search.trials), 9, 26)))
            axes.set_xlim(UNSET - 0.06 if _unset(panel) else -0.06, 1.06)
            axes.set_xticks([place for place, _ in panel.ticks], [text for _, text in panel.ticks])
            axes.tick_params(axis="x", labelsize=_TICK_SIZE, labelcolor=MUTED)
            if turned[number]:
                axes.tick_params(axis="x", labelrotation=30)
                for text in axes.get_xticklabels():
                    text.set_horizontalalignment("right")
            axes.set_title(panel.name, loc="left", size=9, weight="bold", pad=7)
            if number == 0:
                _legend(figure, axes)
        return style.save_figure(figure, path)


def _results(search: Search) -> str:
    """The line beneath a title: the metric, its direction and how many trials are shown."""
    early = sum(trial.state == "stopped early" for trial in search.trials)
    number = f"{len(search.trials):,} trial{'' if len(search.trials) == 1 else 's'} with a result"
    return f"{search.better} · {number}" + (f", {early:,} of them stopped early" if early else "")


def _label(colour: str, **more: Any) -> dict[str, Any]:
    """Settings of a text that is placed in points from what it names, outside the axes if need be."""
    return {"textcoords": "offset points", "annotation_clip": False, "size": 8, "color": colour, **more}


def _value_axis(axes: Axes, search: Search, *, below: float = 0.0, named: bool = True) -> None:
    """Scale and tick the vertical axis; ``below`` is the share of its length kept free for other marks."""
    span = search.high - search.low or abs(search.low) or 1.0
    low, high = search.low - 0.07 * span, search.high + 0.07 * span
    axes.set_ylim(low - below * (high - low) / (1 - below), high)
    ticks = search.ticks(low, high)
    axes.set_yticks([value for value, _ in ticks], [text if named else "" for _, text in ticks])
    axes.grid(axis="y", color=HAIRLINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.tick_params(axis="x", labelsize=8, labelcolor=MUTED)


def _draw_points(axes: Axes, search: Search, x: Floats, size: float) -> None:
    """A dot a trial at [N] places; hollow ones were stopped early, arrows lie beyond the axis."""
    margin = 0.045 * (search.high - search.low)
    y = np.clip(search.values, search.low - margin, search.high + margin)
    early = np.array([trial.state == "stopped early" for trial in search.trials])
    plain = ~search.clipped
    plain[[search.best, *([] if search.first is None else [search.first])]] = False
    arrow = "v" if search.maximize else "^"
    looks: tuple[tuple[NDArray[np.bool_], str, dict[str, Any]], ...] = (
        (~early & plain, "complete", {"color": BLUE, "linewidth": 0, "alpha": 0.75 if len(y) < 60 else 0.5}),
        (early & plain, "stopped early", {"facecolor": PAPER, "edgecolor": BLUE, "linewidth": 0.8, "zorder": 2.5}),
        (search.clipped, search.beyond, {"color": MUTED, "linewidth": 0, "marker": arrow}),
    )
    for chosen, label, look in looks:
        if chosen.any():
            axes.scatter(x[chosen], y[chosen], s=size, label=label, **{"zorder": 3, **look})
    large: dict[str, Any] = {"s": 2 * max(size, 26), "edgecolor": PAPER, "linewidth": 0.9}
    at, own = search.best, search.first
    if own is not None and own != at and not search.clipped[own]:
        axes.scatter(
            x[own], y[own], marker="D", color=INK, label="your values", zorder=4, **{**large, "s": large["s"] / 1.5}
        )
    axes.scatter(x[at], y[at], color=RUST, label="best: your values" if own == at else "best", zorder=5, **large)


def _name_first_and_best(axes: Axes, search: Search) -> None:
    """Write the best and the user's own value at the right, level with them, and apart from one another."""
    best, first = search.trials[search.best], search.first
    low, high = axes.get_ylim()
    names = [(search.values[search.best], RUST, "best", f"trial {best.number}")]
    if first == search.best:
        names = [(search.values[first], RUST, "best", "your values")]
    elif first is not None:
        own = float(search.values[first])
        names.append(
            (np.clip(own, search.low, search.high), INK, "your values", f"trial {search.trials[first].number}")
        )
        axes.axhline(names[1][0], color=INK, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1.5)
    heights = [(value - low) / (high - low) for value, *_ in names]
    if len(names) == 2 and (short := 0.16 - abs(heights[0] - heights[1])) > 0:
        up = 1 if search.maximize else -1
        heights = [heights[0] + up * short / 2, heights[1] - up * short / 2]
    values = [search.values[search.best], *([] if first is None else [search.values[first]])]
    for height, (_, colour, name, note), value in zip(heights, names, values, strict=False):
        texts = _label(colour, xycoords="axes fraction", va="center_baseline")
        axes.annotate(f"{name} {search.text(float(value))}", (1, height), (8, 5), **{**texts, "weight": "bold"})
        axes.annotate(note, (1, height), (8, -6), **{**texts, "color": MUTED, "size": 7.5})


def _legend(figure: Figure, axes: Axes, without: Collection[str] = ()) -> None:
    """Name the marks of ``axes`` in a line beneath the headline, each large enough to be told apart."""
    from matplotlib.collections import PathCollection

    marks = [(mark, name) for mark, name in zip(*axes.get_legend_handles_labels(), strict=True) if name not in without]
    width, height = figure.get_size_inches()
    spacing = {"handlelength": 1.4, "handletextpad": 0.3, "columnspacing": 1.4, "borderpad": 0, "borderaxespad": 0}
    legend = figure.legend(
        [mark for mark, _ in marks],
        [name for _, name in marks],
        loc="upper left",
        bbox_to_anchor=(0.25 / width, 1 - 0.74 / height),
        ncols=max(len(marks), 1),
        frameon=False,
        fontsize=8,
        labelcolor=MUTED,
        **spacing,
    )
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([26])


def _unset(axis: Axis) -> bool:
    return bool((axis.places == UNSET).any())


def _shades() -> Colormap:
    """From a light grey to a dark blue; its lightness falls evenly, so that it reads without colours too."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("openmae", ["#d0d7df", "#9db9d8", "#5288c0", BLUE, "#143d6d"])


def _shade(good: Floats) -> Floats:
    """The place in ``_shades`` of results from the worst, 0, to the best, 1.

    A search finds many good ones: most shades are left to telling these apart.
    """
    return np.asarray(good**2.5)


def _draw_lines(axes: Axes, search: Search, places: Floats, colours: Colormap) -> None:
    """A line a trial through [N, axes] places, bent so that it meets each axis level, the better the higher up."""
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


def _draw_axis(axes: Axes, place: int, axis: Axis) -> None:
    """A parameter's vertical axis with its name above; its ticks lie at the left, where none reads as a minus."""
    from matplotlib.patheffects import withStroke

    axes.plot([place, place], [0, 1], color=MUTED, linewidth=0.8, zorder=4, clip_on=False)
    for at, text in axis.ticks:
        axes.plot([place - 0.02, place], [at, at], color=MUTED, linewidth=0.8, zorder=4, clip_on=False)
        halo = [withStroke(linewidth=2.6, foreground=PAPER, alpha=0.9)]
        more = {"size": 7.5, "zorder": 5, "va": "center_baseline", "path_effects": halo}
        axes.annotate(text, (place, at), (5, 0), **{**_label(INK if at != UNSET else MUTED), **more})
    axes.annotate(_wrapped(axis.name), (place, 1), (0, 10), **_label(INK, weight="bold", ha="center", va="bottom"))


def _wrapped(name: str, most: int = 14) -> str:
    """A key in lines of about ``most`` characters, broken after an underscore or a point."""
    lines = [""]
    for part in name.replace("_", "_\n").replace(".", ".\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > most:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _below(axes: Axes, place: int, text: str) -> None:
    low = axes.get_ylim()[0]
    axes.annotate(text, (place, low), (0, -16), **_label(RUST, weight="bold", ha="center"))


def _draw_value_bar(axes: Axes, search: Search, colours: Colormap, place: int, width: float) -> None:
    """The result's axis, which is the colour bar too; ``width`` in distances between axes."""
    good = np.linspace(0, 1, 256)[:, None]
    shades = _shade(good if search.maximize else 1 - good)
    axes.imshow(
        colours(shades), origin="lower", extent=(place, place + width, 0, 1), aspect="auto", zorder=4, clip_on=False
    )
    axes.set(xlim=(0, place), ylim=axes.get_ylim())
    span = search.high - search.low
    for value, text in search.ticks(search.low, search.high):
        at = (value - search.low) / span if span else 0.5
        axes.annotate(text, (place + width, at), (4, 0), **_label(INK, va="center_baseline", zorder=5))
    axes.annotate(_wrapped(search.metric), (place, 1), (0, 10), **_label(INK, weight="bold", ha="center", va="bottom"))
    _below(axes, place, search.text(float(search.values[search.best])))
