"""From a source in a spec to an index of its images: a folder, an archive or shards."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from openmae.data.archives import resolve_source
from openmae.data.folder import Listing, Skipped, Tally, counted, first_names, list_entries, list_folder
from openmae.data.formats import IMAGE_SUFFIXES
from openmae.data.image_index import ImageIndex
from openmae.data.index import class_order, index_images, label_by_folder, report_skipped, warn_of_odd_classes
from openmae.data.patterns import expand_braces, is_shards
from openmae.data.shards.reading import MEMBER, Ahead, ShardedIndex
from openmae.data.shards.tar_index import FORMAT, NoImagesError, Shard, TarIndex, fits, index_file, scan_tar
from openmae.errors import DataError
from openmae.inputs import irregular
from openmae.storage import cache
from openmae.storage.printable import printable_name
from openmae.storage.urls import checked, is_remote, join, parent_of, redact

log = logging.getLogger("openmae")

_LOOKUPS = 16  # at once
_INDEXES = "indexes.jsonl"


def open_index(source: str, labelled: bool | None) -> ImageIndex:
    """Index the images of a folder, an archive, a pattern of shards or a folder of shards; log what is not read of it.

    Args:
        source: as a spec names it.
        labelled: as ``index_images`` takes it.

    Raises:
        DataError: the source cannot be used.
    """
    text = os.fspath(source).strip()
    shown = printable_name(redact(text))
    if is_shards(text):
        index: ImageIndex = index_shards(expand_braces(text), labelled, shown)
    else:
        folder = Path(resolve_source(text))
        extracted = folder.is_relative_to(cache.root())
        if not extracted:
            shown = printable_name(str(folder))
        try:
            index = _open_folder(folder, labelled, shown)
        except DataError as error:
            if not extracted:
                raise
            # not where it lies in the cache, but the name that the user knows
            raise DataError(*(text.replace(str(folder), shown) for text in (error.problem, error.fix))) from error
    report_skipped(index, shown)
    return index


def _open_folder(folder: Path, labelled: bool | None, shown: str) -> ImageIndex:
    tars = sorted(entry.path for entry in list_entries(folder) if entry.name.endswith(".tar") and not entry.is_dir())
    if not tars:
        return index_images(folder, labelled, shown)
    listing = list_folder(folder)
    if not _shards_prevail(folder, tars, listing):
        log.warning(
            "%s holds images and also %s (%s): the images are read, the tar files are not. To read these as shards, "
            "put them into a folder of their own.",
            *(shown, counted(len(tars), "tar file"), first_names([os.path.basename(tar) for tar in tars])),
        )
        return index_images(folder, labelled, shown)
    try:
        index = index_shards(tars, labelled, shown)
    except NoImagesError:
        if not listing.images:
            raise
        log.warning("%s: its tar files hold no images (%s); the images beside them are read.",
                    shown, first_names([os.path.basename(tar) for tar in tars]))  # fmt: skip
        return index_images(folder, labelled, shown)
    if listing.images:
        log.warning(
            "%s holds shards and also %s: the shards are read, the images are not (%s). To read the images, name "
            "their folder, or move the shards elsewhere.",
            *(shown, counted(len(listing.images), "image"), first_names(listing.images)),
        )
    beside = tuple(kind for kind in listing.skipped if kind.kind != ".tar")
    return replace(index, skipped=(*index.skipped, *beside), results=listing.results)


def _shards_prevail(folder: Path, tars: Sequence[str], listing: Listing) -> bool:
    """Say whether the shards are the data, since they are more than twice as large as the images beside them.

    An archive that was extracted and left beside its images has about their size: it does not prevail.
    """
    least = sum(map(_size, tars)) / 2
    for path in listing.images:
        least -= _size(folder / path)
        if least <= 0:
            return False
    return True


def _size(path: str | Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # a link that leads nowhere: whoever reads it says so
        return 0


def index_shards(places: Sequence[str], labelled: bool | None, pattern: str) -> ShardedIndex:
    """Index the images of tar files.

    Labels come from .cls and .json members (see ``scan_tar``), or, where there are none at all, from class folders in
    the names of the images. Classes are numbered as ``mae dataset pack`` wrote them, else by their sorted names.

    Args:
        places: local paths or URLs, in order.
        labelled: True demands a label for every image, False ignores labels, None takes those that there are.
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
    numbers, classes, labelled_by = _labels(shards, indexes, members, labelled, pattern)
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
        labelled_by=labelled_by,
        skipped=_skipped(shards, indexes),
        pattern=pattern,
        shards=shards,
        shard_of=np.repeat(np.arange(len(shards), dtype=np.int32), sizes),
        offsets=np.concatenate([np.array(index.offsets, np.int64) for index in indexes]),
        sizes=np.concatenate([np.array(index.sizes, np.int64) for index in indexes]),
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
    from openmae.storage.listing import RemoteFile, list_files, look

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
        except OSError as error:  # of the cache: what cannot be read of a shard is a DataError
            log.warning(
                "The index of %s cannot be kept in %s (%s): it is kept in memory, and made again by the next run. To "
                "avoid that, set %s to a folder that can be written.",
                *(pattern, printable_name(str(cache.root())), error.strerror or error, cache.CACHE_VARIABLE),
            )
            with ThreadPoolExecutor(_LOOKUPS) as pool:
                return list(pool.map(_new_index, shards))
        lines = (entry / _INDEXES).read_text(encoding="utf-8").splitlines()
    indexes = [TarIndex.from_json(line, shard.bytes) for line, shard in zip(lines, shards, strict=True)]
    return [index for index in indexes if index is not None]


def _new_index(shard: Shard) -> TarIndex:
    """From beside a remote shard, else from a pass over the shard."""
    if shard.remote and shard.indexed:
        from openmae.storage.filesystem import ask, open_filesystem

        url = index_file(shard.place)
        filesystem = open_filesystem(url)
        content: bytes = ask(url, filesystem._cat_file(filesystem._strip_protocol(url)))
        index = TarIndex.from_json(content.decode("utf-8", "replace"), shard.bytes)
        if index is not None:
            return index
    return scan_tar(shard)


def _skipped(shards: Sequence[Shard], indexes: Sequence[TarIndex]) -> tuple[Skipped, ...]:
    """What the shards hold besides images and labels."""
    tally = Tally()
    for shard, index in zip(shards, indexes, strict=True):
        for kind, (count, example) in index.skipped.items():
            tally.add(kind, f"{shard.name}{MEMBER}{example}", count)
        if index.others and not index.skipped:  # an index of an older OpenMAE
            tally.add("other", shard.name, index.others)
    return tally.skipped()


def _labels(
    shards: Sequence[Shard], indexes: Sequence[TarIndex], members: Sequence[str], labelled: bool | None, pattern: str
) -> tuple[tuple[int, ...] | None, tuple[str, ...], str]:
    """Class numbers of all images, the names of the classes, and what they are taken from; without labels nothing."""
    if labelled is False:
        return None, (), ""
    if shared := sum(index.shared for index in indexes):
        log.warning(
            "%s: %s a sample with another one, as 1.a.jpg and 1.b.jpg do: each is an image of its own, with the "
            "sample's label.",
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
        place = f"{pattern}{MEMBER}{wrapper}" if wrapper else pattern
        numbers, classes = label_by_folder(names, labelled, place, ("no .cls or .json", fix))
        return numbers, classes, "folders" if classes else ""
    classes = tuple(lists.pop()) if len(lists) == 1 else tuple(class_order({name for names in lists for name in names}))
    warn_of_odd_classes(classes, pattern)
    number = {name: i for i, name in enumerate(classes)}
    labels: list[int] = []
    for index in indexes:
        own = [number[name] for name in index.classes]
        labels += [own[label] if label >= 0 else -1 for label in index.labels]
    if unlabelled := labels.count(-1):
        example = printable_name(members[labels.index(-1)])
        text = f"{unlabelled:,} of {len(labels):,} images in {pattern} have no label, such as {example}"
        if labelled:
            raise DataError(f"{text}.", "Write a .cls beside each, or leave them out.")
        log.warning("%s. kNN and probe accuracy leave them out.", text)
    if unlabelled == len(labels):
        return None, (), ""
    return tuple(labels), classes, ".cls and .json"


def _unwrapped(members: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The folders that wrap all members, and the names without them; a lone class folder does not wrap."""
    wrapper = ""
    while True:
        first, _, rest = members[0].partition("/")
        prefix = f"{first}/"
        if "/" not in rest or not all(name.startswith(prefix) and name.count("/") > 1 for name in members):
            return wrapper, members
        wrapper += prefix
        members = [name[len(prefix) :] for name in members]
