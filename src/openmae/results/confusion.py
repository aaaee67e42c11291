"""Draw the confusion matrix of a classifier with 2 to 1000 classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from openmae.results import style
from openmae.results.style import BLUE, EMPTY, HAIRLINE, INK, MUTED, PAPER, RUST
from openmae.storage.printable import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Counts = NDArray[Any]

_COUNTS_UP_TO = 15  # classes with a number in each cell
_NAMES_UP_TO = 60  # classes with a name at each row and column
_CELLS_UP_TO = 250  # classes with one cell each
_MISTAKES = 20  # most frequent mistakes listed next to the matrix


def save_confusion_matrix(matrix: Counts, class_names: Sequence[str], path: Path) -> Path:
    """Draw a confusion matrix and return ``path``.

    The colour is the share of the true class: blue on the diagonal, and rust for mistakes, on a square-root scale that
    makes rare ones visible. With up to 15 classes, each cell has its count; with up to 60, each row has its name and
    accuracy; from 16, the most frequent mistakes are listed; from 251, adjacent classes share a cell, which shows its
    largest mistake.

    ``matrix`` has counts [K, K]; rows are true classes, columns predicted ones.
    """
    classes = len(class_names)
    names = [style.shorten(style.one_line(name), 24) for name in class_names]
    named, listed = classes <= _NAMES_UP_TO, classes > _COUNTS_UP_TO
    side = _side_inches(classes)
    room = style.text_width(names, _name_size(classes)) if named else 0.3  # for the names along an axis, in inches
    flat = named and room + 0.06 < side / classes
    left, top = 0.7 + room, 1.0
    bottom = 0.5 + (0.2 if flat or not named else room)
    total = matrix.sum()
    share = f"{100 * np.trace(matrix) / total:.1f} % correct" if total else "no images"
    subtitle = f"{classes:,} classes · {total:,} images · {share}"
    width = max(left + side + (4.0 if listed else 0.75), 3.6)
    with style.drawing(path, width, top + side + bottom, "Confusion matrix", subtitle) as figure:
        axes = style.add_axes(figure, left, top, side, side)
        _draw_cells(axes, matrix)
        axes.set_xlabel("predicted class", labelpad=6)
        axes.set_ylabel("true class", labelpad=6)
        if named:
            _name_classes(axes, matrix, names, flat)
        if not listed:
            _write_counts(axes, matrix)
        else:
            _list_mistakes(figure, matrix, names, left + side + (0.85 if named else 0.4), top)
    return path


def _side_inches(classes: int) -> float:
    """Return the side of the matrix, with room for counts, else for names, else with an integer of pixels per cell."""
    if classes <= _COUNTS_UP_TO:
        return classes * max(0.38, 0.62 - 0.03 * max(0, classes - 6))
    if classes <= _NAMES_UP_TO:
        return classes * max(0.15, 5.4 / classes)
    cells = min(classes, _CELLS_UP_TO)
    return cells * (1500 // cells) / style.DPI


def _shares(matrix: Counts) -> NDArray[np.float64]:
    """Return each count as a share of its true class; 0 for a class without images."""
    return np.asarray(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1), dtype=np.float64)


def _depths(matrix: Counts) -> NDArray[np.float64]:
    shares = _shares(matrix)
    right = np.diag(shares)
    depth = np.sqrt(shares)
    np.fill_diagonal(depth, 0)
    pool = -(-len(matrix) // _CELLS_UP_TO)
    if pool > 1:
        cells = -(-len(matrix) // pool)
        padded = np.pad(depth, (0, cells * pool - len(matrix)))
        depth = padded.reshape(cells, pool, cells, pool).max(axis=(1, 3))
        right = np.array([part.mean() for part in np.split(right, range(pool, len(right), pool))])
    np.fill_diagonal(depth, right)
    return depth


def _draw_cells(axes: Axes, matrix: Counts) -> None:
    from matplotlib.colors import to_rgb

    classes, depth = len(matrix), _depths(matrix)
    hue = np.full((*depth.shape, 3), to_rgb(RUST))
    hue[np.diag_indices(len(depth))] = to_rgb(BLUE)
    named, edge = classes <= _NAMES_UP_TO, classes - 0.5
    ground = np.array(to_rgb(EMPTY if named else PAPER))
    pixels, extent = ground + (hue - ground) * depth[:, :, None], (-0.5, edge, edge, -0.5)
    axes.imshow(pixels, interpolation="nearest", aspect="auto", extent=extent)
    axes.spines[:].set_visible(not named)
    axes.spines[:].set_color(HAIRLINE)
    axes.tick_params(labelsize=8)
    if named:
        width = 1.2 if classes <= _COUNTS_UP_TO else 0.5
        axes.hlines(np.arange(0.5, edge), -0.5, edge, color=PAPER, linewidth=width)
        axes.vlines(np.arange(0.5, edge), -0.5, edge, color=PAPER, linewidth=width)
    axes.set(xlim=(-0.5, edge), ylim=(edge, -0.5))


def _write_counts(axes: Axes, matrix: Counts) -> None:
    depth, largest = _depths(matrix), matrix.max()
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            text = f"{count / 1000:.3g}k" if largest >= 10_000 and count >= 1000 else f"{count:,}"
            colour = PAPER if depth[row, column] > 0.5 else INK
            size = 8.5 if largest < 1000 else 7
            axes.text(column, row, text, ha="center", va="center_baseline", size=size, color=colour)


def _name_size(classes: int) -> int:
    return 8 if classes <= 30 else 7


def _name_classes(axes: Axes, matrix: Counts, names: Sequence[str], flat: bool) -> None:
    size, end = _name_size(len(names)), len(names) - 0.5
    axes.tick_params(length=0, labelsize=size)
    axes.set_xticks(range(len(names)), names, rotation=0 if flat else 90)
    axes.set_yticks(range(len(names)), names)
    look: dict[str, Any] = {"color": MUTED, "size": size - 0.5, "textcoords": "offset points", "annotation_clip": False}
    axes.annotate("correct", (end, -0.5), xytext=(6, 5), va="bottom", **look)
    for row, (share, total) in enumerate(zip(np.diag(_shares(matrix)), matrix.sum(axis=1), strict=True)):
        text = f"{100 * share:.0f} %" if total else "no images"
        axes.annotate(text, (end, row), xytext=(6, 0), va="center_baseline", **look)


def _list_mistakes(figure: Figure, matrix: Counts, names: Sequence[str], left: float, top: float) -> None:
    """Write the most frequent mistakes as lines of text, starting at ``left`` and ``top`` in inches."""
    mistakes = matrix.copy()
    np.fill_diagonal(mistakes, 0)
    width, height = figure.get_size_inches()
    pitch = 0.36
    lines = min(_MISTAKES, int((height - top - 0.6) / pitch))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:lines]
    pairs = [divmod(int(index), len(names)) for index in order if mistakes.flat[index]]

    def write(text: str, y: float, **kwargs: Any) -> None:
        figure.text(left / width, 1 - y / height, text, va="top", **kwargs)

    write("Most frequent mistakes" if pairs else "No mistakes", top, size=9, weight="bold")
    write("true → predicted" if pairs else "", top + 0.19, size=8, color=MUTED)
    shares = _shares(matrix)
    for line, (true, predicted) in enumerate(pairs):
        y = top + 0.52 + pitch * line
        images = counted(mistakes[true, predicted], "image")
        write(f"{names[true]} → {names[predicted]}", y, size=8.5)
        write(f"{images}, {100 * shares[true, predicted]:.0f} % of the class", y + 0.15, size=7.5, color=MUTED)
