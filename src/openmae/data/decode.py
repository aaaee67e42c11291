"""Decode one image, in the same way for folders, shards, packing, inference and serving."""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, TiffImagePlugin

from openmae.data.formats import READ_FORMATS, SIGNATURE_BYTES, recognise, why_not_read
from openmae.inputs import open_regular

MAX_MEGAPIXELS = 179  # Pillow's own limit
MAX_PIXELS = MAX_MEGAPIXELS * 1_000_000
MAX_KEY = "dataset.max_megapixels"

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the upright image
Size = tuple[int, int]  # height, width
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]

log = logging.getLogger("openmae")
# Do not print Pillow's messages about files that it can read (such as broken EXIF) in every process.
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module=r"PIL\.")

# Image generators store prompts of several MB in PNG files. Pillow limits each text to 1 MiB, and all texts to 64 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# The largest file size for N pixels: four channels of 32 bits, plus texts and profiles.
_BYTES_PER_PIXEL, _EXTRA_BYTES = 16, 1 << 26
_PILLOW_TEXTS = {
    "not identified by this driver": "its header is damaged",
    "unknown pixel mode": "its combination of bits, sample format and colour space is not supported; save it as 8-bit "
    "grey or RGB, or as unsigned 16-bit grey",
}
_OBJECT = re.compile(r"<[^<>]* object at 0x[0-9a-f]+>")
_TIFF_SAMPLES = {1: "unsigned {}-bit integers", 2: "signed {}-bit integers", 3: "{}-bit floating-point numbers"}


class CorruptImage(Exception):  # noqa: N818
    """An image file that cannot be decoded: ``path`` and ``reason``."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class NotAnImage(CorruptImage):
    """A file whose content is not in a supported format."""


class TooManyPixels(CorruptImage):
    """An image with more pixels than allowed; ``got`` says how many."""

    def __init__(self, path: Path, got: str, max_pixels: int) -> None:
        limit = f"{MAX_KEY}={max_pixels / 1e6:g}"
        super().__init__(path, f"it has {got} pixels, more than {limit} allows")
        self.args = (path, got, max_pixels)
        self.got = got
        self.max_pixels = max_pixels


class ImageFile:
    """An image file whose header has been read; its pixels are decoded on request.

    Use it as a context manager, so that the file is closed.

    Args:
        path: path of the file, or a name for ``content``.
        content: an open file to read instead of ``path``; it is closed with this object.
        max_pixels: the largest width x height.

    Attributes:
        format: Pillow's name of the format.
        mode: Pillow's mode of the file, such as "RGB".
        size: (height, width) of the image after EXIF rotation.
        transparent: whether the file may have transparent parts.

    Raises:
        CorruptImage: on opening or decoding, for any error in the file.
    """

    def __init__(self, path: Path, content: BinaryIO | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self.path = path
        with self._decoding():
            self._file = open_regular(path) if content is None else content
            try:
                self._image = read_header(path, self._file, max_pixels)
                self._orientation = _orientation(self._image)
            except BaseException:
                self._file.close()
                raise
        self.format, self.mode = self._image.format or "", self._image.mode
        self.transparent = self._image.has_transparency_data
        width, height = self._image.size
        self._rotated = self._orientation >= 5  # width and height are exchanged
        self.size: Size = (width, height) if self._rotated else (height, width)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._image.close()
        self._file.close()

    def pixels(self, in_chans: int = 3, box: Box | None = None, at_least: Size | None = None) -> Pixels:
        """Decode the part of the upright image inside ``box``. May be called only once.

        Args:
            in_chans: 1 (grey), 3 (RGB) or 4 (RGBA). For 1 and 3, transparent parts become white; for 4, an image
                without transparency is opaque.
            box: default: the entire image.
            at_least: (height, width) that the caller will scale the box down to. A JPEG is decoded at 1/2, 1/4 or 1/8
                scale if the box is still at least that large.

        Returns:
            [H, W, in_chans], uint8; float32 in 0..255 for grey files of 9 to 16 bits. (Pillow reduces 16-bit colour
            files to 8 bits.)
        """
        height, width = self.size
        left, top, right, bottom = box or (0, 0, width, height)
        with self._decoding():
            if at_least is not None and self.format in ("JPEG", "MPO"):
                wanted_h = math.ceil(height * at_least[0] / (bottom - top))
                wanted_w = math.ceil(width * at_least[1] / (right - left))
                self._image.draft(
                    "L" if in_chans == 1 else "RGB",
                    (wanted_h, wanted_w) if self._rotated else (wanted_w, wanted_h),
                )
            self._image.load()
            image = ImageOps.exif_transpose(self._image) if self._orientation > 1 else self._image
            if image.size != (width, height):  # decoded at a smaller scale
                x, y = image.width / width, image.height / height
                left, top = min(round(left * x), image.width - 1), min(round(top * y), image.height - 1)
                right, bottom = max(round(right * x), left + 1), max(round(bottom * y), top + 1)
            if (left, top, right, bottom) != (0, 0, *image.size):
                image = image.crop((left, top, right, bottom))
            return self._to_channels(image, in_chans)

    @property
    def further_images(self) -> str:
        """The kind of further images in the file, such as "several pages"; empty if there are none.

        Read it after ``pixels``. Auxiliary images in a phone's JPEG (depth, gain map) do not count.
        """
        try:  # the other images of the file may be damaged
            if self.format != "MPO" and getattr(self._image, "is_animated", False):
                return {"TIFF": "several pages", "HEIF": "several images"}.get(self.format, "several frames")
        except Exception:
            log.debug("%s: further images in the file cannot be read", self.path, exc_info=True)
        return ""

    def _to_channels(self, image: Image.Image, in_chans: int) -> Pixels:
        if image.mode.startswith("I;16"):
            planes = np.repeat(_deep_grey(image, self._image)[..., None], in_chans, axis=-1)
            if in_chans == 4:
                planes[..., 3] = 255
            return planes
        if image.mode in ("I", "F"):
            raise ValueError(
                f"its pixels are {_sample_type(self._image)}, and the file does not say which values are black and "
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
            yield
        except (MemoryError, CorruptImage):
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... for damaged files
            raise CorruptImage(self.path, describe_error(error)) from error


def read_header(path: Path, file: BinaryIO, max_pixels: int) -> Image.Image:
    """Recognise the format of an open file and read its header, without decoding pixels; the file stays open.

    Raises:
        NotAnImage: the content is not in a supported format.
        TooManyPixels: the image is larger than ``max_pixels``.
        CorruptImage: the file is too long.
        Exception: any error that a decoder raises for a damaged header.
    """
    file.seek(0)
    start = file.read(SIGNATURE_BYTES)
    kind = recognise(start)
    if kind is None or kind not in READ_FORMATS:
        raise NotAnImage(path, why_not_read(start))
    if kind != "TIFF":  # a TIFF may have many pages, and only one of them is read
        check_length(path, file, max_pixels)
    if kind == "HEIF" and "HEIF" not in Image.OPEN:
        import pillow_heif

        pillow_heif.register_heif_opener()
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = math.ceil(max_pixels / 2)  # per process; Pillow's limit is twice this
    if kind not in Image.OPEN:
        Image.init()
    file.seek(0)
    try:
        # Image.open would replace the decoder's error by "cannot identify image file".
        image = Image.OPEN[kind][0](file, "")
    except Image.DecompressionBombError as error:
        raise TooManyPixels(path, "too many", max_pixels) from error
    if image.width * image.height > max_pixels:
        got = f"{image.width} x {image.height} = {image.width * image.height:,}"
        raise TooManyPixels(path, got, max_pixels)
    return image


def check_length(path: Path, file: BinaryIO, max_pixels: int) -> None:
    """Raise ``CorruptImage`` if a file is too long to be read into memory, such as a sparse file of 64 GB."""
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    most = _BYTES_PER_PIXEL * max_pixels + _EXTRA_BYTES
    if length > most:
        limit = f"the {most:,} that an image of {MAX_KEY}={max_pixels / 1e6:g} may take"
        raise CorruptImage(path, f"the file has {length:,} bytes, more than {limit}")


def describe_error(error: Exception) -> str:
    """Return a decoder's error as the reason why a file cannot be read, without memory addresses."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(_OBJECT.sub("the file", f"{error}").split())
    for said, meant in _PILLOW_TEXTS.items():
        text = text.replace(said, meant)
    if text and isinstance(error, OSError | SyntaxError | ValueError):
        return text
    return f"the file is damaged ({type(error).__name__}{': ' if text else ''}{text})"


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 for a TIFF, which Pillow rotates itself."""
    if image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block raises anything, and the pixels may still be readable
        return 1
    return value if value in range(1, 9) else 1


def _deep_grey(image: Image.Image, file: Image.Image) -> npt.NDArray[np.float32]:
    """Scale a grey image of 9 to 16 bits to 0..255, float32 [H, W]; a TIFF has tags for its bit depth and polarity."""
    tags: Any = file.tag_v2 if isinstance(file, TiffImagePlugin.TiffImageFile) else {}
    white = 2 ** int(tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]) - 1
    grey = np.minimum(np.array(image, dtype=np.float32) / np.float32(white / 255), np.float32(255))
    return 255 - grey if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0 else grey


def _sample_type(file: Image.Image) -> str:
    if not isinstance(file, TiffImagePlugin.TiffImageFile):
        return "32-bit numbers"
    bits = int(file.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0])
    kind = int(file.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0])
    return _TIFF_SAMPLES.get(kind, "{}-bit numbers of an unknown kind").format(bits)
