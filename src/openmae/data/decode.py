"""The pixels of one image, the same for every reader: folders, shards, packing, inference and serving.

Pixels are decoded once, cropped and scaled as early as the file format allows, and stay 8-bit unless the file has more.
"""

from __future__ import annotations

import io
import logging
import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from openmae.data.formats import READ_FORMATS, SIGNATURE_BYTES, recognise, why_not_read
from openmae.data.pillow_warnings import collected
from openmae.data.tiff import count_pages, deep_pixels, depth_of
from openmae.inputs import open_regular

MAX_MEGAPIXELS = 179  # Pillow's own limit
MAX_KEY = "dataset.max_megapixels"

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the upright image
Size = tuple[int, int]  # height, width
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]

_PIXEL_BYTES, _OTHER_BYTES = 16, 1 << 26  # of a file: four channels of 32 bits, and texts and profiles
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")

logging.getLogger("PIL").addHandler(logging.NullHandler())  # or every process would print its errors
_MEANT = {  # what Pillow says, and what that means for the file
    "not identified by this driver": "its header is damaged",
    "unknown pixel mode": "its combination of bits, sample format and colour space is not supported; save it as 8-bit "
    "grey or RGB, or as unsigned 16-bit grey",
}
_OBJECT = re.compile(r"<[^<>]* object at 0x[0-9a-f]+>")


class CorruptImage(Exception):  # noqa: N818  (what it is, rather than what went wrong)
    """An image file that cannot be decoded: ``path`` and ``reason``."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class NotAnImage(CorruptImage):
    """A file whose content is of no format that is read."""


class TooManyPixels(CorruptImage):
    """An image with more pixels than are allowed: ``got`` says how many it has."""

    def __init__(self, path: Path, got: str, max_pixels: int) -> None:
        limit = f"{MAX_KEY}={max_pixels / 1e6:g}"
        super().__init__(path, f"it has {got} pixels, more than {limit} allows")
        self.args = (path, got, max_pixels)
        self.got = got


class Picture:
    """An image file with its header read: the upright size is known, pixels are decoded on request.

    Use it as a context manager, so that the file is closed.

    Args:
        path: of the file, or the name of ``content``.
        content: an open file to be read in place of ``path``; it is closed with the picture.
        max_pixels: the largest width x height.

    Attributes:
        format: Pillow's name of the format.
        mode: of the pixels as the file stores them.
        size: (height, width) of the upright image.
        transparent: the file may have transparent parts.
        warnings: what Pillow warned of so far.

    Raises:
        CorruptImage: on opening or decoding, whatever ails the file.
    """

    def __init__(
        self, path: Path, content: BinaryIO | None = None, max_pixels: int = MAX_MEGAPIXELS * 1_000_000
    ) -> None:
        self.path = path
        self.warnings: list[str] = []
        self._max_pixels = max_pixels
        with self._decoding():
            self._file = open_regular(path) if content is None else content
            try:
                self._image = self._open()
            except BaseException:
                self._file.close()
                raise
        self.format, self.mode = self._image.format or "", self._image.mode
        self.transparent = self._image.has_transparency_data
        width, height = self._image.size
        self._turned = self._orientation >= 5  # the stored image lies on its side
        self.size: Size = (width, height) if self._turned else (height, width)

    def __enter__(self) -> Picture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._image.close()
        self._file.close()

    def pixels(self, in_chans: int = 3, box: Box | None = None, at_least: Size | None = None) -> Pixels:
        """Decode the part of the upright image inside ``box``; to be called once.

        Args:
            in_chans: 1 (grey), 3 (RGB) or 4 (RGBA). Transparent parts turn white for 1 and 3; an image
                without transparency is opaque for 4.
            box: default the whole image.
            at_least: (height, width) that the caller will scale the box down to. A JPEG is then decoded
                at 1/2, 1/4 or 1/8 scale where that leaves the box at least as large.

        Returns:
            [H, W, in_chans], uint8; for grey files of 9 to 16 bits float32 on the same scale, 0 to 255.
            (Pillow reduces 16-bit colour files to 8 bits.)
        """
        height, width = self.size
        left, top, right, bottom = box or (0, 0, width, height)
        with self._decoding():
            if at_least is not None and self.format in ("JPEG", "MPO"):
                wanted_h = math.ceil(height * at_least[0] / (bottom - top))
                wanted_w = math.ceil(width * at_least[1] / (right - left))
                self._image.draft(
                    "L" if in_chans == 1 else "RGB",
                    (wanted_h, wanted_w) if self._turned else (wanted_w, wanted_h),
                )
            self._load()
            image = ImageOps.exif_transpose(self._image) if self._orientation > 1 else self._image
            if image.size != (width, height):  # drafted
                x, y = image.width / width, image.height / height
                left, top = min(round(left * x), image.width - 1), min(round(top * y), image.height - 1)
                right, bottom = max(round(right * x), left + 1), max(round(bottom * y), top + 1)
            if (left, top, right, bottom) != (0, 0, *image.size):
                image = image.crop((left, top, right, bottom))
            return self._to_channels(image, in_chans)

    @property
    def pages(self) -> str:
        """What the file holds more of than the one image that is read, such as "3 pages"; else empty.

        To be asked after ``pixels``. The several images of a phone's JPEG (depth, brightness) do not count.
        """
        count, noun = 1, "frames"
        try:
            if self.format == "TIFF":
                count, noun = count_pages(self._file), "pages"
            elif self.format != "MPO" and getattr(self._image, "is_animated", False):
                count, noun = getattr(self._image, "n_frames", 1), "images" if self.format == "HEIF" else "frames"
        except Exception:  # the first one was sound, and what follows is not looked at
            return ""
        return f"{count:,} {noun}" if count > 1 else ""

    def _open(self) -> Image.Image:
        self._file.seek(0)
        start = self._file.read(SIGNATURE_BYTES)
        kind = recognise(start)
        if kind is None or kind not in READ_FORMATS:
            raise NotAnImage(self.path, why_not_read(start))
        if kind != "TIFF":  # which may have many pages, and is not read as a whole
            check_length(self.path, self._file, self._max_pixels)
        _prepare_pillow(kind, self._max_pixels)
        try:
            image = _opened(self._file, kind)
        except Image.DecompressionBombError as error:
            raise TooManyPixels(self.path, "too many", self._max_pixels) from error
        if image.width * image.height > self._max_pixels:
            got = f"{image.width} x {image.height} = {image.width * image.height:,}"
            raise TooManyPixels(self.path, got, self._max_pixels)
        self._orientation = _orientation(image)  # for which Pillow may decode a PNG to its end
        return image

    def _load(self) -> None:
        try:
            self._image.load()
        except ValueError:
            if self.format != "PNG":
                raise
            # Text that follows the pixels is too large for Pillow: once more, without it.
            self._image = _opened(_without_text(self._file), "PNG")
            self._image.load()

    def _to_channels(self, image: Image.Image, in_chans: int) -> Pixels:
        if image.mode.startswith("I;16"):
            planes = np.repeat(deep_pixels(image, depth_of(self._image))[..., None], in_chans, axis=-1)
            if in_chans == 4:
                planes[..., 3] = 255
            return planes
        if image.mode in ("I", "F"):
            raise ValueError(
                f"its pixels are {depth_of(self._image).words}, and the file does not say which values are black and "
                "white; scale them to 0..65535 and save them as unsigned 16-bit integers, or to 0..255 as 8-bit"
            )
        if in_chans == 4:
            return np.array(image.convert("RGBA"))
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        if in_chans == 1:
            return np.array(image.convert("L"))[..., None]
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            with collected(self.warnings):
                yield
        except (MemoryError, CorruptImage):
            raise
        except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, struct.error, ...
            raise CorruptImage(self.path, in_words(error)) from error


def decode(path: Path, in_chans: int = 3) -> Pixels:
    """Decode the whole image: [H, W, in_chans], upright; see ``Picture.pixels``."""
    with Picture(path) as picture:
        return picture.pixels(in_chans)


def check_length(path: Path, file: BinaryIO, max_pixels: int) -> None:
    """Raise a CorruptImage for a file that is too long to be read into memory, such as one that is mostly a hole."""
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    most = _PIXEL_BYTES * max_pixels + _OTHER_BYTES
    if length > most:
        limit = f"the {most:,} that an image of {MAX_KEY}={max_pixels / 1e6:g} may take"
        raise CorruptImage(path, f"the file has {length:,} bytes, more than {limit}")


def in_words(error: Exception) -> str:
    """Say what an error of a decoder means for the file, without names of objects in memory."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(_OBJECT.sub("the file", f"{error}").split())
    for said, meant in _MEANT.items():
        text = text.replace(said, meant)
    if text and isinstance(error, OSError | SyntaxError | ValueError):
        return text
    return f"the file is damaged ({type(error).__name__}{': ' if text else ''}{text})"


def _prepare_pillow(kind: str, max_pixels: int) -> None:
    """Let Pillow open ``kind``, and so many pixels; its limit is the process's, and is only ever raised."""
    if kind == "HEIF" and "HEIF" not in Image.OPEN:
        import pillow_heif

        pillow_heif.register_heif_opener()
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = math.ceil(max_pixels / 2)  # Pillow refuses what has twice as many


def _opened(file: BinaryIO, kind: str) -> Image.Image:
    """Read the header of a file of one format by that format's reader.

    ``Image.open`` would ask the same reader, but keep its error for itself and say "cannot identify image file".
    """
    if kind not in Image.OPEN:
        Image.init()
    reader = Image.OPEN[kind][0]
    file.seek(0)
    try:
        return reader(file, "")
    except ValueError:
        if kind != "PNG":
            raise
        return reader(_without_text(file), "")


def _without_text(file: BinaryIO) -> BinaryIO:
    """Copy a PNG without its texts and its colour profile, which may be larger than Pillow reads, or than memory."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    kept = [file.read(8)]
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in _TEXT_CHUNKS:
            file.seek(length + 4, io.SEEK_CUR)
        else:
            kept += [head, file.read(min(length + 4, size))]
    return io.BytesIO(b"".join(kept))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8. Pillow itself turns a TIFF while it loads it."""
    if image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block raises anything, and the pixels may still be sound
        return 1
    return value if value in range(1, 9) else 1
