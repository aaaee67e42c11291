"""What a tar file of images holds and where: with it, any image is one read away, and nothing is unpacked.

The index of a shard is made by one pass over its headers and kept as JSON: beside the shard where
``mae dataset pack`` wrote it, in the cache otherwise.
"""

from __future__ import annotations

import json
import os
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from openmae.data.formats import IMAGE_SUFFIXES
from openmae.data.sources import StrictTarInfo
from openmae.errors import DataError
from openmae.storage.urls import is_remote, redact

FORMAT = "openmae-shard-1"
BLOCK = 512  # of a tar file; a member's header is one, right before its data
_LABEL_BYTES = 1 << 20  # a .cls or .json beyond that is no label
_OPEN_LOCAL = 64  # shards that a process keeps open
_OPEN_REMOTE = 12  # these take room as long as they are open, even when the cache has let go of them
_fetching = threading.RLock()


def _after_fork() -> None:
    global _fetching
    _fetching = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Attributes:
        name: as it stands in the paths of its images.
        place: a local path or a URL.
        stamp: changes when the shard does.
        bytes: its size.
        indexed: an index lies beside it.
    """

    name: str
    place: str
    stamp: str
    bytes: int
    indexed: bool

    @property
    def remote(self) -> bool:
        return is_remote(self.place)

    def fetch(self) -> None:
        """Bring a remote shard into the cache, where it stays until room is needed.

        Raises:
            DataError: it cannot be had.
        """
        with self.local():
            pass

    @contextmanager
    def local(self, *, quiet: bool = True) -> Iterator[Path]:
        """Give the local file, fetched into the cache where it is not there; it stays at least within the block.

        Quietly, as a rule: while a run reads, the terminal is the run's.
        """
        if not self.remote:
            yield Path(self.place)
            return
        from openmae.storage import cache
        from openmae.storage.download import fetch

        # One download at a time: it has connections, and takes memory, enough for itself.
        with _fetching, cache.holding():
            yield fetch(self.place, quiet=quiet)


@dataclass(frozen=True)
class TarIndex:
    """The images of one shard, in the order in which they lie.

    Attributes:
        bytes: size of the shard.
        names: of the images, as the shard has them.
        offsets, sizes: where each image's bytes are.
        labels: place of each image's class in ``classes``, -1 where it has none.
        classes: names of classes; those of the whole data set where ``mae dataset pack`` wrote the shard, else those
            that the shard's .cls and .json members name.
        others: members that are neither an image nor a label.
    """

    bytes: int
    names: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    classes: list[str]
    others: int = 0

    def to_json(self) -> str:
        """One line; the same index gives the same text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str, bytes: int) -> TarIndex | None:
        """Read a line of ``to_json`` about a shard of ``bytes``; None where it is of another version or shard."""
        try:
            content = json.loads(text)
            if content.pop("format") != FORMAT or content["bytes"] != bytes:
                return None
            index = cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None  # one pass over the shard makes a new one
        columns = (index.names, index.offsets, index.sizes, index.labels)
        return index if len({len(column) for column in columns}) == 1 else None


def index_file(shard: str) -> str:
    """Return where the index of a shard lies that was written with it: its path or URL, and .index.json."""
    path, mark, query = shard.partition("?") if is_remote(shard) else (shard, "", "")
    return f"{path}.index.json{mark}{query}"


def fits(index: TarIndex, shard: Shard) -> bool:
    """Say whether the first and the last image lie where ``index`` says: a look, not a proof."""
    ends = {0, len(index.names) - 1} if index.names else set()
    return all(read_member(shard, index.offsets[number], index.sizes[number]) is not None for number in ends)


def scan_tar(shard: Shard) -> TarIndex:
    """Index a shard by one pass over its headers.

    Images are the members with an extension of ``IMAGE_SUFFIXES``. The label of ``a/b.c.jpg`` is in ``a/b.c.cls`` or
    ``a/b.c.json`` (key "label"), or else, as WebDataset counts a key up to the first dot, in ``a/b.cls`` or
    ``a/b.json``; .cls wins. Hidden members and ``__MACOSX`` are passed over.

    Raises:
        DataError: not a plain tar file, cut short, without images, or with links or a label that cannot be read.
    """
    place = redact(shard.place)
    with shard.local(quiet=False) as path, path.open("rb") as stream:
        try:
            return _scan(place, stream)
        except tarfile.TarError as error:
            stream.seek(0)
            raise _no_tar(place, stream.read(4), error) from error


def _no_tar(shard: str, start: bytes, error: tarfile.TarError) -> DataError:
    if not start:
        return DataError(f"The shard {shard} is empty (0 bytes).", "Write or copy it again.")
    if start[:2] == b"\x1f\x8b" or start in (b"\xfd7zX", b"\x28\xb5\x2f\xfd") or start[:3] == b"BZh":
        return DataError(
            f"The shard {shard} is compressed; images can only be read out of a plain .tar.",
            "Decompress it (images hardly shrink), or name it alone to have it extracted.",
        )
    return DataError(
        f"The shard {shard} is damaged or cut short ({error}).",
        "Write or copy it again.",
    )


def _scan(shard: str, stream: BinaryIO) -> TarIndex:
    images: list[tarfile.TarInfo] = []
    classes_of: dict[str, str] = {}
    others = 0
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=StrictTarInfo) as tar:
        for member in tar:
            stem, extension = os.path.splitext(member.name)
            parts = member.name.split("/")
            if member.isdir() or any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in parts):
                continue
            if member.islnk() or member.issym() or member.issparse():
                raise DataError(
                    f"{shard}: member {member.name!r} is a link or a sparse file.",
                    "Pack it again, with plain files only (tar --hard-dereference --dereference).",
                )
            if member.isfile() and extension.lower() in IMAGE_SUFFIXES:
                images.append(member)
            elif member.isfile() and extension.lower() in (".cls", ".json"):
                label = _label_in(shard, tar, member)
                if label is not None and (extension.lower() == ".cls" or stem not in classes_of):
                    classes_of[stem] = label
                others += label is None
            else:
                others += 1
    if not images:
        raise DataError(
            f"The shard {shard} holds no images ({others} other files).", "Leave it out, or write or copy it again."
        )
    classes = class_order(set(classes_of.values()))
    number = {name: i for i, name in enumerate(classes)}
    labels = [_label_of(image.name, classes_of) for image in images]
    return TarIndex(
        bytes=os.fstat(stream.fileno()).st_size,
        names=[image.name for image in images],
        offsets=[image.offset_data for image in images],
        sizes=[image.size for image in images],
        labels=[-1 if label is None else number[label] for label in labels],
        classes=classes,
        others=others,
    )


def class_order(names: set[str]) -> list[str]:
    """Sort class names; by value where all are integers."""
    numeric = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if numeric else 0, name))


def _label_of(image: str, classes_of: dict[str, str]) -> str | None:
    folder, slash, name = image.rpartition("/")
    exact = os.path.splitext(image)[0]
    return classes_of.get(exact, classes_of.get(f"{folder}{slash}{name.split('.', 1)[0]}"))


def _label_in(shard: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
    """The class that a .cls or .json member names; None for a .json without "label"."""
    stream = tar.extractfile(member)
    content = stream.read(_LABEL_BYTES + 1) if stream is not None else b""
    why = "is not a label: an integer or a line of text"
    try:
        text = content.decode("utf-8").strip()
        if member.name.lower().endswith(".json"):
            why = 'is not a JSON object with an integer or a text as its "label"'
            label = json.loads(text)
            label = label.get("label") if isinstance(label, dict) else None
            if label is None:
                return None
            if isinstance(label, bool) or not isinstance(label, int | str):
                raise ValueError(why)
            text = str(label).strip()
        if not text or "\n" in text or len(content) > _LABEL_BYTES:
            raise ValueError(why)
    except ValueError as error:
        raise DataError(f"{shard}: member {member.name!r} {why}.", "Write its label again, or leave it out.") from error
    return text


# ----------------------------------------------------------------------------------------------- read


class _OpenFile:
    """A file that stays open as long as somebody holds this; reads have no position, so threads and forks share it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes, or fewer at the end of the file."""
        parts: list[bytes] = []
        while size and (part := os.pread(self._descriptor, size, offset)):  # 2 GiB at most at once
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _open(shard: Shard) -> _OpenFile:
    with shard.local() as path:
        return _OpenFile(path)


_opened_local = lru_cache(maxsize=_OPEN_LOCAL)(_open)
_opened_remote = lru_cache(maxsize=_OPEN_REMOTE)(_open)


def read_member(shard: Shard, offset: int, size: int) -> bytes | None:
    """Return the bytes of a member; None where the shard has no member of that size there, since it has changed.

    The shard stays open for the next read.

    Args:
        shard: to read from; a remote one is fetched where it is not at hand.
        offset, size: of the member's data in bytes.
    """
    file = _opened_remote(shard) if shard.remote else _opened_local(shard)
    content = file.read(offset - BLOCK, BLOCK + size)
    return content[BLOCK:] if len(content) == BLOCK + size and _is_header(content[:BLOCK], size) else None


def _is_header(block: bytes, size: int) -> bool:
    try:
        checksum = int(block[148:156].split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return False
    if sum(block) - sum(block[148:156]) + 8 * 32 != checksum:
        return False
    if block[124] & 0x80:  # 8 GiB and more, in base 256
        return int.from_bytes(block[125:136], "big") == size
    return int(block[124:136].split(b"\0")[0].strip() or b"0", 8) == size
