"""Scaled copies of training images, so that only the first epoch decodes large files.

A copy is decoded and more than twice as large as the model's input. Training always uses these pixels, whether they are
stored or made again, so a missing copy costs time and changes no result. Copies are not compressed, since reading a
crop of one takes a fraction of the time that decoding it takes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Self

import numpy as np
import torch
import torch.nn.functional as F

from openmae.data.decode import Box, CorruptImage, ImageFile, Pixels, Size
from openmae.data.index import ImageIndex
from openmae.storage import cache
from openmae.storage.atomic import replacing

_LARGER = 2.25  # times as large as the model's input: a crop of a fifth of the area still has the size of the input
_FORMAT = 1
_SAMPLE = 64  # images whose size is read
_RESERVE = 1 << 30  # bytes of the disk that stay free

log = logging.getLogger("openmae")


class ScaledImage:
    """The pixels of a copy, with the part of ``ImageFile`` that transforms use.

    Attributes:
        size: (height, width).
        further_images: as in ``ImageFile``.
    """

    def __init__(self, pixels: Pixels, further_images: str = "") -> None:
        self.size: Size = pixels.shape[0], pixels.shape[1]
        self.further_images = further_images
        self._pixels = pixels

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: no file is open."""

    def pixels(self, in_chans: int = 3, box: Box | None = None, at_least: Size | None = None) -> Pixels:
        """Return the pixels inside ``box``, [H, W, C]. Channels and scale are those of the copy."""
        left, top, right, bottom = box or (0, 0, self.size[1], self.size[0])
        return self._rows(top, bottom)[:, left:right]

    def _rows(self, top: int, bottom: int) -> Pixels:
        return self._pixels[top:bottom]


class _StoredImage(ScaledImage):
    """A copy in a file: a line of JSON, and the pixels. Only the rows of a crop are read."""

    def __init__(self, file: IO[bytes]) -> None:
        header = json.loads(file.readline())
        self._file, self._start, self._kind = file, file.tell(), np.dtype(header["dtype"])
        height, width, self._chans = header["shape"]
        self.size, self.further_images = (height, width), header["further_images"]
        if file.seek(0, 2) != self._start + height * self._row:
            raise ValueError("incomplete")

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def _row(self) -> int:
        return self.size[1] * self._chans * self._kind.itemsize

    def _rows(self, top: int, bottom: int) -> Pixels:
        rows = np.empty((bottom - top, self.size[1], self._chans), self._kind)
        self._file.seek(self._start + top * self._row)
        self._file.readinto(rows.data)  # type: ignore[attr-defined]
        return rows


@dataclass
class ScaledCopies:
    """Opens the images of an index by their copies, which it makes and keeps.

    Attributes:
        larger_than: (height, width) that a copy has at least, unless the image is smaller.
        in_chans: channels of the copies.
        folder: where copies are kept; None: nowhere.
        room: bytes that this process may add.
    """

    larger_than: Size
    in_chans: int
    folder: Path | None = None
    room: int = 0

    def __post_init__(self) -> None:
        self.larger_than = max(self.larger_than[0], 1), max(self.larger_than[1], 1)

    def open(self, index: ImageIndex, number: int) -> ScaledImage:
        """Open image ``number`` of an index.

        Raises:
            CorruptImage: it cannot be decoded.
        """
        path = self._path(index, number)
        if path is not None and (stored := _read(path)) is not None:
            return stored
        with index.open(number) as file:
            copy = ScaledImage(self.scale(file), file.further_images)
        if path is not None:
            self._store(path, copy)
        return copy

    def scale(self, file: ImageFile) -> Pixels:
        """Decode an image and scale it down, [H, W, C]."""
        size = scaled_size(file.size, self.larger_than)
        pixels = file.pixels(self.in_chans, at_least=size)
        if pixels.shape[:2] == size:
            return pixels
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        scaled = F.interpolate(planes, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
        return np.ascontiguousarray(scaled.clamp_(0, 255).numpy())

    def _path(self, index: ImageIndex, number: int) -> Path | None:
        if self.folder is None:
            return None
        try:
            version = index.version(number)
        except OSError:  # opening it will say why
            return None
        name = hashlib.blake2b(version.encode(errors="surrogateescape"), digest_size=16).hexdigest()
        return self.folder / name[:2] / name[2:]

    def _store(self, path: Path, copy: ScaledImage) -> None:
        """Keep a copy if there is room for it."""
        pixels = np.ascontiguousarray(copy.pixels())
        header = {"shape": pixels.shape, "dtype": pixels.dtype.name, "further_images": copy.further_images}
        if pixels.nbytes > self.room:
            return
        try:
            if shutil.disk_usage(path.parents[1]).free < _RESERVE + pixels.nbytes:
                self.room = 0
                return
            with replacing(path) as temporary, temporary.open("wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                file.write(pixels.data)
            self.room -= pixels.nbytes
        except OSError as error:  # a full or lost disk; training continues without
            log.debug("The copy %s could not be written: %s", path, error)
            self.room = 0


def open_copies(index: ImageIndex, size: Size, in_chans: int, min_scale: float, *, processes: int = 1) -> ScaledCopies:
    """Return the copies of the images of an index, in the cache.

    Args:
        index: the training images.
        size: (height, width) of the model's input.
        in_chans: channels of the model's input.
        min_scale: the smallest share of the area that a crop keeps.
        processes: how many processes of this machine share the room in the cache.
    """
    copies = ScaledCopies(least_size(size, min_scale), in_chans)
    facts = (index.place, *copies.larger_than, in_chans, index.max_pixels, _FORMAT)
    name = hashlib.sha256(repr(facts).encode(errors="surrogateescape")).hexdigest()[:16]
    entry = cache.root() / cache.COPIES / name
    try:
        room = cache.grow(entry, index.place, bytes_of_copies(index, copies.larger_than, in_chans))
    except OSError as error:
        log.warning("Scaled copies of the images are not kept: %s cannot be written (%s).", entry, error.strerror)
        return copies
    return replace(copies, folder=entry, room=room // processes)


def bytes_of_copies(index: ImageIndex, larger_than: Size, in_chans: int) -> int:
    """Estimate how many bytes the copies of all images take, from some of the images."""
    total, seen = 0, range(0, len(index), max(1, len(index) // _SAMPLE))
    for number in seen:
        with suppress(CorruptImage), index.open(number) as file:
            bytes_per_value = 4 if file.mode.startswith("I;16") else 1
            total += math.prod(scaled_size(file.size, larger_than)) * in_chans * bytes_per_value
    return round(1.1 * total * len(index) / len(seen))


def least_size(size: Size, min_scale: float) -> Size:
    """Return the size of copies for an input of ``size``: a crop of ``min_scale`` of their area is not smaller."""
    factor = max(_LARGER, 1 / math.sqrt(min_scale))
    return math.ceil(factor * size[0]), math.ceil(factor * size[1])


def scaled_size(size: Size, larger_than: Size) -> Size:
    """Return the (height, width) of the copy of an image of ``size``."""
    if size[0] <= larger_than[0] or size[1] <= larger_than[1]:
        return size
    if larger_than[0] * size[1] >= larger_than[1] * size[0]:
        return larger_than[0], math.ceil(size[1] * larger_than[0] / size[0])
    return math.ceil(size[0] * larger_than[1] / size[1]), larger_than[1]


def _read(path: Path) -> _StoredImage | None:
    """Open a stored copy; None if there is none or it is damaged."""
    try:
        file = path.open("rb", buffering=0)
    except OSError:
        return None
    try:
        return _StoredImage(file)
    except (OSError, ValueError, KeyError, TypeError):
        file.close()
        return None
