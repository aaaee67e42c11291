"""Pictures of a run, each a PNG that can go into a paper or a README as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from openmae.results import style
from openmae.results.confusion import save_confusion_matrix
from openmae.results.curves import save_curves
from openmae.results.style import BLUE, EMPTY, GREY, INK, MUTED, PAPER
from openmae.storage.atomic import replacing

__all__ = ["reconstruction_grid", "save_bar_comparison", "save_confusion_matrix", "save_curves", "save_predictions"]

Pixels = NDArray[np.uint8]

_TITLES = ("original", "masked", "reconstruction", "with visible part")
_TILE = 224  # pixels that the longer side of an image is drawn with, at least about
_GAP, _GROUP_GAP, _MARGIN, _HEADER = 6, 40, 24, 34
_SHEET_COLUMNS, _SHEET_GAP, _CAPTION = 4, 24, 40  # of a contact sheet


def reconstruction_grid(original: Pixels, masked: Pixels, reconstructed: Pixels, pasted: Pixels, path: Path) -> Path:
    """Draw what a masked autoencoder saw and made of it, an image a row, and return ``path``.

    Args:
        original: [N, H, W, C] uint8 with C = 1, 3 or 4 (4: transparency is laid on white).
        masked: the visible part, the rest in grey; the same shape, as are the next two.
        reconstructed: the model's picture.
        pasted: the reconstruction with the visible part laid over it.
        path: the PNG to write.

    Rows are set in side-by-side groups, so that many images still make a picture wider than tall.
    Small images are enlarged by whole factors with hard edges: every pixel stays a pixel.

    Raises:
        ValueError: no images, or shapes or types that do not fit.
    """
    columns = (original, masked, reconstructed, pasted)
    shape = original.shape
    if len(shape) != 4 or shape[0] == 0 or shape[3] not in (1, 3, 4):
        raise ValueError(f"images must be [N, H, W, C] with N > 0 and C 1, 3 or 4; got {shape}")
    for title, images in zip(_TITLES, columns, strict=True):
        if images.shape != shape or images.dtype != np.uint8:
            raise ValueError(f"{title}: expected {shape} uint8, got {images.shape} {images.dtype}")
    count, height, width = shape[:3]
    tile_w, tile_h = _tile_size(width, height)
    rows = math.ceil(count / _groups(count, tile_w, tile_h))
    groups = math.ceil(count / rows)
    group_w = 4 * tile_w + 3 * _GAP
    size = (
        2 * _MARGIN + groups * group_w + (groups - 1) * _GROUP_GAP,
        2 * _MARGIN + _HEADER + rows * tile_h + (rows - 1) * _GAP,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), _font_for(tile_w)
    for group in range(groups):
        left = _MARGIN + group * (group_w + _GROUP_GAP)
        for column, (title, images) in enumerate(zip(_TITLES, columns, strict=True)):
            x = left + column * (tile_w + _GAP)
            draw.text((x + tile_w / 2, _MARGIN + 8), title, fill=INK, font=font, anchor="mm")
            for row, image in enumerate(images[group * rows : (group + 1) * rows]):
                tile = _to_rgb(image).resize((tile_w, tile_h), _resampling(width, tile_w))
                sheet.paste(tile, (x, _MARGIN + _HEADER + row * (tile_h + _GAP)))
    with replacing(Path(path)) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    return Path(path)


def save_predictions(images: Pixels, labels: Sequence[str], shares: Sequence[float], path: Path) -> Path:
    """Draw a contact sheet, a label and its probability below each image, and return ``path``.

    Args:
        images: [N, H, W, C] uint8 with C = 1, 3 or 4.
        labels: what each image was taken for.
        shares: the probability of the label, in [0, 1].
        path: the PNG to write.

    Raises:
        ValueError: no images, or a label or a probability for each is missing.
    """
    count = len(images)
    if count == 0 or len(labels) != count or len(shares) != count:
        raise ValueError(f"{count} images, {len(labels)} labels and {len(shares)} probabilities do not fit")
    tile_w, tile_h = _tile_size(images.shape[2], images.shape[1])
    columns = min(count, _SHEET_COLUMNS)
    rows = math.ceil(count / columns)
    pitch = tile_h + _CAPTION + _SHEET_GAP
    size = (2 * _MARGIN + columns * (tile_w + _SHEET_GAP) - _SHEET_GAP, 2 * _MARGIN + rows * pitch - _SHEET_GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw, font, quiet = ImageDraw.Draw(sheet), style.text_font(20, bold=True), style.text_font(18)
    for number, (image, label, share) in enumerate(zip(images, labels, shares, strict=True)):
        x, y = _MARGIN + number % columns * (tile_w + _SHEET_GAP), _MARGIN + number // columns * pitch
        tile = _to_rgb(image).resize((tile_w, tile_h), _resampling(images.shape[2], tile_w))
        sheet.paste(tile, (x, y))
        percent = f"{100 * share:.0f} %"
        room = tile_w - quiet.getlength(percent) - 8
        draw.text((x, y + tile_h + 8), _fitted(style.one_line(label), font, room), fill=INK, font=font)
        draw.text((x + tile_w, y + tile_h + 9), percent, fill=MUTED, font=quiet, anchor="ra")
    with replacing(Path(path)) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    return Path(path)


def _fitted(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """The text, cut so that it is at most ``room`` pixels wide."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text}…"


def _tile_size(width: int, height: int) -> tuple[int, int]:
    factor = _TILE / max(width, height)
    factor = round(factor) if factor >= 1.5 else min(factor, 1.0)
    return max(1, round(width * factor)), max(1, round(height * factor))


def _groups(count: int, tile_w: int, tile_h: int) -> int:
    """The fewest groups of columns that make the picture wider than tall."""
    groups = 1
    while math.ceil(count / groups) * tile_h > groups * 4 * tile_w:
        groups += 1
    return groups


def _font_for(tile_w: int) -> ImageFont.FreeTypeFont:
    """A font in which every title fits over its column."""
    longest = style.text_font(20).getlength(max(_TITLES, key=len))
    return style.text_font(max(7, min(20, int(20 * tile_w / longest))))


def _resampling(width: int, drawn: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if drawn >= width else Image.Resampling.LANCZOS


def _to_rgb(image: Pixels) -> Image.Image:
    if image.shape[2] == 1:
        return Image.fromarray(image[:, :, 0]).convert("RGB")
    if image.shape[2] == 3:
        return Image.fromarray(image)
    rgba = Image.fromarray(image)
    return Image.alpha_composite(Image.new("RGBA", rgba.size, PAPER), rgba).convert("RGB")


def save_bar_comparison(
    accuracies: Mapping[str, float],
    path: Path,
    *,
    title: str,
    subtitle: str = "",
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Draw accuracies as bars, the best one in colour, and return ``path``.

    Args:
        accuracies: label -> share in [0, 1], drawn from the top in this order.
        path: the PNG to write.
        title, subtitle: what is compared, and on what.
        notes: label -> a few quiet words beneath it, such as the time it took.

    Raises:
        ValueError: nothing to draw, or a value outside [0, 1].
    """
    if not accuracies:
        raise ValueError("there are no accuracies to draw")
    for label, value in accuracies.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{label}: an accuracy must lie in [0, 1], not {value}")
    best = max(accuracies.values())
    margin = 0.4 + max(style.text_width(accuracies, 10), style.text_width((notes or {}).values(), 8))
    pitch, top, bars = 0.62, 0.85, len(accuracies)
    with style.drawing():
        figure = style.new_figure(margin + 5.0, top + pitch * bars + 0.25)
        style.headline(figure, title, subtitle)
        axes = style.add_axes(figure, margin, top, 4.1, pitch * bars)
        axes.set(xlim=(0, 1), ylim=(bars - 0.5, -0.5))
        axes.spines[:].set_visible(False)
        axes.set(xticks=[], yticks=[])
        for row, (label, value) in enumerate(accuracies.items()):
            axes.barh(row, 1, height=0.52, color=EMPTY)
            axes.barh(row, value, height=0.52, color=BLUE if value == best else GREY)
            note = (notes or {}).get(label, "")
            axes.text(-0.03, row - (0.13 if note else 0), label, ha="right", va="center", size=10)
            axes.text(-0.03, row + 0.17, note, ha="right", va="center", size=8, color=MUTED)
            axes.text(1.03, row, f"{100 * value:.1f} %", va="center", size=11, weight="bold")
        return style.save_figure(figure, path)
