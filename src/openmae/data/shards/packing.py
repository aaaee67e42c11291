"""Pack the images of an index into WebDataset shards, with an index file next to each."""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from openmae.data.corrupt import warn_of_further_images
from openmae.data.decode import CorruptImage, ImageFile
from openmae.data.index import ImageIndex
from openmae.data.parallel import map_images
from openmae.data.shards.tar_index import BLOCK, TarIndex, index_file
from openmae.errors import DataError, UserError
from openmae.storage import layout
from openmae.storage.atomic import FULL, disk_errors, flush_to_disk, make_folder, write_atomically

_LOCK = ".packing.lock"


@dataclass(frozen=True)
class PackOptions:
    """Options for the packed images.

    Attributes:
        size: scale larger images down to this shorter side in pixels; None stores every file unchanged.
        shard_bytes: approximate size of a shard.
        quality: JPEG quality of scaled images, 1 to 100.
    """

    size: int | None = None
    shard_bytes: int = 256_000_000
    quality: int = 95


@dataclass
class PackResult:
    """The shards written, their number of images, and the files left out as (name, reason)."""

    shards: list[Path] = field(default_factory=list)
    images: int = 0
    corrupt: list[tuple[str, str]] = field(default_factory=list)

    @property
    def pattern(self) -> str:
        """The shards as a pattern for ``dataset.train_data_sources``."""
        last = self.shards[-1]
        head, number = last.stem.rsplit("-", 1)
        first = "0" * len(number)
        return str(last.with_name(f"{head}-{{{first}..{number}}}.tar"))


def pack(
    index: ImageIndex,
    out: Path,
    options: PackOptions,
    *,
    overwrite: bool = False,
    advance: Callable[[], object] = lambda: None,
) -> PackResult:
    """Write the images of ``index`` to ``out``/NAME-000000.tar and so on, where NAME is the name of ``out``.

    Images keep their order, and the same images give the same bytes. The key of an image is its path, with underscores
    for dots in the file name, since WebDataset ends a key at the first dot. Its .cls holds its class number; the class
    names are in the index file next to the shard. Every image is decoded once; corrupt ones are left out and listed in
    ``corrupt_files.txt``. Shards are moved to ``out`` when all of them are complete. ``advance`` is called after each
    image.

    Raises:
        UserError: ``out`` cannot be written, contains shards already, or is in use by another process.
        DataError: every image is corrupt.
        RunError: the disk is full.
    """
    make_folder(out)
    try:
        with disk_errors(out, FULL), FileLock(out / _LOCK, timeout=0):
            return _pack(index, out, options, overwrite, advance)
    except Timeout as error:
        raise UserError(f"Another process packs into {out}.", "Wait for it, or name another folder.") from error


def _pack(
    index: ImageIndex, out: Path, options: PackOptions, overwrite: bool, advance: Callable[[], object]
) -> PackResult:
    name = re.sub(r"[^\w.-]+", "_", out.resolve().name) or "shard"
    old = sorted(
        path for path in out.glob(f"{name}-*") if re.fullmatch(r"-\d+\.tar(\.index\.json)?", path.name[len(name) :])
    )
    if old and not overwrite:
        raise UserError(
            f"{out} already holds {len(old)} files of packed shards, such as {old[0].name}.",
            "Name another folder, or pass --overwrite.",
        )
    for leftover in out.glob(".packing-*/"):  # of a killed process, since this one holds the lock
        shutil.rmtree(leftover)
    result, warned = PackResult(), False
    with tempfile.TemporaryDirectory(prefix=".packing-", dir=out) as folder:
        writer = _ShardWriter(Path(folder), name, index.class_names, options.shard_bytes)
        for number, stored in enumerate(map_images(index, partial(_stored, options))):
            advance()
            if isinstance(stored, CorruptImage):
                result.corrupt.append((index.full_name(number), stored.reason))
                continue
            if stored.further and not warned:
                warned = True
                warn_of_further_images(index, number, stored.further)
            label = -1 if index.labels is None else index.labels[number]
            writer.add(index.key(number), stored.content, stored.suffix, label)
            result.images += 1
        if not result.images:
            path, reason = result.corrupt[0]
            raise DataError(
                f"All {len(index)} images in {index.place} are corrupt, such as {path} ({reason}).",
                "Name another folder.",
            )
        writer.close()
        for earlier in old:
            earlier.unlink()
        for shard in writer.shards:
            beside = Path(index_file(str(shard)))
            beside.replace(out / beside.name)
            shard.replace(out / shard.name)
            result.shards.append(out / shard.name)
    listing = out / layout.CORRUPT_LIST
    listing.unlink(missing_ok=True)
    if result.corrupt:
        write_atomically(listing, "".join(f"{path}\t{reason}\n" for path, reason in result.corrupt))
    return result


class _Stored(NamedTuple):
    content: bytes
    suffix: str
    further: str


def _stored(options: PackOptions, image: ImageFile, content: bytes) -> _Stored:
    suffix = image.path.suffix.lower()
    if options.size is not None and min(image.size) > options.size:
        content, suffix = _scaled_down(image, options.size, options.quality)
    else:
        image.pixels(at_least=(1, 1))  # reads all of a JPEG, but decodes it at the lowest resolution
    return _Stored(content, suffix, image.further_images)


def _scaled_down(file: ImageFile, size: int, quality: int) -> tuple[bytes, str]:
    """Scale the upright image to a shorter side of ``size``; return a JPEG, or a PNG for transparency or 16 bits."""
    height, width = file.size
    scale = size / min(height, width)
    target = max(size, round(width * scale)), max(size, round(height * scale))
    deep = file.mode.startswith("I;16")
    in_chans = 4 if file.transparent else 1 if deep or file.mode in ("1", "L") else 3
    pixels = file.pixels(in_chans, at_least=(2 * target[1], 2 * target[0]))
    image = Image.fromarray(pixels[..., 0] if in_chans == 1 else pixels)
    image = image.resize(target, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if deep:
        values = np.clip(np.rint(np.asarray(image) * 257), 0, 65535).astype(np.uint16)
        image = Image.fromarray(values)
    if deep or in_chans == 4:
        image.save(out, "PNG")
        return out.getvalue(), ".png"
    image.save(out, "JPEG", quality=quality)
    return out.getvalue(), ".jpg"


class _ShardWriter:
    """Writes samples to numbered tar files, the ``shards``, with an index file next to each."""

    def __init__(self, folder: Path, name: str, classes: tuple[str, ...], shard_bytes: int) -> None:
        self._folder, self._name, self._classes, self._shard_bytes = folder, name, list(classes), shard_bytes
        self._tar: tarfile.TarFile | None = None
        self._index: TarIndex
        self._keys: set[str] = set()
        self.shards: list[Path] = []

    def add(self, path: str, content: bytes, extension: str, label: int) -> None:
        """Write an image and its label (-1 for none)."""
        size = len(content) + 3 * BLOCK
        if self._tar is None or self._tar.offset + size > self._shard_bytes:
            self._next_shard()
        key = self._key(path)
        name = f"{key}{extension}"
        offset = self._add_member(name, content)
        if label >= 0:
            self._add_member(f"{key}.cls", str(label).encode())
        self._index.names.append(name)
        self._index.offsets.append(offset)
        self._index.sizes.append(len(content))
        self._index.labels.append(label)

    def _next_shard(self) -> None:
        self.close()
        self.shards.append(self._folder / f"{self._name}-{len(self.shards):06d}.tar")
        self._tar = tarfile.open(self.shards[-1], "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._index = TarIndex(0, [], [], [], [], self._classes)

    def close(self) -> None:
        """Finish the last shard."""
        if self._tar is None:
            return
        self._tar.close()
        path = self.shards[-1]
        flush_to_disk(path)
        index = replace(self._index, bytes=path.stat().st_size)
        write_atomically(Path(index_file(str(path))), index.to_json())

    def _add_member(self, name: str, content: bytes) -> int:
        """Write a member without owner or time; return the offset of its data."""
        assert self._tar is not None
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))
        return self._tar.offset - -(-len(content) // BLOCK) * BLOCK

    def _key(self, path: str) -> str:
        """Return a unique key, since a folder may contain both a.png and a.jpg."""
        folder, slash, name = os.path.splitext(path)[0].rpartition("/")
        stem = f"{folder}{slash}{name.replace('.', '_')}"
        key, count = stem, 1
        while key in self._keys:
            count += 1
            key = f"{stem}_{count}"
        self._keys.add(key)
        return key
