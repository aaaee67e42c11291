"""Record images that cannot be decoded, and warn of files with several images."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path

from openmae.data.decode import MAX_KEY
from openmae.data.index import ImageIndex
from openmae.errors import DataError
from openmae.results.report import Text
from openmae.storage import layout
from openmae.storage.printable import counted, encodable

log = logging.getLogger("openmae")


class CorruptFiles:
    """The list of the corrupt files of a data set, which ends the run if there are too many.

    All ranks and resumed runs share the list, ``corrupt_files.txt`` in the results folder (printable path, tab,
    reason). ``max_fraction`` is the largest tolerated fraction of corrupt files.
    """

    def __init__(self, index: ImageIndex, folder: Path, max_fraction: float) -> None:
        self._index = index
        self._list = folder / layout.CORRUPT_LIST
        self._max_fraction = max_fraction
        self._known: set[str] = set()

    @property
    def count(self) -> int:
        """The number of corrupt files so far."""
        return len(self._known)

    def record(self, corrupt: Iterable[tuple[int, str]]) -> None:
        """Add pairs of an image's number and the reason.

        Raises:
            DataError: more than ``max_fraction`` of the files are corrupt, or all of them.
        """
        new = {self._index.full_name(number): encodable(reason) for number, reason in corrupt}
        if new.keys() <= self._known:
            return
        self._list.parent.mkdir(parents=True, exist_ok=True)
        listed = _read_list(self._list)
        fresh = {path: reason for path, reason in new.items() if path not in listed}
        # No lock: a small append is atomic, and a file that two ranks add at the same time still counts once.
        with self._list.open("a", encoding="utf-8") as stream:
            stream.write("".join(f"{path}\t{reason}\n" for path, reason in fresh.items()))
        for path, reason in fresh.items():
            log.warning("Skipped a corrupt image: %s (%s)", path, reason)
        self._known = {path for path in (*listed, *fresh) if self._index.holds(path)}
        total = len(self._index)
        if self.count <= self._max_fraction * total and self.count < total:
            return
        path, reason = next(iter(new.items()))
        too_large = f"To read larger images, raise {MAX_KEY}. " if MAX_KEY in reason else ""
        limit = f"more than dataset.max_corrupt_fraction={self._max_fraction:g} allows"
        raise DataError(
            f"{self.count} of {total} images in {self._index.place} are corrupt ({self.count / total:.2%}), "
            f"{'so none is left' if self.count == total else limit}; the latest: {path} ({reason}).",
            f"{too_large}Replace or remove the files listed in {self._list}, or tolerate them: "
            f"dataset.max_corrupt_fraction={math.ceil(100 * self.count / total) / 100:g}.",
        )


def _read_list(path: Path) -> dict[str, str]:
    """Return the reason of each corrupt file in a list, by printable path."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return dict(line.split("\t", 1) for line in text.split("\n") if "\t" in line)


def describe_images(index: ImageIndex, folder: Path) -> str:
    """Return the number of images, and of those that ``corrupt_files.txt`` in ``folder`` lists as unreadable."""
    corrupt = sum(map(index.holds, _read_list(folder / layout.CORRUPT_LIST)))
    return counted(len(index), "image") + (f", {corrupt:,} of them unreadable" if corrupt else "")


def corrupt_files_text(indexes: Iterable[ImageIndex], folder: Path) -> list[Text]:
    """Return the number of unreadable images of each source, for a report; empty if none has been found."""
    if not _read_list(folder / layout.CORRUPT_LIST):
        return []
    counts = "\n\n".join(f"{index.place}: {describe_images(index, folder)}." for index in indexes)
    return [Text("Unreadable images", f"{counts}\n\n{layout.CORRUPT_LIST} names them, with the reasons.")]


def warn_of_further_images(index: ImageIndex, number: int, further: str) -> None:
    """Warn that only the first image of file ``number`` is read; ``further`` is its ``ImageFile.further_images``."""
    log.warning(
        "%s has %s, of which only the first is read. `mae dataset check` lists all such files.",
        *(index.full_name(number), further),
    )
