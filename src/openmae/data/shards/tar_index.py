"""The index of a shard: the names and offsets of its images, so that each can be read without unpacking the tar file.

An index is made in one pass over the headers of the tar file and stored as JSON: next to the shard if
``mae dataset pack`` wrote it, otherwise in the cache.
"""

from __future__ import annotations

import json
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from openmae.data.archives import StrictTar
from openmae.data.folder_listing import SkippedCounter, file_kind, is_image, is_visible
from openmae.data.index import sort_class_names
from openmae.errors import DataError
from openmae.storage.printable import printable_name
from openmae.storage.urls import append_suffix, is_remote, redact

FORMAT = "openmae-shard-1"
INDEX_SUFFIX = ".index.json"
BLOCK = 512  # the header of a member is one block, immediately before its data
_MAX_LABEL_BYTES = 1 << 20
_OPEN_LOCAL = 64  # shards that a process keeps open
_OPEN_REMOTE = 12  # fewer, since an open file takes disk space even after the cache has deleted it
_downloading = threading.RLock()


def _after_fork() -> None:
    global _downloading
    _downloading = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


class NoImagesError(DataError):
    """A tar file that holds no images."""


@dataclass(frozen=True)
class Shard:
    """A tar file at ``place``, a local path or a URL.

    ``name`` is its name in the paths of its images. ``stamp`` changes whenever the file does. ``indexed`` is true if
    there is an index file next to it.
    """

    name: str
    place: str
    stamp: str
    bytes: int
    indexed: bool

    @property
    def remote(self) -> bool:
        """True if ``place`` is a URL."""
        return is_remote(self.place)

    @property
    def shown(self) -> str:
        """Its place in messages, without secrets."""
        return printable_name(redact(self.place) if self.remote else self.place)

    def fetch(self) -> None:
        """Download a remote shard into the cache, where it stays until the space is needed.

        Raises:
            DataError: the shard cannot be downloaded.
        """
        with self.local():
            pass

    @contextmanager
    def local(self, *, quiet: bool = True) -> Iterator[Path]:
        """Yield the local file, downloaded if necessary; it exists at least until the end of the block.

        ``quiet`` hides the progress bar of the download, since a run shows its own progress.
        """
        if not self.remote:
            yield Path(self.place)
            return
        from openmae.storage import cache
        from openmae.storage.download import fetch

        # One download at a time, since each uses many connections and much memory.
        with _downloading, cache.holding():
            yield fetch(self.place, quiet=quiet)


@dataclass(frozen=True)
class TarIndex:
    """The images of one shard, in their order in the file.

    Attributes:
        bytes: size of the shard.
        names: member names of the images.
        offsets: offset of each image in bytes.
        sizes: size of each image in bytes.
        labels: position of each image's class in ``classes``; -1 without a label.
        classes: class names of the entire data set if ``mae dataset pack`` wrote the shard, otherwise those in the .cls
            and .json members of the shard.
        skipped: members that are neither an image nor a label: kind -> (number, example).
        faults: number of images whose .cls or .json cannot be read and that have no other label.
        fault: the reason for the first of them.
        shared: number of images that share a label with other images of the same sample.
    """

    bytes: int
    names: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    classes: list[str]
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    faults: int = 0
    fault: str = ""
    shared: int = 0

    def to_json(self) -> str:
        """Return the index as one line of JSON; equal indexes have equal lines."""
        content = asdict(self)
        for name in ("skipped", "faults", "fault", "shared"):  # older versions of OpenMAE do not know these
            if not content[name]:
                del content[name]
        return json.dumps({"format": FORMAT, **content}, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str, bytes: int) -> TarIndex | None:
        """Read a line of ``to_json``; None if it is invalid, or of another format or shard size than ``bytes``."""
        try:
            content = json.loads(text)
            if content.pop("format") != FORMAT or content["bytes"] != bytes:
                return None
            content.pop("others", None)  # from older versions of OpenMAE
            skipped = {str(kind): (int(n), str(example)) for kind, (n, example) in content.pop("skipped", {}).items()}
            index = cls(**content, skipped=skipped)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        columns = (index.names, index.offsets, index.sizes, index.labels)
        return index if len({len(column) for column in columns}) == 1 else None


def index_file(shard: str) -> str:
    """Return the path or URL of the index next to a shard."""
    return append_suffix(shard, INDEX_SUFFIX)


def fits(index: TarIndex, shard: Shard) -> bool:
    """Return whether the first and the last image are at their offsets in ``index``; the others are not checked."""
    ends = {0, len(index.names) - 1} if index.names else set()
    return all(read_member(shard, index.offsets[number], index.sizes[number]) is not None for number in ends)


def scan_tar(shard: Shard) -> TarIndex:
    """Index a shard in one pass over its headers.

    Images are the members with an image suffix. The label of ``a/b.c.jpg`` is in ``a/b.c.cls`` or ``a/b.c.json`` (key
    "label"), otherwise in ``a/b.cls`` or ``a/b.json``, since WebDataset ends a key at the first dot; .cls takes
    precedence over .json. Labels that cannot be read are only counted, since not every run needs them. Hidden members
    and ``__MACOSX`` are skipped. Concatenated tar files are all read.

    Raises:
        DataError: the shard cannot be read, is not a plain tar file, is truncated, has no images or contains links.
    """
    try:
        with shard.local(quiet=False) as path, path.open("rb") as stream:
            try:
                return _scan(shard.shown, stream)
            except tarfile.TarError as error:
                stream.seek(0)
                raise _not_a_tar(shard.shown, stream.read(4), error) from error
    except OSError as error:
        raise DataError(
            f"The shard {shard.shown} cannot be read ({error.strerror or error}).",
            "Check its permissions and its disk.",
        ) from error


def _not_a_tar(shard: str, start: bytes, error: tarfile.TarError) -> DataError:
    if not start:
        return DataError(f"The shard {shard} is empty (0 bytes).", "Write or copy it again.")
    if start[:2] == b"\x1f\x8b" or start in (b"\xfd7zX", b"\x28\xb5\x2f\xfd") or start[:3] == b"BZh":
        return DataError(
            f"The shard {shard} is compressed; images can only be read from a plain .tar.",
            "Decompress it (images hardly shrink), or name it as the only source to have it extracted.",
        )
    return DataError(f"The shard {shard} is damaged or truncated ({error}).", "Write or copy it again.")


def _scan(shard: str, stream: BinaryIO) -> TarIndex:
    images: list[tarfile.TarInfo] = []
    labels = _Labels()
    skipped = SkippedCounter()
    tar = StrictTar.open(fileobj=stream, mode="r:")
    tar.place = shard
    for member in tar:
        if member.isdir() or not all(part == "." or is_visible(part) for part in member.name.split("/")):
            continue
        if member.islnk() or member.issym() or member.issparse():
            raise DataError(
                f"{shard}: member {member.name!r} is a link or a sparse file.",
                "Pack it again, with plain files only (tar --hard-dereference --dereference).",
            )
        if member.isfile() and is_image(member.name):
            images.append(member)
        elif not (member.isfile() and labels.add(tar, member)):
            skipped.add(file_kind(member.name), member.name)
    if not images:
        others = sum(count for count, _ in skipped.counts().values())
        raise NoImagesError(
            f"The shard {shard} holds no images ({others} other files).", "Leave it out, or write or copy it again."
        )
    found = [labels.of(image.name) for image in images]
    faults = [fault for image in images if (fault := labels.fault(image.name))]
    classes = sort_class_names(labels.classes)
    number = {name: i for i, name in enumerate(classes)}
    return TarIndex(
        bytes=os.fstat(stream.fileno()).st_size,
        names=[image.name for image in images],
        offsets=[image.offset_data for image in images],
        sizes=[image.size for image in images],
        labels=[-1 if name is None else number[name] for name in found],
        classes=classes,
        skipped=skipped.counts(),
        faults=len(faults),
        fault=faults[0] if faults else "",
        shared=labels.shared([image.name for image in images]),
    )


class _Labels:
    """The labels in the .cls and .json members of a shard, by member name without suffix."""

    def __init__(self) -> None:
        self._class_of: dict[str, str] = {}
        self._fault_of: dict[str, str] = {}

    @property
    def classes(self) -> set[str]:
        return set(self._class_of.values())

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
        """Read a member; return False if it is not a label."""
        stem, suffix = os.path.splitext(member.name)
        suffix = suffix.lower()
        if suffix not in (".cls", ".json"):
            return False
        stream = tar.extractfile(member)
        content = stream.read(_MAX_LABEL_BYTES + 1) if stream is not None else b""
        try:
            label = _read_label(content, suffix)
        except (ValueError, RecursionError) as error:
            why = f"{error}" if type(error) is ValueError else _NOT_A_LABEL[suffix]
            self._fault_of.setdefault(stem, f"member {member.name!r} {why}")
            return True
        if label is not None and (suffix == ".cls" or stem not in self._class_of):
            self._class_of[stem] = label
        return label is not None

    def of(self, image: str) -> str | None:
        """Return the class of an image."""
        return next((self._class_of[key] for key in _keys(image) if key in self._class_of), None)

    def fault(self, image: str) -> str | None:
        """Return the reason why an image has no label, if its label cannot be read."""
        if self.of(image):
            return None
        return next((self._fault_of[key] for key in _keys(image) if key in self._fault_of), None)

    def shared(self, images: list[str]) -> int:
        """Return how many images share a label, because their names are equal up to the first dot."""
        keys = ((exact, key) for exact, key in map(_keys, images) if exact not in self._class_of)
        counts = Counter(key for _, key in keys if key in self._class_of)
        return sum(count for count in counts.values() if count > 1)


def _keys(image: str) -> tuple[str, str]:
    """Return the names without suffix that the label member of an image may have."""
    folder, slash, name = image.rpartition("/")
    return os.path.splitext(image)[0], f"{folder}{slash}{name.split('.', 1)[0]}"


_NOT_A_LABEL = {
    ".cls": "is not a label: an integer or a line of text",
    ".json": 'is not a JSON object with an integer or a text as its "label"',
}


def _read_label(content: bytes, suffix: str) -> str | None:
    """Return the class in a .cls or .json member; None for a .json without "label". Raise ValueError if invalid."""
    if len(content) > _MAX_LABEL_BYTES:
        raise ValueError(_NOT_A_LABEL[suffix])
    text = content.decode("utf-8").strip()
    if suffix == ".json":
        label = json.loads(text)
        label = label.get("label") if isinstance(label, dict) else None
        if label is None:
            return None
        if isinstance(label, list):
            raise ValueError(f'has a list of {len(label)} as its "label", and an image is trained on one label')
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError(_NOT_A_LABEL[suffix])
        text = str(label).strip()
    if not text or "\n" in text:
        raise ValueError(_NOT_A_LABEL[suffix])
    return printable_name(text)


class _OpenFile:
    """A file that stays open while it is referenced. Threads and forks can share it: reads do not move a position."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes, or fewer at the end of the file."""
        parts: list[bytes] = []
        while size and (part := os.pread(self._descriptor, size, offset)):  # at most 2 GiB per call
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _open(shard: Shard) -> _OpenFile:
    with shard.local() as path:
        return _OpenFile(path)


_open_local = lru_cache(maxsize=_OPEN_LOCAL)(_open)
_open_remote = lru_cache(maxsize=_OPEN_REMOTE)(_open)


def read_member(shard: Shard, offset: int, size: int) -> bytes | None:
    """Return the bytes of a member; None if the shard has changed and there is no member of that size at the offset.

    ``offset`` and ``size`` are those of the member's data, in bytes. A remote shard is downloaded if it is not in the
    cache. The shard stays open for the next read.
    """
    file = _open_remote(shard) if shard.remote else _open_local(shard)
    content = file.read(offset - BLOCK, BLOCK + size)
    try:
        header = tarfile.TarInfo.frombuf(content[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:  # type: ignore[attr-defined]
        return None
    return content[BLOCK:] if len(content) == BLOCK + size and header.size == size else None
