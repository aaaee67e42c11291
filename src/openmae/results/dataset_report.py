"""Draw the figure of a data set: images per class, image sizes, file sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal

from openmae.results import style
from openmae.results.style import BLUE, EMPTY, GREY, HAIRLINE, MUTED, RUST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_BARS = 24  # more classes are drawn as one curve
_POINTS = 4000  # images in the scatter plot
_LEFT, _TOP, _WIDTH, _HEIGHT, _GAP = 0.7, 1.0, 3.0, 2.6, 0.85  # in inches


def save_dataset_figure(
    path: Path,
    *,
    name: str,
    summary: str,
    class_counts: Mapping[str, int],
    sizes: NDArray[np.int64],
    file_sizes: NDArray[np.int64],
) -> Path:
    """Draw images per class, image sizes and file sizes side by side, and return ``path``.

    Up to 24 classes have a bar each, the largest on top; more are drawn as one curve by rank. The scatter plot of sizes
    shows at most 4,000 images. ``name`` and ``summary`` are the headline. ``class_counts`` is empty without labels;
    ``sizes`` [N, 2] are width and height in pixels, and ``file_sizes`` [N] are in bytes.
    """
    names = [style.shorten(style.one_line(label), 26) for label in class_counts]
    bars = 0 < len(names) <= _MAX_BARS
    room = 0.08 + style.text_width(names, 9) if bars else 0.0
    tall = 0.26 * len(names) if bars else _HEIGHT
    height = max(_HEIGHT, tall)
    panels = (len(class_counts) > 0) + 2
    left = max(_LEFT, 0.25 + room)
    total = left + panels * _WIDTH + (panels - 1) * _GAP + 0.35
    title, most = style.one_line(name), int(total * 9)
    title = title if len(title) <= most else f"…{title[1 - most :]}"
    with style.drawing(path, total, _TOP + height + 0.6, title, summary) as figure:
        if class_counts:
            axes = _panel(figure, left, tall, "Images per class")
            (_draw_bars if bars else _draw_ranks)(axes, names, np.array(list(class_counts.values())))
            left += _WIDTH + _GAP
        axes = _panel(figure, left, height, "Image sizes")
        if len(sizes):
            _draw_sizes(axes, sizes)
            _draw_file_sizes(_panel(figure, left + _WIDTH + _GAP, height, "File sizes"), file_sizes)
        else:
            axes.set_axis_off()
            axes.text(0, 1, "no readable image", transform=axes.transAxes, va="top", color=MUTED)
    return path


def _panel(figure: Figure, left: float, height: float, title: str) -> Axes:
    axes = style.add_axes(figure, left, _TOP, _WIDTH, height)
    axes.set_title(title, loc="left", size=9, weight="bold", pad=8)
    return axes


def _draw_bars(axes: Axes, names: list[str], counts: NDArray[np.int64]) -> None:
    order = np.argsort(-counts, kind="stable")
    rows = np.arange(len(order))
    largest = max(int(counts.max()), 1)
    axes.barh(rows, counts[order], height=0.72, color=[BLUE if counts[i] else EMPTY for i in order])
    axes.set(xlim=(0, largest * 1.16), ylim=(len(order) - 0.4, -0.6), xticks=[])
    axes.set_yticks(rows, [names[i] for i in order])
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False)
    for row, i in enumerate(order):
        colour = MUTED if counts[i] else RUST
        axes.text(counts[i] + largest * 0.02, row, f"{counts[i]:,}", va="center", size=8, color=colour)


def _draw_ranks(axes: Axes, names: list[str], counts: NDArray[np.int64]) -> None:
    ranked = np.sort(counts)[::-1]
    axes.fill_between(np.arange(1, len(ranked) + 1), ranked, color=BLUE, alpha=0.16, linewidth=0, step="mid")
    axes.step(np.arange(1, len(ranked) + 1), ranked, color=BLUE, linewidth=1.2, where="mid")
    axes.set(xlim=(1, len(ranked)), ylim=(0, ranked[0] * 1.1))
    axes.set_xlabel(f"{len(names):,} classes by size")
    _thousands(axes.yaxis)
    middle = float(np.median(ranked))
    axes.axhline(middle, color=MUTED, linewidth=0.6, linestyle=(0, (3, 3)))
    _note(axes, f"{ranked[-1]:,} to {ranked[0]:,}, median {middle:,.0f}")


def _draw_sizes(axes: Axes, sizes: NDArray[np.int64]) -> None:
    chosen = np.linspace(0, len(sizes) - 1, min(_POINTS, len(sizes))).round().astype(int)
    places, counts = np.unique(sizes[chosen], axis=0, return_counts=True)
    area = 6 + np.minimum(60, 300 * counts / len(chosen))  # larger points for frequent sizes
    axes.grid(color=HAIRLINE, linewidth=0.5)
    axes.set_axisbelow(True)
    least, most = int(sizes.min()), int(sizes.max())
    limits = (0.0, most * 1.1)
    if most > 12 * least:
        axes.set(xscale="log", yscale="log")
        limits = (least / 1.4, most * 1.4)
    axes.plot(limits, limits, color=GREY, linewidth=0.8, zorder=1)
    axes.scatter(
        places[:, 0], places[:, 1], s=area, color=BLUE, alpha=0.35 if len(places) > 30 else 0.7, linewidth=0, zorder=2
    )
    axes.set(xlim=limits, ylim=limits, xlabel="width in pixels", ylabel="height in pixels")
    for axis in (axes.xaxis, axes.yaxis):
        _thousands(axis)


def _draw_file_sizes(axes: Axes, file_sizes: NDArray[np.int64]) -> None:
    kilobytes = np.maximum(file_sizes, 1) / 1e3
    low, high, middle = float(kilobytes.min()), float(kilobytes.max()), float(np.median(kilobytes))
    bins = int(np.clip(2 * np.sqrt(len(kilobytes)), 6, 32)) + 1
    wide = high > 12 * low
    edges = np.geomspace(low / 1.02, high * 1.02, bins) if wide else np.linspace(low * 0.98, high * 1.02, bins)
    axes.hist(kilobytes, bins=edges.tolist(), color=BLUE, linewidth=0)
    axes.set(xscale="log" if wide else "linear", xlabel="kilobytes", ylabel="images")
    _thousands(axes.xaxis)
    _thousands(axes.yaxis, whole=True)
    axes.axvline(middle, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
    _note(axes, f"median {decimal(int(1e3 * middle))}, total {decimal(int(file_sizes.sum()))}")


def _note(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="right", size=8, color=MUTED, pad=8)


def _thousands(axis: Any, whole: bool = False) -> None:
    """Use few ticks, labelled as 1,000 rather than 10^3."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = axis.get_view_interval()
    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5), numticks=6))
        axis.set_minor_formatter("")
    else:
        axis.set_major_locator(MaxNLocator(5, integer=high >= 3 or whole))
    axis.set_major_formatter("{x:,g}")
