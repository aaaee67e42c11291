"""Draw figures of a run that show images, and bar charts of accuracies, each as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from openmae.results import style
from openmae.results.style import BLUE, EMPTY, GREY, INK, MUTED, PAPER
from openmae.storage.atomic import replacing

Pixels = NDArray[np.uint8]

_TITLES = ("original", "masked", "prediction", "prediction with visible patches")
_TILE = 224  # approximate length of an image's longer side in pixels
_GAP, _GROUP_GAP, _MARGIN, _HEADER = 6, 40, 24, 34
_HATCH_PITCH, _HATCH_LINE = 10, 2  # pixels
_SHEET_COLUMNS, _SHEET_GAP, _CAPTION = 4, 24, 40  # contact sheet


def reconstruction_grid(original: Pixels, pasted: Pixels, visible: NDArray[np.bool_], path: Path) -> Path:
    """Draw the input and output of a masked autoencoder, one image per row, and return ``path``.

    Many rows are split into groups side by side. Small images are enlarged by integer factors without interpolation.
    Masked patches, and patches without a prediction, are hatched.

    Args:
        original: [N, H, W, C] with C = 1, 3 or 4 (RGBA is composited on white).
        pasted: the prediction with the visible patches pasted over it; same shape.
        visible: [N, H, W], the pixels that the encoder sees.
        path: PNG to write.
    """
    columns = ((original, None), (original, ~visible), (pasted, visible), (pasted, None))  # images, hatched pixels
    count, height, width = original.shape[:3]
    tile_w, tile_h = _tile_size(width, height)
    groups = 1
    while math.ceil(count / groups) * tile_h > groups * 4 * tile_w:
        groups += 1
    rows = math.ceil(count / groups)
    groups = math.ceil(count / rows)
    group_w = 4 * tile_w + 3 * _GAP
    sheet_w = groups * (group_w + _GROUP_GAP) - _GROUP_GAP + 2 * _MARGIN
    sheet_h = rows * (tile_h + _GAP) - _GAP + _HEADER + 2 * _MARGIN
    sheet = Image.new("RGB", (sheet_w, sheet_h), PAPER)
    draw = ImageDraw.Draw(sheet)
    longest = style.text_font(20).getlength(max(_TITLES, key=len))
    font = style.text_font(max(7, min(20, int(20 * tile_w / longest))))  # so that every title fits its column
    for group in range(groups):
        for column, (title, (images, hatched)) in enumerate(zip(_TITLES, columns, strict=True)):
            x = _MARGIN + group * (group_w + _GROUP_GAP) + column * (tile_w + _GAP)
            draw.text((x + tile_w / 2, _MARGIN + 8), title, fill=INK, font=font, anchor="mm")
            for row, number in enumerate(range(group * rows, min((group + 1) * rows, count))):
                tile = _tile(images[number], tile_w, tile_h)
                if hatched is not None:
                    _hatch(tile, hatched[number])
                sheet.paste(tile, (x, _MARGIN + _HEADER + row * (tile_h + _GAP)))
    return _save(sheet, path)


def reconstruction_strip(original: Pixels, pasted: Pixels, visible: NDArray[np.bool_], path: Path) -> Path:
    """Draw original, masked image and prediction with visible patches, one image per row, without text or gaps.

    The arguments are those of ``reconstruction_grid``. ``reconstruction_progress`` arranges such strips.
    """
    width, height = _tile_size(original.shape[2], original.shape[1])
    sheet = Image.new("RGB", (3 * width, len(original) * height), PAPER)
    for row in range(len(original)):
        tiles = [_tile(images[row], width, height) for images in (original, original, pasted)]
        _hatch(tiles[1], ~visible[row])
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (column * width, row * height))
    return _save(sheet, path)


def reconstruction_progress(strips: Mapping[int, Path], images: int, path: Path) -> Path:
    """Draw the reconstructions of the same ``images`` at several epochs, a column each, and return ``path``.

    Args:
        strips: files of ``reconstruction_strip`` by epoch, the first epoch first. The originals are those of the last
            one; strips of another size are left out.
        images: number of rows in a strip.
        path: PNG to write.
    """
    opened = {epoch: Image.open(strip).convert("RGB") for epoch, strip in strips.items()}
    newest = [*opened.values()][-1]
    width, height = newest.width // 3, newest.height // images
    columns = [("original", newest, 0), ("masked", newest, 1)]
    columns += [(f"epoch {epoch}", strip, 2) for epoch, strip in opened.items() if strip.size == newest.size]
    sheet_w, sheet_h = len(columns) * (width + _GAP) - _GAP, images * (height + _GAP) - _GAP
    sheet = Image.new("RGB", (sheet_w + 2 * _MARGIN, sheet_h + _HEADER + 2 * _MARGIN), PAPER)
    draw, font = ImageDraw.Draw(sheet), style.text_font(20)
    for column, (title, strip, part) in enumerate(columns):
        x = _MARGIN + column * (width + _GAP)
        draw.text((x + width / 2, _MARGIN + 8), title, fill=INK, font=font, anchor="mm")
        for row in range(images):
            tile = strip.crop((part * width, row * height, (part + 1) * width, (row + 1) * height))
            sheet.paste(tile, (x, _MARGIN + _HEADER + row * (height + _GAP)))
    return _save(sheet, path)


def save_predictions(images: Pixels, labels: Sequence[str], shares: Sequence[float], path: Path) -> Path:
    """Draw a contact sheet with the predicted label and its probability below each image, and return ``path``.

    ``images`` are [N, H, W, C] with C = 1, 3 or 4; ``shares`` are N probabilities in [0, 1].
    """
    tile_w, tile_h = _tile_size(images.shape[2], images.shape[1])
    columns = min(len(images), _SHEET_COLUMNS)
    rows = math.ceil(len(images) / columns)
    pitch = tile_h + _CAPTION + _SHEET_GAP
    size = (2 * _MARGIN + columns * (tile_w + _SHEET_GAP) - _SHEET_GAP, 2 * _MARGIN + rows * pitch - _SHEET_GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw, font, quiet = ImageDraw.Draw(sheet), style.text_font(20, bold=True), style.text_font(18)
    for number, (image, label, share) in enumerate(zip(images, labels, shares, strict=True)):
        x, y = _MARGIN + number % columns * (tile_w + _SHEET_GAP), _MARGIN + number // columns * pitch
        sheet.paste(_tile(image, tile_w, tile_h), (x, y))
        percent = f"{100 * share:.0f} %"
        room = tile_w - quiet.getlength(percent) - 8
        draw.text((x, y + tile_h + 8), _fit(style.one_line(label), font, room), fill=INK, font=font)
        draw.text((x + tile_w, y + tile_h + 9), percent, fill=MUTED, font=quiet, anchor="ra")
    return _save(sheet, path)


def _save(sheet: Image.Image, path: Path) -> Path:
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    return path


def _fit(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text}…"


def _tile_size(width: int, height: int) -> tuple[int, int]:
    factor = _TILE / max(width, height)
    factor = round(factor) if factor >= 1.5 else min(factor, 1.0)
    return max(1, round(width * factor)), max(1, round(height * factor))


def _tile(pixels: Pixels, width: int, height: int) -> Image.Image:
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, PAPER), image)
    method = Image.Resampling.NEAREST if width >= image.width else Image.Resampling.LANCZOS
    return image.convert("RGB").resize((width, height), method)


def _hatch(tile: Image.Image, where: NDArray[np.bool_]) -> None:
    """Cover a part of a tile with diagonal lines; ``where`` is bool in the size of the image before scaling."""
    y, x = np.indices((tile.height, tile.width))
    lines = Image.fromarray((x + y) % _HATCH_PITCH < _HATCH_LINE)
    hatching = Image.new("RGB", tile.size, EMPTY)
    hatching.paste(GREY, (0, 0), lines)
    tile.paste(hatching, (0, 0), Image.fromarray(where).resize(tile.size, Image.Resampling.NEAREST))


def save_bar_comparison(
    accuracies: Mapping[str, float], path: Path, *, title: str, subtitle: str, notes: Mapping[str, str]
) -> Path:
    """Draw accuracies in [0, 1] by label as horizontal bars, the best one in colour, and return ``path``.

    ``notes`` maps each label to a few words below it, such as a time.
    """
    best = max(accuracies.values())
    margin = 0.4 + max(style.text_width(accuracies, 10), style.text_width(notes.values(), 8))
    pitch, top, bars = 0.62, 0.85, len(accuracies)
    with style.drawing(path, margin + 5.0, top + pitch * bars + 0.25, title, subtitle) as figure:
        axes = style.add_axes(figure, margin, top, 4.1, pitch * bars)
        axes.set(xlim=(0, 1), ylim=(bars - 0.5, -0.5), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        for row, (label, value) in enumerate(accuracies.items()):
            axes.barh(row, 1, height=0.52, color=EMPTY)
            axes.barh(row, value, height=0.52, color=BLUE if value == best else GREY)
            axes.text(-0.03, row - 0.13, label, ha="right", va="center", size=10)
            axes.text(-0.03, row + 0.17, notes[label], ha="right", va="center", size=8, color=MUTED)
            axes.text(1.03, row, f"{100 * value:.1f} %", va="center", size=11, weight="bold")
    return path
