"""Index the images of shards, given the names of the shards."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from openmae.data.folder_listing import SkippedCounter, SkippedFiles, first_names
from openmae.data.formats import IMAGE_SUFFIXES
from openmae.data.index import label_by_folder, sort_class_names, warn_of_odd_classes
from openmae.data.shards.reading import MEMBER, ShardedIndex, ShardPrefetcher
from openmae.data.shards.tar_index import FORMAT, INDEX_SUFFIX, Shard, TarIndex, fits, index_file, scan_tar
from openmae.errors import DataError
from openmae.inputs import irregular
from openmae.storage import cache
from openmae.storage.printable import counted, printable_name
from openmae.storage.urls import checked, is_remote, join, parent_of, redact, split_query

log = logging.getLogger("openmae")

_LOOKUPS = 16  # concurrent requests
_INDEXES = "indexes.jsonl"

_Status = tuple[str, int, bool]  # stamp, size in bytes and whether there is an index next to a shard


def index_shards(places: Sequence[str], labelled: bool | None, pattern: str) -> ShardedIndex:
    """Index the images of tar files.

    Labels come from .cls and .json members (see ``scan_tar``); if there are none at all, from class folders in the
    names of the images. Classes keep the numbers that ``mae dataset pack`` gave them, otherwise they are numbered in
    the order of their sorted names.

    Args:
        places: local paths or URLs, in order.
        labelled: True requires a label for every image, False ignores labels, None uses labels if there are any.
        pattern: the source as the user wrote it, for messages.

    Raises:
        DataError: a shard is missing, named twice, damaged or empty, or labels are required but missing.
    """
    places = [checked(place) if "://" in place else os.path.abspath(os.path.expanduser(place)) for place in places]
    _check_names(places, pattern)
    shards = _look_up(places, pattern)
    indexes = _indexes_of(shards, pattern)
    shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), [len(index.names) for index in indexes])
    members = [name.removeprefix("./") for index in indexes for name in index.names]
    numbers, classes, labelled_by = _labels(shards, indexes, members, labelled, pattern)
    remote = any(shard.remote for shard in shards)
    return ShardedIndex(
        root=Path() if remote else Path(places[0]).parent,
        paths=tuple(f"{shards[i].name}{MEMBER}{name}" for i, name in zip(shard_of, members, strict=True)),
        labels=numbers,
        class_names=classes,
        labelled_by=labelled_by,
        skipped=_skipped(shards, indexes),
        pattern=pattern,
        shards=shards,
        shard_of=shard_of,
        offsets=np.concatenate([np.array(index.offsets, np.int64) for index in indexes]),
        sizes=np.concatenate([np.array(index.sizes, np.int64) for index in indexes]),
        prefetcher=ShardPrefetcher() if remote else None,
    )


def _check_names(places: Sequence[str], pattern: str) -> None:
    if len({is_remote(place) for place in places}) > 1:
        raise DataError(f"{pattern} names both local and remote shards.", "Copy them to one place.")
    if others := [place for place in places if not split_query(place)[0].endswith(".tar")]:
        raise DataError(
            f"{pattern} names {redact(others[0])}, but a shard is a plain .tar file.",
            "Write a pattern such as train-{000000..000099}.tar.",
        )
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise DataError(f"{pattern} names {redact(twice)} twice.", "Name each shard once.")


def _look_up(places: Sequence[str], pattern: str) -> tuple[Shard, ...]:
    """Return the shards with their sizes and stamps; raise a single error for all missing ones."""
    paths = [split_query(place)[0] for place in places]
    start = os.path.commonprefix(paths).rfind("/") + 1  # noqa: RUF071
    found = _remote_status(places) if is_remote(places[0]) else _local_status(places)
    if missing := [redact(place) for place in places if place not in found]:
        raise DataError(
            f"{pattern} names {len(places):,} shards, but {len(missing):,} of them do not exist: "
            f"{first_names(missing)}.",
            "Copy them there, or name only those that exist, such as part-{000..041}.tar.",
        )
    return tuple(Shard(path[start:], place, *found[place]) for path, place in zip(paths, places, strict=True))


def _local_status(places: Sequence[str]) -> dict[str, _Status]:
    found = {}
    for place in places:
        with suppress(FileNotFoundError):
            if kind := irregular(place):
                fix = "Leave it out, or write or copy it again."
                raise DataError(f"The shard {place} is {kind}, not a tar file.", fix)
            status = os.stat(place)
            stamp = f"{status.st_size}-{status.st_mtime_ns}"
            found[place] = stamp, status.st_size, os.path.exists(index_file(place))
    return found


def _remote_status(places: Sequence[str]) -> dict[str, _Status]:
    """List each folder once if the store supports it, otherwise look up each file."""
    from openmae.storage.listing import RemoteFile, list_files, look

    found: dict[str, RemoteFile] = {}
    if places[0].lower().startswith("http"):
        with ThreadPoolExecutor(_LOOKUPS) as pool:
            looks = pool.map(lambda place: look(place, (INDEX_SUFFIX,)), places)
            for place, answer in zip(places, looks, strict=True):
                found.update(zip((place, index_file(place)), answer.files, strict=False))
    else:
        for folder in dict.fromkeys(map(parent_of, places)):
            found.update({join(folder, file.name): file for file in list_files(folder)})
    return {
        place: (f"{found[place].version}-{found[place].size}", found[place].size or 0, index_file(place) in found)
        for place in places
        if place in found
    }


def _indexes_of(shards: Sequence[Shard], pattern: str) -> list[TarIndex]:
    """Return the index next to each local shard, otherwise one from the cache, which is made if necessary."""
    found = [None if shard.remote else _index_beside(shard) for shard in shards]
    lacking = [shard for shard, index in zip(shards, found, strict=True) if index is None]
    made = iter(_cached_indexes(lacking, pattern) if lacking else ())
    return [index or next(made) for index in found]


def _index_beside(shard: Shard) -> TarIndex | None:
    """Read the index next to a shard; None if there is none, or if it is not an index of this shard."""
    if not shard.indexed:
        return None
    place = index_file(shard.place)
    if shard.remote:
        from openmae.storage.filesystem import ask, open_filesystem

        filesystem = open_filesystem(place)
        content = ask(place, filesystem._cat_file(filesystem._strip_protocol(place)))
    else:
        content = Path(place).read_bytes()
    index = TarIndex.from_json(content.decode("utf-8", "replace"), shard.bytes)
    # A remote shard would have to be downloaded to compare it with its index.
    return index if index is not None and (shard.remote or fits(index, shard)) else None


def _cached_indexes(shards: Sequence[Shard], pattern: str) -> list[TarIndex]:
    """Return the indexes of shards from one common cache entry."""
    stamps = "".join(f"{redact(shard.place)}\0{shard.stamp}\0" for shard in shards)
    kinds = " ".join(sorted(IMAGE_SUFFIXES))  # depends on the installed decoders
    key = hashlib.sha256(f"{FORMAT}\0{kinds}\0{stamps}".encode("utf-8", "surrogateescape")).hexdigest()[:20]
    entry = cache.root() / cache.SOURCES / f"shards-{key}"

    def build(folder: Path) -> None:
        scanned = sum(not (shard.remote and shard.indexed) for shard in shards)
        if scanned:
            log.info("Indexing %s (%d shards); this is done once.", pattern, scanned)
        with (folder / _INDEXES).open("w", encoding="utf-8") as out:
            out.writelines(index.to_json() for index in _new_indexes(shards))

    with cache.holding():
        try:
            cache.obtain(entry, f"{pattern} (index)", build)
        except OSError as error:  # the cache cannot be written; an unreadable shard is a DataError
            log.warning(
                "The index of %s cannot be written to %s (%s), so the next run will make it again. Set %s to a "
                "writable folder to avoid that.",
                *(pattern, printable_name(str(cache.root())), error.strerror or error, cache.CACHE_VARIABLE),
            )
            return _new_indexes(shards)
        lines = (entry / _INDEXES).read_text(encoding="utf-8").splitlines()
    return [TarIndex.from_json(line, shard.bytes) or scan_tar(shard) for line, shard in zip(lines, shards, strict=True)]


def _new_indexes(shards: Sequence[Shard]) -> list[TarIndex]:
    """Read the indexes next to remote shards, and scan the other shards."""
    with ThreadPoolExecutor(_LOOKUPS) as pool:
        return list(pool.map(lambda shard: _index_beside(shard) or scan_tar(shard), shards))


def _skipped(shards: Sequence[Shard], indexes: Sequence[TarIndex]) -> tuple[SkippedFiles, ...]:
    counter = SkippedCounter()
    for shard, index in zip(shards, indexes, strict=True):
        for kind, (count, example) in index.skipped.items():
            counter.add(kind, f"{shard.name}{MEMBER}{example}", count)
    return counter.skipped()


def _labels(
    shards: Sequence[Shard], indexes: Sequence[TarIndex], members: Sequence[str], labelled: bool | None, pattern: str
) -> tuple[tuple[int, ...] | None, tuple[str, ...], str]:
    """Return the class numbers of all images, the class names, and the origin of the labels."""
    if labelled is False:
        return None, (), ""
    if shared := sum(index.shared for index in indexes):
        log.warning(
            "%s: %s a sample with another one, as 1.a.jpg and 1.b.jpg do: each is an image with the label of the "
            "sample.",
            *(pattern, counted(shared, "image", "shares", "share")),
        )
    if faults := sum(index.faults for index in indexes):
        shard, index = next((shard, index) for shard, index in zip(shards, indexes, strict=True) if index.faults)
        text = f"{faults:,} of {len(members):,} images in {pattern} have a label that cannot be read: in {shard.name}, "
        if labelled:
            raise DataError(f"{text}{index.fault}.", "Write these labels again, one for each image, as .cls.")
        log.warning("%s%s. They have no label.", text, index.fault)
    lists = {tuple(index.classes) for index in indexes if index.classes}
    if not lists:
        fix = "Give every image a .cls or .json (mae dataset pack does), or a class folder in its name (cat/1.jpg)."
        wrapper, names = _unwrapped(members)
        place = f"{pattern}{MEMBER}{printable_name(wrapper)}" if wrapper else pattern
        numbers, classes = label_by_folder(names, labelled, place, ("no .cls or .json", fix))
        return numbers, classes, "folders" if classes else ""
    classes = max(lists) if len(lists) == 1 else tuple(sort_class_names({name for names in lists for name in names}))
    warn_of_odd_classes(classes, pattern)
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[index.classes[label]] if label >= 0 else -1 for index in indexes for label in index.labels]
    if unlabelled := labels.count(-1):
        example = printable_name(members[labels.index(-1)])
        text = f"{unlabelled:,} of {len(labels):,} images in {pattern} have no label, such as {example}"
        if labelled:
            raise DataError(f"{text}.", "Write a .cls next to each, or leave them out.")
        log.warning("%s. kNN and probe accuracy ignore them.", text)
    if unlabelled == len(labels):
        return None, (), ""
    return tuple(labels), classes, ".cls and .json"


def _unwrapped(members: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the common parent folders of all members, except a single class folder, and the names without them."""
    folders = os.path.commonprefix([name.split("/")[:-2] for name in members])  # noqa: RUF071
    wrapper = "".join(f"{folder}/" for folder in folders)
    return wrapper, [name.removeprefix(wrapper) for name in members]
