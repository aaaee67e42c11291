"""Open a data source: a folder, an archive, a folder of shards or a pattern of shards."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from openmae.data.archives import resolve_source
from openmae.data.folder_listing import FolderListing, first_names, is_folder, list_entries, list_folder
from openmae.data.index import ImageIndex, index_folder, log_skipped
from openmae.data.shards.indexing import index_shards
from openmae.data.shards.patterns import expand_braces, is_shard_pattern
from openmae.data.shards.tar_index import NoImagesError
from openmae.errors import DataError
from openmae.storage import cache
from openmae.storage.printable import counted, printable_name
from openmae.storage.urls import redact

log = logging.getLogger("openmae")


def open_index(source: str, labelled: bool | None) -> ImageIndex:
    """Index the images of a source as written in a spec, and log what is not read; ``labelled`` as in ``index_folder``.

    Raises:
        DataError: the source cannot be used.
    """
    text = source.strip()
    shown = printable_name(redact(text))
    if is_shard_pattern(text):
        index: ImageIndex = index_shards(expand_braces(text), labelled, shown)
    else:
        folder = resolve_source(text)
        if not folder.is_relative_to(cache.root()):
            shown = printable_name(str(folder))
        try:
            index = _open_folder(folder, labelled, shown)
        except DataError as error:  # name the source as the user did, not its folder in the cache
            raise DataError(*(text.replace(str(folder), shown) for text in (error.problem, error.fix))) from error
    log_skipped(index, shown)
    return index


def _open_folder(folder: Path, labelled: bool | None, shown: str) -> ImageIndex:
    tars = sorted(entry.path for entry in list_entries(folder) if entry.name.endswith(".tar") and not is_folder(entry))
    if not tars:
        return index_folder(folder, labelled, shown)
    names = first_names([os.path.basename(tar) for tar in tars])
    listing = list_folder(folder)
    if not _shards_are_larger(folder, tars, listing):
        log.warning(
            "%s holds images and also %s (%s): only the images are read. To read the tar files as shards, move them "
            "into a separate folder.",
            *(shown, counted(len(tars), "tar file"), names),
        )
        return index_folder(folder, labelled, shown)
    try:
        index = index_shards(tars, labelled, shown)
    except NoImagesError:
        if not listing.images:
            raise
        log.warning("%s: its tar files hold no images (%s); the images next to them are read.", shown, names)
        return index_folder(folder, labelled, shown)
    if listing.images:
        log.warning(
            "%s holds shards and also %s (%s): only the shards are read. To read the images, name their folder, or "
            "move the shards to another folder.",
            *(shown, counted(len(listing.images), "image"), first_names(listing.images)),
        )
    beside = tuple(kind for kind in listing.skipped if kind.kind != ".tar")
    return replace(index, skipped=(*index.skipped, *beside), results=listing.results)


def _shards_are_larger(folder: Path, tars: Sequence[str], listing: FolderListing) -> bool:
    """Return whether the shards are more than twice as large as the images next to them.

    Otherwise the tar files are probably archives that the images were extracted from.
    """
    half = sum(map(_size, tars)) / 2
    return all(total < half for total in accumulate(_size(folder / path) for path in listing.images))


def _size(path: str | Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # a broken link, which is reported when it is read
        return 0
