"""How OpenMAE's pictures look: one palette, one typeface, and nothing that is not data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
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
# Matplotlib's own, so that a picture is the same on every machine, and a text is as wide as where it was laid out.
_FONT = "DejaVu Sans"
_MARGIN = 0.1  # in inches, beside what reaches beyond the figure


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in OpenMAE's style; matplotlib's settings outside stay as they were."""
    import matplotlib

    settings: dict[Any, Any] = {
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
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "figure.facecolor": PAPER,
        "savefig.dpi": DPI,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A name in a script that no installed font covers is drawn as boxes; that is no news to the user.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` x ``height`` inches, outside pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes placed in inches, measured from the figure's top left corner."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def headline(figure: Figure, title: str, subtitle: str = "", left: float = 0.25) -> None:
    """Write a title and a quieter second line at the figure's top left corner (``left`` in inches)."""
    w, h = figure.get_size_inches()
    figure.text(left / w, 1 - 0.2 / h, title, size=12, weight="bold", va="top")
    figure.text(left / w, 1 - 0.45 / h, subtitle, size=9, color=MUTED, va="top")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG, whole or not at all, and return the path; it grows by what would be cut off."""
    from matplotlib.transforms import Bbox

    path = Path(path)
    drawn = figure.get_tightbbox()
    (width, height), box = figure.get_size_inches(), None
    if drawn.x0 < 0 or drawn.y0 < 0 or drawn.x1 > width or drawn.y1 > height:
        (left, bottom), (right, top) = drawn.min, drawn.max
        box = Bbox.from_extents(
            min(0, left - _MARGIN), min(0, bottom - _MARGIN), max(width, right + _MARGIN), max(height, top + _MARGIN)
        )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches=box)
    return path


def one_line(name: str) -> str:
    """Return the name of a class or file as it can be drawn: on one line, ``?`` for bytes that are not text."""
    return " ".join(name.encode("utf-8", "replace").decode("utf-8").split())


def text_width(texts: Iterable[str], size: float, bold: bool = False) -> float:
    """Return the width of the widest text in inches, for ``size`` in points; 0 without a text."""
    font = text_font(100, bold)
    return max((font.getlength(line) for text in texts for line in text.split("\n")), default=0.0) / 100 * size / 72


@lru_cache
def text_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return the pictures' typeface for Pillow, ``size`` in pixels."""
    from matplotlib.font_manager import FontProperties, findfont

    path = findfont(FontProperties(family=_FONT, weight="bold" if bold else "regular"))
    # the other layout engine, which not every Pillow has, spaces letters differently
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
