"""``mae dataset pack``: a folder of images becomes WebDataset shards with their indexes beside them."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shutil
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from openmae.data.decode import CorruptImage, Picture
from openmae.data.image_index import ImageIndex
from openmae.data.remarks import Remark, Remarks, remarks_on
from openmae.data.shards.tar_index import BLOCK, TarIndex, index_file
from openmae.errors import DataError, RunError, UserError
from openmae.storage import layout
from openmae.storage.atomic import flush_to_disk, make_folder, write_atomically

log = logging.getLogger("openmae")

_AHEAD = 4  # images of each thread that wait to be written
_LOCK = ".packing.lock"


@dataclass(frozen=True)
class Packing:
    """How images are stored.

    Attributes:
        size: the shorter side that larger images are scaled down to, in pixels; None keeps every file as it is.
        shard_bytes: about how large a shard becomes.
        quality: of the JPEG that a scaled image is stored as, 1 to 100.
    """

    size: int | None = None
    shard_bytes: int = 256_000_000
    quality: int = 95


@dataclass
class Packed:
    """What was written: the shards, how many images are in them, and the files left out as (name, reason)."""

    shards: list[Path] = field(default_factory=list)
    images: int = 0
    corrupt: list[tuple[str, str]] = field(default_factory=list)

    @property
    def pattern(self) -> str:
        """The shards, as ``dataset.train_data_sources`` takes them."""
        last = self.shards[-1]
        head, number = last.stem.rsplit("-", 1)
        first = "0" * len(number)
        return str(last.with_name(f"{head}-{{{first}..{number}}}.tar"))


def pack(
    index: ImageIndex,
    out: Path,
    packing: Packing,
    *,
    overwrite: bool = False,
    advance: Callable[[], object] = lambda: None,
) -> Packed:
    """Write the images of ``index`` to ``out``/NAME-000000.tar, NAME-000001.tar, ..., NAME being that of the folder.

    Images keep their order, their path as their key (dots in a name become underscores, since WebDataset ends a key at
    the first dot) and, as .cls, the number of their class; its name is in the index beside the shard. The same images
    give the same bytes. Every image is decoded once; those that cannot be are left out and listed in
    ``corrupt_files.txt``. Shards have temporary names until all of them are whole.

    Args:
        index: what to pack.
        out: a folder; created.
        packing: how.
        overwrite: replace the shards in ``out``.
        advance: called after each image.

    Raises:
        UserError: ``out`` cannot be written, holds shards already, or is being packed by another process.
        DataError: every image is corrupt.
        RunError: the disk is full.
    """
    make_folder(out)
    name = re.sub(r"[^\w.-]+", "_", out.resolve().name) or "shard"
    try:
        with FileLock(out / _LOCK, timeout=0):
            return _pack(index, out, name, packing, overwrite, advance)
    except Timeout as error:
        raise UserError(f"Another process packs into {out}.", "Wait for it, or name another folder.") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"{out} has no room for the shards ({error.strerror}).", "Free space there.") from error


def _pack(
    index: ImageIndex, out: Path, name: str, packing: Packing, overwrite: bool, advance: Callable[[], object]
) -> Packed:
    old = sorted(
        path for path in out.glob(f"{name}-*") if re.fullmatch(r"-\d+\.tar(\.index\.json)?", path.name[len(name) :])
    )
    if old and not overwrite:
        raise UserError(
            f"{out} holds {len(old)} files of an earlier pack, such as {old[0].name}.",
            "Name another folder, or pass --overwrite.",
        )
    for leftover in out.glob(".packing-*/"):  # of a process that was killed; the lock is ours
        shutil.rmtree(leftover)
    packed, remarks = Packed(), Remarks(index)
    with tempfile.TemporaryDirectory(prefix=".packing-", dir=out) as folder:
        writer = _Writer(Path(folder), name, index.class_names, packing.shard_bytes)
        for number, stored in _stored_images(index, packing):
            advance()
            if isinstance(stored, CorruptImage):
                packed.corrupt.append((index.full_name(index.paths[number]), stored.reason))
                continue
            content, extension, found = stored
            remarks.record(found)
            writer.add(index.key(number), content, extension, -1 if index.labels is None else index.labels[number])
            packed.images += 1
        remarks.end_pass()
        if not packed.images:
            path, reason = packed.corrupt[0]
            raise DataError(
                f"All {len(index)} images in {index.place} are corrupt, such as {path} ({reason}).",
                "Name another folder.",
            )
        written = writer.close()
        for earlier in old:
            earlier.unlink()
        for shard in written:
            beside = Path(index_file(str(shard)))
            beside.replace(out / beside.name)
            shard.replace(out / shard.name)
        packed.shards = [out / shard.name for shard in written]
    listing = out / layout.CORRUPT_LIST
    listing.unlink(missing_ok=True)
    if packed.corrupt:
        write_atomically(listing, "".join(f"{path}\t{reason}\n" for path, reason in packed.corrupt))
    return packed


# ---------------------------------------------------------------------------------------------- images

Stored = tuple[bytes, str, list[Remark]]  # a file, its extension, and what is remarkable about the image in it


def _stored_images(index: ImageIndex, packing: Packing) -> Iterator[tuple[int, Stored | CorruptImage]]:
    """Every image as it is stored, in order, made by as many threads as there are cores."""
    threads = os.cpu_count() or 1
    waiting: deque[Future[Stored | CorruptImage]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for number in range(len(index) + threads * _AHEAD):
                if number < len(index):
                    waiting.append(pool.submit(_stored, index, number, packing))
                if number >= threads * _AHEAD and waiting:
                    yield number - threads * _AHEAD, waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _stored(index: ImageIndex, number: int, packing: Packing) -> Stored | CorruptImage:
    extension = os.path.splitext(index.paths[number])[1].lower()
    try:
        content = index.read(number)
        with Picture(index.file(number), io.BytesIO(content), index.max_pixels) as picture:
            if packing.size is not None and min(picture.size) > packing.size:
                content, extension = _scaled_down(picture, packing.size, packing.quality)
            else:
                picture.pixels(at_least=(1, 1))  # a JPEG is read to its end, but not transformed
            return content, extension, remarks_on(picture, index.paths[number])
    except CorruptImage as error:
        return error


def _scaled_down(picture: Picture, size: int, quality: int) -> tuple[bytes, str]:
    """The upright image with a shorter side of ``size``: JPEG, or PNG for transparency and 16 bits, sRGB assumed."""
    height, width = picture.size
    scale = size / min(height, width)
    target = max(size, round(width * scale)), max(size, round(height * scale))
    deep = picture.mode.startswith("I;16")
    in_chans = 4 if picture.transparent else 1 if deep or picture.mode in ("1", "L") else 3
    pixels = picture.pixels(in_chans, at_least=(2 * target[1], 2 * target[0]))
    image = Image.fromarray(pixels[..., 0] if in_chans == 1 else pixels)
    image = image.resize(target, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if deep:
        values = np.clip(np.rint(np.asarray(image) * 257), 0, 65535).astype(np.uint16)
        Image.fromarray(values).save(out, "PNG")
    elif in_chans == 4:
        image.save(out, "PNG")
    else:
        image.save(out, "JPEG", quality=quality)
        return out.getvalue(), ".jpg"
    return out.getvalue(), ".png"


# ---------------------------------------------------------------------------------------------- shards


class _Writer:
    """Writes samples to numbered tar files, and beside each its index."""

    def __init__(self, folder: Path, name: str, classes: tuple[str, ...], shard_bytes: int) -> None:
        self._folder, self._name, self._classes, self._shard_bytes = folder, name, list(classes), shard_bytes
        self._tar: tarfile.TarFile | None = None
        self._index = TarIndex(0, [], [], [], [], [])
        self._keys: set[str] = set()
        self._shards: list[Path] = []

    def add(self, path: str, content: bytes, extension: str, label: int) -> None:
        """Write one image and its label (-1: none)."""
        size = len(content) + 3 * BLOCK
        if self._tar is None or (self._index.names and self._tar.offset + size > self._shard_bytes):
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

    def close(self) -> list[Path]:
        """Finish the last shard and return all of them."""
        self._finish()
        return self._shards

    def _next_shard(self) -> None:
        self._finish()
        self._shards.append(self._folder / f"{self._name}-{len(self._shards):06d}.tar")
        self._tar = tarfile.open(self._shards[-1], "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._index = TarIndex(0, [], [], [], [], self._classes)

    def _finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        path, index = self._shards[-1], self._index
        flush_to_disk(path)
        columns = (index.names, index.offsets, index.sizes, index.labels)
        text = TarIndex(path.stat().st_size, *columns, index.classes).to_json()
        write_atomically(Path(index_file(str(path))), text)

    def _add_member(self, name: str, content: bytes) -> int:
        """Write a member that tells nothing of its writer, and return where its data begins."""
        assert self._tar is not None
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))
        return self._tar.offset - -(-len(content) // BLOCK) * BLOCK

    def _key(self, path: str) -> str:
        """A key of its own for each image: a.png and a.jpg may lie side by side."""
        folder, slash, name = os.path.splitext(path)[0].rpartition("/")
        stem = f"{folder}{slash}{name.replace('.', '_')}"
        key, count = stem, 1
        while key in self._keys:
            count += 1
            key = f"{stem}_{count}"
        self._keys.add(key)
        return key
