"""How OpenMAE's pictures look: one palette, one typeface, and nothing that is not data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ImageFont

from openmae.results.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, HAIRLINE, EMPTY, PAPER = "#1c2127", "#69717d", "#dfe2e6", "#f3f4f6", "#ffffff"
BLUE, RUST, TEAL, PLUM, GREY = "#2160a6", "#c4532a", "#23857a", "#84529a", "#bcc2ca"
SERIES = (BLUE, RUST, TEAL, PLUM)
DPI = 200
_FONTS = ["Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"]


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in OpenMAE's style; matplotlib's settings outside stay as they were."""
    import matplotlib

    settings: dict[Any, Any] = {
        "font.family": ["sans-serif", "DejaVu Sans"],  # the second one lends glyphs that the first lacks
        "font.sans-serif": _FONTS,
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
    """Write the figure as a PNG, whole or not at all, and return the path."""
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def text_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return the pictures' typeface for Pillow, ``size`` in pixels."""
    from matplotlib.font_manager import FontProperties, findfont

    weight = "bold" if bold else "regular"
    with drawing():
        return ImageFont.truetype(findfont(FontProperties(family="sans-serif", weight=weight)), size)
