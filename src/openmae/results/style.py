"""The style of OpenMAE's figures: palette, font, and helpers for drawing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ImageFont

from openmae.storage.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, HAIRLINE, EMPTY, PAPER = "#1c2127", "#69717d", "#dfe2e6", "#f3f4f6", "#ffffff"
BLUE, RUST, TEAL, PLUM, GREY = "#2160a6", "#c4532a", "#23857a", "#84529a", "#bcc2ca"
SERIES = (BLUE, RUST, TEAL, PLUM)
DPI = 200
# Matplotlib ships this font, so figures are the same on every machine and texts are as wide as the layout expects.
_FONT = "DejaVu Sans"
_MARGIN = 0.1  # inches, around content that extends beyond the figure
_SETTINGS: dict[Any, Any] = {
    "font.family": _FONT,
    "font.size": 9,
    "text.color": INK,
    "text.hinting": "none",
    "text.parse_math": False,  # a class may be called "$5 note"
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": PAPER,
    "savefig.dpi": DPI,
    **{f"{axis}tick.color": MUTED for axis in "xy"},
    **{f"{axis}tick.labelcolor": INK for axis in "xy"},
    **{f"{axis}tick.major.width": 0.6 for axis in "xy"},
    **{f"{axis}tick.major.size": 3 for axis in "xy"},
}


@contextmanager
def drawing(path: Path, width: float, height: float, title: str, subtitle: str = "") -> Iterator[Figure]:
    """Yield a figure of ``width`` x ``height`` inches with a headline, and write it as a PNG when the block ends.

    The figure is independent of pyplot. It is enlarged to include content beyond its edges.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), dpi=DPI)
        FigureCanvasAgg(figure)
        figure.text(0.25 / width, 1 - 0.2 / height, title, size=12, weight="bold", va="top")
        figure.text(0.25 / width, 1 - 0.45 / height, subtitle, size=9, color=MUTED, va="top")
        yield figure
        box = Bbox.union([figure.bbox_inches, figure.get_tightbbox().padded(_MARGIN)])
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", bbox_inches=box)


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes, with all lengths in inches, from the top left corner of the figure."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def save_bars(path: Path, title: str, subtitle: str, bars: Sequence[tuple[str, float, str, str]]) -> Path:
    """Draw horizontal bars to a PNG and return ``path``.

    ``bars`` are (name, length, text at the end, colour), from top to bottom.
    """
    names, lengths, texts, colours = zip(*bars, strict=True)
    left, top, width, height = max(1.35, 0.3 + text_width(names, 9)), 0.8, 4.0, 0.32 * len(bars)
    with drawing(path, left + width + 1.9, top + height + 0.2, title, subtitle) as figure:
        axes = add_axes(figure, left, top, width, height)
        axes.barh(range(len(bars)), lengths, height=0.62, color=colours)
        for row, (length, text) in enumerate(zip(lengths, texts, strict=True)):
            axes.text(length + 0.012 * max(lengths), row, text, va="center_baseline", size=8.5, color=MUTED)
        axes.set_yticks(range(len(bars)), names)
        axes.set(xlim=(0, max(*lengths, 1e-9)), ylim=(len(bars) - 0.5, -0.5), xticks=[])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="both", length=0)
    return path


def value_grid(axes: Axes) -> None:
    """Draw horizontal grid lines instead of the vertical axis."""
    axes.grid(axis="y", color=HAIRLINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", which="both", length=0, labelsize=8)
    axes.tick_params(axis="x", labelsize=8, labelcolor=MUTED)


def one_line(name: str) -> str:
    """Return a name on one line, with ``?`` for bytes that are not UTF-8."""
    return " ".join(name.encode("utf-8", "replace").decode("utf-8").split())


def shorten(text: str, length: int) -> str:
    """Cut the middle out of a text that is longer than ``length`` characters."""
    return text if len(text) <= length else f"{text[: length - 9]}…{text[-8:]}"


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights by as little as possible, so that they are at least ``gap`` apart."""
    clusters: list[list[float]] = []  # each is stacked around the mean of its heights
    for height in heights:
        cluster = [height]
        while clusters and _bottom(cluster, gap) - _bottom(clusters[-1], gap) < gap * len(clusters[-1]):
            cluster = clusters.pop() + cluster
        clusters.append(cluster)
    return [_bottom(cluster, gap) + gap * i for cluster in clusters for i in range(len(cluster))]


def _bottom(cluster: Sequence[float], gap: float) -> float:
    return sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def text_width(texts: Iterable[str], size: float, bold: bool = False) -> float:
    """Return the width of the widest text in inches, for a font size in points; 0 without texts."""
    font = text_font(100, bold)
    return max((font.getlength(line) for text in texts for line in text.split("\n")), default=0.0) / 100 * size / 72


@lru_cache
def text_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return the font of the figures for Pillow, with ``size`` in pixels."""
    from matplotlib.font_manager import FontProperties, findfont

    path = findfont(FontProperties(family=_FONT, weight="bold" if bold else "regular"))
    # Raqm, which not every Pillow has, spaces letters differently.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
