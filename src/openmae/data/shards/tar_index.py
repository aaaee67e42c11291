"""What a tar file of images holds and where: with it, any image is one read away, and nothing is unpacked.

The index of a shard is made by one pass over its headers and kept as JSON: beside the shard where
``mae dataset pack`` wrote it, in the cache otherwise.
"""

from __future__ import annotations

import json
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from openmae.data.archives import StrictTarInfo, tar_parts
from openmae.data.folder import Tally, is_image, is_visible
from openmae.data.index import class_order
from openmae.errors import DataError
from openmae.storage.printable import printable_name
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


class NoImagesError(DataError):
    """A tar file that holds no images."""


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
        skipped: these by kind: how many, and one of them.
        faults: images whose .cls or .json cannot be read, and that have no other label.
        fault: what is wrong with the first one.
        shared: images that have the label of their sample together with other images.
    """

    bytes: int
    names: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    classes: list[str]
    others: int = 0
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    faults: int = 0
    fault: str = ""
    shared: int = 0

    def to_json(self) -> str:
        """One line; the same index gives the same text."""
        content = asdict(self)
        for name in ("skipped", "faults", "fault", "shared"):  # an older OpenMAE reads an index without them
            if not content[name]:
                del content[name]
        return json.dumps({"format": FORMAT, **content}, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str, bytes: int) -> TarIndex | None:
        """Read a line of ``to_json`` about a shard of ``bytes``; None where it is of another version or shard."""
        try:
            content = json.loads(text)
            if content.pop("format") != FORMAT or content["bytes"] != bytes:
                return None
            skipped = {str(kind): (int(n), str(example)) for kind, (n, example) in content.pop("skipped", {}).items()}
            index = cls(**content, skipped=skipped)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
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

    Images are the members with a suffix of ``IMAGE_SUFFIXES``. The label of ``a/b.c.jpg`` is in ``a/b.c.cls`` or
    ``a/b.c.json`` (key "label"), or else, as WebDataset counts a key up to the first dot, in ``a/b.cls`` or
    ``a/b.json``; .cls wins. A label that cannot be read is noted: not every run needs it. Hidden members and
    ``__MACOSX`` are passed over. Several tar files written one after the other into one are read to the last.

    Raises:
        DataError: not a plain tar file, cut short, without images, or with links; or it cannot be read.
    """
    place = printable_name(redact(shard.place))
    try:
        with shard.local(quiet=False) as path, path.open("rb") as stream:
            try:
                return _scan(place, stream)
            except tarfile.TarError as error:
                stream.seek(0)
                raise _no_tar(place, stream.read(4), error) from error
    except OSError as error:
        raise DataError(
            f"The shard {place} cannot be read ({error.strerror or error}).", "See to its permissions and its disk."
        ) from error


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
    labels = _Labels()
    tally = Tally()
    for tar in tar_parts(tarfile.open(fileobj=stream, mode="r:", tarinfo=StrictTarInfo), shard):  # noqa: SIM115
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
            elif not (member.isfile() and labels.take(tar, member)):
                tally.add_file(member.name)
    skipped = tally.counts()
    others = sum(count for count, _ in skipped.values())
    if not images:
        raise NoImagesError(
            f"The shard {shard} holds no images ({others} other files).", "Leave it out, or write or copy it again."
        )
    names = [labels.of(image.name) for image in images]
    faults = [
        fault for image, name in zip(images, names, strict=True) if not name and (fault := labels.fault(image.name))
    ]
    classes = class_order(labels.classes())
    number = {name: i for i, name in enumerate(classes)}
    return TarIndex(
        bytes=os.fstat(stream.fileno()).st_size,
        names=[image.name for image in images],
        offsets=[image.offset_data for image in images],
        sizes=[image.size for image in images],
        labels=[-1 if name is None else number[name] for name in names],
        classes=classes,
        others=others,
        skipped=skipped,
        faults=len(faults),
        fault=faults[0] if faults else "",
        shared=labels.shared(image.name for image in images),
    )


class _Labels:
    """The .cls and .json members of a shard, by the name of their sample."""

    def __init__(self) -> None:
        self._class_of: dict[str, str] = {}
        self._fault_of: dict[str, str] = {}

    def take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
        """Read a member; False where it is none that could be a label."""
        stem, suffix = os.path.splitext(member.name)
        if suffix.lower() not in (".cls", ".json"):
            return False
        stream = tar.extractfile(member)
        content = stream.read(_LABEL_BYTES + 1) if stream is not None else b""
        try:
            label = _label_in(content, suffix.lower())
        except (ValueError, RecursionError) as error:
            why = f"{error}" if type(error) is ValueError else _NO_LABEL[suffix.lower()]
            self._fault_of.setdefault(stem, f"member {member.name!r} {why}")
            return True
        if label is not None and (suffix.lower() == ".cls" or stem not in self._class_of):
            self._class_of[stem] = label
        return label is not None

    def classes(self) -> set[str]:
        """Return the names of all classes."""
        return set(self._class_of.values())

    def of(self, image: str) -> str | None:
        """Return the class of an image."""
        return next((self._class_of[key] for key in _keys(image) if key in self._class_of), None)

    def shared(self, images: Iterable[str]) -> int:
        """Return how many images have one label together with others, by a key that ends at the first dot."""
        keys = ((exact, key) for exact, key in map(_keys, images) if exact not in self._class_of)
        counts = Counter(key for _, key in keys if key in self._class_of)
        return sum(count for count in counts.values() if count > 1)

    def fault(self, image: str) -> str | None:
        """Return what is wrong with the label of an image."""
        return next((self._fault_of[key] for key in _keys(image) if key in self._fault_of), None)


def _keys(image: str) -> tuple[str, str]:
    """The names that the label of an image may have, without the suffix."""
    folder, slash, name = image.rpartition("/")
    return os.path.splitext(image)[0], f"{folder}{slash}{name.split('.', 1)[0]}"


_NO_LABEL = {
    ".cls": "is not a label: an integer or a line of text",
    ".json": 'is not a JSON object with an integer or a text as its "label"',
}


def _label_in(content: bytes, suffix: str) -> str | None:
    """The class that a .cls or .json member names; None for a .json without "label"; ValueError for no label."""
    if len(content) > _LABEL_BYTES:
        raise ValueError(_NO_LABEL[suffix])
    text = content.decode("utf-8").strip()
    if suffix == ".json":
        label = json.loads(text)
        label = label.get("label") if isinstance(label, dict) else None
        if label is None:
            return None
        if isinstance(label, list):
            raise ValueError(f'has a list of {len(label)} as its "label", and an image is trained on one label')
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError(_NO_LABEL[suffix])
        text = str(label).strip()
    if not text or "\n" in text:
        raise ValueError(_NO_LABEL[suffix])
    return printable_name(text)


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
