"""From a source in a spec to an index of its images: a folder, an archive or shards."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from openmae.data.formats import IMAGE_SUFFIXES
from openmae.data.images import ImageIndex, find_images, index_images, label_by_folder
from openmae.data.patterns import expand_braces, is_shards
from openmae.data.shards import MEMBER, Ahead, ShardedIndex
from openmae.data.sources import resolve_source
from openmae.data.tar_index import FORMAT, Shard, TarIndex, class_order, fits, index_file, scan_tar
from openmae.errors import DataError
from openmae.inputs import irregular
from openmae.storage import cache
from openmae.storage.urls import checked, is_remote, join, parent_of, redact

log = logging.getLogger("openmae")

_LOOKUPS = 16  # at once
_INDEXES = "indexes.jsonl"


def open_index(source: str, labelled: bool | None) -> ImageIndex:
    """Index the images of a folder, an archive, a pattern of shards or a folder that holds nothing but shards.

    Args:
        source: as a spec names it.
        labelled: as ``index_images`` takes it.

    Raises:
        DataError: the source cannot be used.
    """
    text = os.fspath(source).strip()
    if is_shards(text):
        return index_shards(expand_braces(text), labelled, redact(text))
    folder = Path(resolve_source(text))
    tars = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if tars and not find_images(folder):
        return index_shards([str(path) for path in tars], labelled, redact(text))
    try:
        return index_images(folder, labelled)
    except DataError as error:
        if os.path.isdir(os.path.expanduser(text)):
            raise
        # not where it lies in the cache, but the name that the user knows
        raise DataError(error.problem.replace(str(folder), redact(text)), error.fix) from error


def index_shards(places: Sequence[str], labelled: bool | None, pattern: str) -> ShardedIndex:
    """Index the images of tar files.

    Labels come from .cls and .json members (see ``scan_tar``), or, where there are none at all, from class folders in
    the names of the images. Classes are numbered as ``mae dataset pack`` wrote them, else by their sorted names.

    Args:
        places: local paths or URLs, in order.
        labelled: True demands labels, False ignores them, None takes them when every image has one.
        pattern: what the user wrote, for messages.

    Raises:
        DataError: a shard is missing, named twice, damaged or empty, or labels are demanded and lacking.
    """
    places = [checked(place) if "://" in place else os.path.abspath(os.path.expanduser(place)) for place in places]
    _check_names(places, pattern)
    shards = _look_up(places, pattern)
    indexes = _indexes_of(shards, pattern)
    sizes = [len(index.names) for index in indexes]
    members = [name.removeprefix("./") for index in indexes for name in index.names]
    numbers, classes = _labels(indexes, members, labelled, pattern)
    remote = any(shard.remote for shard in shards)
    return ShardedIndex(
        root=Path() if remote else Path(places[0]).parent,
        paths=tuple(
            f"{shard.name}{MEMBER}{name.removeprefix('./')}"
            for shard, index in zip(shards, indexes, strict=True)
            for name in index.names
        ),
        labels=numbers,
        class_names=classes,
        pattern=pattern,
        shards=shards,
        shard_of=np.repeat(np.arange(len(shards), dtype=np.int32), sizes),
        offsets=np.concatenate([np.array(index.offsets, np.int64) for index in indexes]),
        sizes=np.concatenate([np.array(index.sizes, np.int64) for index in indexes]),
        others=sum(index.others for index in indexes),
        ahead=Ahead() if remote else None,
    )


def _check_names(places: Sequence[str], pattern: str) -> None:
    if len({is_remote(place) for place in places}) > 1:
        raise DataError(f"{pattern} names both local and remote shards.", "Copy them to one place.")
    if others := [place for place in places if not place.partition("?")[0].endswith(".tar")]:
        raise DataError(
            f"{pattern} names {redact(others[0])}, but a shard is a plain .tar file.",
            "Write a pattern such as train-{000000..000099}.tar.",
        )
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise DataError(f"{pattern} names {redact(twice)} twice.", "Name each shard once.")


def _look_up(places: Sequence[str], pattern: str) -> tuple[Shard, ...]:
    """The shards with their sizes and stamps; all that are missing at once."""
    first, last = min(places), max(places)  # what these two have in common all have
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    start = first[:same].rfind("/") + 1
    facts = _remote_facts(places) if is_remote(places[0]) else [_local_facts(place) for place in places]
    if missing := [redact(place) for place, fact in zip(places, facts, strict=True) if fact is None]:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(
            f"{pattern} names {len(places):,} shards, but {len(missing):,} of them do not exist: {some}.",
            "Copy them there, or name only those that exist, such as part-{000..041}.tar.",
        )
    return tuple(
        Shard(place[start:].partition("?")[0], place, *fact)
        for place, fact in zip(places, facts, strict=True)
        if fact is not None
    )


_Facts = tuple[str, int, bool]  # what changes when a shard does, its size in bytes, an index lies beside it


def _local_facts(place: str) -> _Facts | None:
    try:
        facts = os.stat(place)
    except FileNotFoundError:
        return None
    if kind := irregular(place):
        raise DataError(f"The shard {place} is {kind}, not a tar file.", "Leave it out, or write or copy it again.")
    return f"{facts.st_size}-{facts.st_mtime_ns}", facts.st_size, os.path.exists(index_file(place))


def _remote_facts(places: Sequence[str]) -> list[_Facts | None]:
    """By one listing of each folder where the store has listings, else by a question for each file."""
    from openmae.storage.objects import RemoteFile, list_files, look

    found: dict[str, RemoteFile] = {}
    if places[0].lower().startswith("http"):
        with ThreadPoolExecutor(_LOOKUPS) as pool:
            looks = pool.map(lambda place: look(place, (index_file(""),)), places)
            for place, answer in zip(places, looks, strict=True):
                found.update(zip((place, index_file(place)), answer.files, strict=False))
    else:
        for folder in dict.fromkeys(map(parent_of, places)):
            found.update({join(folder, file.name): file for file in list_files(folder)})
    return [
        (f"{found[place].version}-{found[place].size}", found[place].size or 0, index_file(place) in found)
        if place in found
        else None
        for place in places
    ]


def _indexes_of(shards: Sequence[Shard], pattern: str) -> list[TarIndex]:
    """The index beside each local shard; for others one that is in the cache, or made and kept there."""
    found = [_index_beside(shard) for shard in shards]
    lacking = [shard for shard, index in zip(shards, found, strict=True) if index is None]
    if lacking:
        made = iter(_cached_indexes(lacking, pattern))
        found = [index or next(made) for index in found]
    return [index for index in found if index is not None]


def _index_beside(shard: Shard) -> TarIndex | None:
    if shard.remote or not shard.indexed:
        return None
    index = TarIndex.from_json(Path(index_file(shard.place)).read_text(encoding="utf-8", errors="replace"), shard.bytes)
    return index if index is not None and fits(index, shard) else None


def _cached_indexes(shards: Sequence[Shard], pattern: str) -> list[TarIndex]:
    """One cache entry for all shards of a source."""
    stamps = "".join(f"{redact(shard.place)}\0{shard.stamp}\0" for shard in shards)
    kinds = " ".join(sorted(IMAGE_SUFFIXES))  # another installation may take more files for images
    key = hashlib.sha256(f"{FORMAT}\0{kinds}\0{stamps}".encode("utf-8", "surrogateescape")).hexdigest()[:20]
    entry = cache.root() / cache.SOURCES / f"shards-{key}"

    def build(folder: Path) -> None:
        scanned = sum(not (shard.remote and shard.indexed) for shard in shards)
        if scanned:
            log.info("Reading what %s hold (%d shards); this is done once.", pattern, scanned)
        with ThreadPoolExecutor(_LOOKUPS) as pool, (folder / _INDEXES).open("w", encoding="utf-8") as out:
            out.writelines(index.to_json() for index in pool.map(_new_index, shards))

    with cache.holding():
        try:
            cache.obtain(entry, f"{pattern} (index)", build)
        except OSError as error:
            raise DataError(
                f"The index of {pattern} could not be stored in {cache.root()}: {error.strerror or error}.",
                f"Make room and see to its permissions, or set {cache.CACHE_VARIABLE} to another folder.",
            ) from error
        lines = (entry / _INDEXES).read_text(encoding="utf-8").splitlines()
    indexes = [TarIndex.from_json(line, shard.bytes) for line, shard in zip(lines, shards, strict=True)]
    return [index for index in indexes if index is not None]


def _new_index(shard: Shard) -> TarIndex:
    """From beside a remote shard, else from a pass over the shard."""
    if shard.remote and shard.indexed:
        from openmae.storage.remote import ask, open_filesystem

        url = index_file(shard.place)
        filesystem = open_filesystem(url)
        content: bytes = ask(url, filesystem._cat_file(filesystem._strip_protocol(url)))
        index = TarIndex.from_json(content.decode("utf-8", "replace"), shard.bytes)
        if index is not None:
            return index
    return scan_tar(shard)


def _labels(
    indexes: Sequence[TarIndex], members: Sequence[str], labelled: bool | None, pattern: str
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Class numbers of all images and the names of the classes; None and () without labels."""
    if labelled is False:
        return None, ()
    lists = {tuple(index.classes) for index in indexes if index.classes}
    if not lists:
        fix = "Give every image a .cls or .json (mae dataset pack does), or a class folder in its name (cat/1.jpg)."
        return label_by_folder(_unwrapped(members), labelled, pattern, ("no .cls or .json", fix))
    classes = list(lists.pop()) if len(lists) == 1 else class_order({name for names in lists for name in names})
    number = {name: i for i, name in enumerate(classes)}
    numbers: list[int] = []
    for index in indexes:
        own = [number[name] for name in index.classes]
        numbers += [own[label] if label >= 0 else -1 for label in index.labels]
    if unlabelled := numbers.count(-1):
        example = members[numbers.index(-1)]
        text = f"{unlabelled:,} of {len(numbers):,} images in {pattern} have no label, such as {example}"
        if labelled:
            raise DataError(f"{text}.", "Write a .cls beside each, or leave them out.")
        log.warning("%s: all labels are left aside.", text)
        return None, ()
    return tuple(numbers), tuple(classes)


def _unwrapped(members: Sequence[str]) -> Sequence[str]:
    """Names without the folders that wrap all of them, but with the class folder of a set of one class."""
    while True:
        first, _, rest = members[0].partition("/")
        wrapper = f"{first}/"
        if "/" not in rest or not all(name.startswith(wrapper) and name.count("/") > 1 for name in members):
            return members
        members = [name[len(wrapper) :] for name in members]
