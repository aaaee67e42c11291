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
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Self

import numpy as np
import PIL
import torch
import torch.nn.functional as F

from openmae.data.decode import Box, CorruptImage, ImageFile, Pixels, Size
from openmae.data.index import ImageIndex
from openmae.storage import cache
from openmae.storage.atomic import flush_to_disk, replacing

_LARGER = 2.25  # times as large as the model's input: a crop of a fifth of the area still has the size of the input
_FORMAT = 1
_HEADER = 256  # bytes
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
    """A copy in a file: JSON, padded with spaces, and the pixels. Only the rows of a crop are read.

    If they cannot be read, ``make`` makes the copy again.
    """

    def __init__(self, file: IO[bytes], make: Callable[[], ScaledImage]) -> None:
        header = json.loads(file.read(_HEADER))
        self._file, self._make, self._kind = file, make, np.dtype(header["dtype"])
        height, width, self._chans = header["shape"]
        self.size, self.further_images = (height, width), header["further_images"]
        if file.seek(0, 2) != _HEADER + height * self._row:
            raise ValueError("incomplete")

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def _row(self) -> int:
        return self.size[1] * self._chans * self._kind.itemsize

    def _rows(self, top: int, bottom: int) -> Pixels:
        rows = np.empty((bottom - top, self.size[1], self._chans), self._kind)
        with suppress(OSError):
            self._file.seek(_HEADER + top * self._row)
            if self._file.readinto(rows.data) == rows.nbytes:  # type: ignore[attr-defined]
                return rows
        return self._make()._rows(top, bottom)


@dataclass
class ScaledCopies:
    """Opens the images of an index by their copies, which it makes and keeps.

    Attributes:
        least: (height, width) that a copy has at least, unless the image is smaller.
        in_chans: channels of the copies.
        folder: where copies are kept; None: nowhere.
        room: bytes that this process may add.
    """

    least: Size
    in_chans: int
    folder: Path | None = None
    room: int = 0

    def open(self, index: ImageIndex, number: int) -> ScaledImage:
        """Open image ``number`` of an index.

        Raises:
            CorruptImage: it cannot be decoded, here or when its pixels are read.
        """
        path = self._path(index, number)
        make = partial(self._make, index, number)
        if path is None:
            return make()
        if (stored := _read(path, make)) is not None:
            return stored
        copy = make()
        self._store(path, copy)
        return copy

    def _make(self, index: ImageIndex, number: int) -> ScaledImage:
        with index.open(number) as file:
            return ScaledImage(self.scale(file), file.further_images)

    def scale(self, file: ImageFile) -> Pixels:
        """Decode an image and scale it down, [H, W, C]."""
        size = scaled_size(file.size, self.least)
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
            return self.folder / _name(index.version(number))
        except OSError:  # opening it will report the reason
            return None

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
            with replacing(path) as temporary:
                with temporary.open("wb") as file:
                    file.write(json.dumps(header).encode().ljust(_HEADER))
                    file.write(pixels.data)
                flush_to_disk(temporary)  # so that a power failure cannot leave a copy without its pixels
            self.room -= pixels.nbytes
        except OSError as error:  # a full or lost disk; training continues without
            log.warning("No more scaled copies are kept: %s could not be written (%s).", path, error.strerror)
            self.room = 0


def kept_in_cache(copies: ScaledCopies, index: ImageIndex, processes: int = 1) -> ScaledCopies:
    """Return ``copies`` with a folder for those of an index in the cache.

    ``processes`` is how many processes of this machine share the room in the cache.
    """
    if index.remote:
        log.warning("dataset.cache has no effect: scaled copies of the images of remote shards are not kept.")
        return copies
    entry, wanted = entry_of(index, copies), bytes_of_copies(index, copies)
    try:
        room, taken = cache.grow(entry, index.place, wanted)
        if taken and room < wanted:
            freed = _remove_stale(index, entry)
            room, taken = room + freed, taken - freed
    except OSError as error:
        reason = error.strerror or str(error)
        log.warning("No scaled copies are added: the cache %s cannot be used (%s).", cache.root(), reason)
        return replace(copies, folder=entry if os.access(entry, os.R_OK | os.X_OK) else None)
    if taken + room < wanted:
        log.warning(
            "Scaled copies of all images take %s, and the cache has room for %s: the other images are decoded in every "
            "epoch. Raise %s, or free space on its disk.",
            *(cache.gigabytes(wanted), cache.gigabytes(taken + room), cache.SIZE_VARIABLE),
        )
    return replace(copies, folder=entry, room=room // processes)


def entry_of(index: ImageIndex, copies: ScaledCopies) -> Path:
    """Return the folder of the cache in which the copies of an index are kept."""
    versions = (_FORMAT, PIL.__version__, torch.__version__)  # which may decode or scale to other pixels
    user = os.getuid() if hasattr(os, "getuid") else 0
    facts = (index.place, copies.least, copies.in_chans, index.max_pixels, versions, user)
    name = hashlib.sha256(repr(facts).encode(errors="surrogateescape")).hexdigest()[:16]
    return cache.root() / cache.COPIES / name


def bytes_of_copies(index: ImageIndex, copies: ScaledCopies) -> int:
    """Estimate how many bytes the copies of all images take, from some of the images."""
    total, seen = 0, index.spread(_SAMPLE)
    for number in seen:
        with suppress(CorruptImage), index.open(number) as file:
            bytes_per_value = 4 if file.mode.startswith("I;16") else 1
            total += math.prod(scaled_size(file.size, copies.least)) * copies.in_chans * bytes_per_value
    return round(1.1 * total * len(index) / len(seen))


def _remove_stale(index: ImageIndex, entry: Path) -> int:
    """Delete the copies of images that have changed or gone; return the bytes freed."""
    current, freed = set(), 0
    for number in range(len(index)):
        with suppress(OSError):
            current.add(_name(index.version(number)))
    for path in entry.glob("??/*"):
        if f"{path.parent.name}/{path.name}" not in current:
            with suppress(OSError):
                size = path.stat().st_size
                path.unlink()
                freed += size
    return freed


def _name(version: str) -> str:
    """Return the name of a copy in the folder, from the version of its image."""
    digest = hashlib.blake2b(version.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    return f"{digest[:2]}/{digest[2:]}"


def least_size(size: Size, min_scale: float) -> Size:
    """Return the size of copies for an input of ``size``: a crop of ``min_scale`` of their area is not smaller."""
    factor = max(_LARGER, 1 / math.sqrt(min_scale))
    return math.ceil(factor * size[0]), math.ceil(factor * size[1])


def scaled_size(size: Size, least: Size) -> Size:
    """Return the (height, width) of the copy of an image of ``size``."""
    if size[0] <= least[0] or size[1] <= least[1]:
        return size
    if least[0] * size[1] >= least[1] * size[0]:
        return least[0], math.ceil(size[1] * least[0] / size[0])
    return math.ceil(size[0] * least[1] / size[1]), least[1]


def _read(path: Path, make: Callable[[], ScaledImage]) -> _StoredImage | None:
    """Open a stored copy; None if there is none or it is damaged."""
    try:
        file = path.open("rb", buffering=0)
    except OSError:
        return None
    try:
        return _StoredImage(file, make)
    except (OSError, ValueError, KeyError, TypeError):
        file.close()
        return None
