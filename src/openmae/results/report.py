"""Write ``report.html``: the results of an action on one self-contained page, without scripts or network requests."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from PIL import Image

from openmae._version import __version__
from openmae.storage import layout
from openmae.storage.atomic import write_atomically

_UNFINISHED = "openmae:unfinished"  # the name of a meta element in the first bytes of such a report
_HEAD = 2048

Cell = str | int | float | None


@dataclass(frozen=True)
class Text:
    """Plain paragraphs, separated by blank lines. A section of any kind with an empty title has no heading."""

    title: str
    text: str


@dataclass(frozen=True)
class Numbers:
    """The most important numbers in large type: label -> text, such as "93.4 %"."""

    title: str
    items: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table; without column names it has no header.

    Numbers are right-aligned. The floats of a column have equally many decimals: four up to 1, otherwise so many that
    the largest one has four significant digits.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A PNG file, embedded in the page. The caption is also its alternative text."""

    title: str
    path: Path
    caption: str


@dataclass(frozen=True)
class Code:
    """Preformatted text such as a spec; a long one is collapsed."""

    title: str
    text: str


Section = Text | Numbers | Table | Figure | Code


def write_report(
    folder: Path, title: str, sections: Sequence[Section], *, subtitle: str = "", unfinished: str = ""
) -> Path:
    """Write ``folder/report.html`` and return its path.

    All text is escaped, images are embedded as data URIs, and a content security policy forbids all requests.
    ``unfinished`` marks the report of a run that has not finished, and says how far it is.

    Raises:
        FileNotFoundError: an image file does not exist.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("openmae.results"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(columns=_format_columns, data_uri=_data_uri, paragraphs=_paragraphs, width=_width)
    now = datetime.now().astimezone()
    page = environment.get_template("report.html.j2").render(
        title=title,
        subtitle=subtitle,
        unfinished=unfinished,
        mark=_UNFINISHED,
        sections=[(type(section).__name__, section) for section in sections],
        version=__version__,
        date=f"{now.day} {now:%B %Y, %H:%M}",
        timestamp=now.isoformat(timespec="seconds"),
    )
    return write_atomically(folder / layout.REPORT, page)


def is_final(path: Path) -> bool:
    """Return whether a file is a report of a run that has finished."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _UNFINISHED.encode() not in file.read(_HEAD)


def _format_columns(table: Table) -> list[tuple[str, list[str]]]:
    """Return the CSS class ("number" or "") and the formatted cells of each column."""
    formatted = []
    for index in range(len(table.columns)):
        cells = [row[index] for row in table.rows]
        numeric = any(map(_is_number, cells)) and all(cell is None or _is_number(cell) for cell in cells)
        decimals = _decimals([cell for cell in cells if isinstance(cell, float)]) if numeric else None
        formatted.append(("number" if numeric else "", [_format_cell(cell, decimals) for cell in cells]))
    return formatted


def _decimals(values: Sequence[float]) -> int | None:
    """Return the number of decimals for a column; None if its values differ too much in magnitude."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    if not sizes or max(sizes) >= 1e9 or min(sizes) < max(sizes) / 1000 or max(sizes) < 1e-3:
        return None
    return max(0, 3 - math.floor(math.log10(max(sizes)))) if max(sizes) > 1 else 4


def _format_cell(value: Cell, decimals: int | None) -> str:
    if value is None or value == "":
        return "—"
    if isinstance(value, float):
        return f"{value:.4g}" if decimals is None else f"{value:,.{decimals}f}"
    return f"{value:,}" if _is_number(value) else str(value)


def _is_number(value: Cell) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _width(path: Path) -> int:
    """Return the width in CSS pixels (96 per inch) that gives text the same size in every figure."""
    with Image.open(path) as image:
        return round(image.width * 96 / float(image.info.get("dpi", (96, 96))[0]))
