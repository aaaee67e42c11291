"""Indexed images, and their pixels.

Pixels are decoded once, cropped and scaled as early as the file format allows, and stay 8-bit unless the
file has 16 bits.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from openmae.data.folder import Skipped
from openmae.data.formats import READ_FORMATS
from openmae.results.names import printable_name

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the upright image
Size = tuple[int, int]  # height, width
Numbers = Sequence[int] | npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


# ---------------------------------------------------------------------------------------------- index


@dataclass(frozen=True)
class ImageIndex:
    """The images below a folder, in one order on every machine.

    Attributes:
        root: the folder.
        paths: posix paths relative to ``root``, sorted.
        labels: the class number of each path, -1 where it has none, or None where there are no labels.
        class_names: names by class number; empty without labels.
        labelled_by: what the labels were taken from, such as "folders"; empty without labels.
        skipped: files of the source that are not read, by kind.
        results: folders and pictures in the source that are not read, since OpenMAE has written them.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    labelled_by: str = field(default="", compare=False)
    skipped: tuple[Skipped, ...] = field(default=(), compare=False)
    results: tuple[str, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def place(self) -> str:
        """Where the images are, as messages name it."""
        return printable_name(str(self.root))

    @property
    def unlabelled(self) -> list[int]:
        """The numbers of images without a label where others have one."""
        return [number for number, label in enumerate(self.labels or ()) if label < 0]

    @property
    def digest(self) -> str:
        """Tells two data sets apart by their files' names, order and classes: ``1,281,167 images (3f2a91c0)``."""
        content = "\n".join((*self.paths, *self.class_names, *map(str, self.labels or ())))
        return f"{len(self):,} images ({hashlib.sha256(content.encode(errors='surrogateescape')).hexdigest()[:8]})"

    def full_name(self, path: str) -> str:
        """Return the name, printable, that one of ``paths`` has in lists that hold several data sets."""
        return printable_name(str(self.root / path))

    def holds(self, full_name: str) -> bool:
        """Say whether ``full_name`` may be of this data set."""
        return full_name.startswith(f"{self.place}{os.sep}")

    def file(self, number: int) -> Path:
        """Return the full path of image ``number``."""
        return self.root / self.paths[number]

    def picture(self, number: int) -> Picture:
        """Open image ``number``; CorruptImage where its header cannot be read."""
        return Picture(self.file(number))

    def read(self, number: int) -> bytes:
        """Return the file of image ``number`` as it is stored; CorruptImage where that cannot be read."""
        with _whatever_ails(self.file(number)):
            return self.file(number).read_bytes()

    def key(self, number: int) -> str:
        """Return the path of image ``number`` within the data set, whatever that is stored in."""
        return self.paths[number]

    def subset(self, numbers: Numbers) -> Self:
        """Return the images ``numbers``, in that order."""
        labels = None if self.labels is None else tuple(self.labels[number] for number in numbers)
        return replace(self, paths=tuple(self.paths[number] for number in numbers), labels=labels)

    def shuffled(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return an epoch's order: a permutation of the numbers of all images, int64 [N]."""
        return rng.permutation(len(self))

    def prepare(self, now: Numbers, soon: Numbers) -> None:
        """Make images ``now`` ready to be read, and begin to do so for ``soon``; files of a folder always are."""


# --------------------------------------------------------------------------------------------- decode


class CorruptImage(Exception):  # noqa: N818  (what it is, rather than what went wrong)
    """An image file that cannot be decoded: ``path`` and ``reason``."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Picture:
    """An image file with its header read: the upright size is known, pixels are decoded on request.

    Use it as a context manager, so that the file is closed.

    Args:
        path: of the file, or the name of ``upload``.
        upload: an open file that somebody sent, to be read in place of ``path``; it is the picture's from then on.
            Only ``READ_FORMATS`` are tried on it, for other decoders run programs (EPS) or are old.

    Raises:
        CorruptImage: on opening or decoding, whatever ails the file.
    """

    def __init__(self, path: Path, upload: BinaryIO | None = None) -> None:
        self.path = path
        with _whatever_ails(path):
            self._image: Image.Image = Image.open(upload or path, formats=READ_FORMATS)
        self.format, self.mode = self._image.format or "", self._image.mode
        self.transparent = self._image.has_transparency_data
        self._orientation = _orientation(self._image)
        width, height = self._image.size
        self._turned = self._orientation >= 5  # the stored image lies on its side
        self.size: Size = (width, height) if self._turned else (height, width)

    def __enter__(self) -> Picture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._image.close()

    def pixels(self, in_chans: int = 3, box: Box | None = None, at_least: Size | None = None) -> Pixels:
        """Decode the part of the upright image inside ``box``; to be called once.

        Args:
            in_chans: 1 (grey), 3 (RGB) or 4 (RGBA). Transparent parts turn white for 1 and 3; an image
                without transparency is opaque for 4.
            box: default the whole image.
            at_least: (height, width) that the caller will scale the box down to. A JPEG is then decoded
                at 1/2, 1/4 or 1/8 scale where that leaves the box at least as large.

        Returns:
            [H, W, in_chans], uint8; for 16-bit grey files float32 on the same scale, value / 257.
            (Pillow reduces 16-bit colour files to 8 bits.)
        """
        height, width = self.size
        left, top, right, bottom = box or (0, 0, width, height)
        with _whatever_ails(self.path):
            if at_least is not None:
                wanted_h = math.ceil(height * at_least[0] / (bottom - top))
                wanted_w = math.ceil(width * at_least[1] / (right - left))
                self._image.draft(
                    "L" if in_chans == 1 else "RGB",
                    (wanted_h, wanted_w) if self._turned else (wanted_w, wanted_h),
                )
            self._image.load()
            image = ImageOps.exif_transpose(self._image) if self._orientation > 1 else self._image
            if image.size != (width, height):  # drafted
                x, y = image.width / width, image.height / height
                left, top = min(round(left * x), image.width - 1), min(round(top * y), image.height - 1)
                right, bottom = max(round(right * x), left + 1), max(round(bottom * y), top + 1)
            if (left, top, right, bottom) != (0, 0, *image.size):
                image = image.crop((left, top, right, bottom))
            return _to_channels(image, in_chans)


def decode(path: Path, in_chans: int = 3) -> Pixels:
    """Decode the whole image: [H, W, in_chans], upright; see ``Picture.pixels``."""
    with Picture(path) as picture:
        return picture.pixels(in_chans)


@contextmanager
def _whatever_ails(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, struct.error, ...
        raise CorruptImage(path, " ".join(f"{error}".split()) or type(error).__name__) from error


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8. Pillow itself turns a TIFF while it loads it."""
    if image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block raises anything, and the pixels may still be sound
        return 1
    return value if value in range(1, 9) else 1


def _to_channels(image: Image.Image, in_chans: int) -> Pixels:
    if image.mode.startswith("I;16"):
        grey = np.array(image, dtype=np.float32) / np.float32(257)
        planes = np.repeat(grey[..., None], in_chans, axis=-1)
        if in_chans == 4:
            planes[..., 3] = 255
        return planes
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no agreed range; convert the file to 8 or 16 bits")
    if in_chans == 4:
        return np.array(image.convert("RGBA"))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if in_chans == 1:
        return np.array(image.convert("L"))[..., None]
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
