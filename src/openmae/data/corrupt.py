"""The record of image files that could not be decoded."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path

from openmae.data.decode import MAX_KEY
from openmae.data.image_index import ImageIndex
from openmae.errors import DataError
from openmae.storage import layout
from openmae.storage.printable import encodable

log = logging.getLogger("openmae")


class CorruptFiles:
    """Counts the corrupt files of one data set and ends the run when they are too many.

    The list file is the shared record: ranks and resumed runs add to one list, each file once.

    Args:
        index: the data set.
        folder: the results folder; ``corrupt_files.txt`` is written there (printable path, tab, reason).
        max_fraction: the largest bearable share of the data set.
    """

    def __init__(self, index: ImageIndex, folder: Path, max_fraction: float) -> None:
        self._index = index
        self._list = folder / layout.CORRUPT_LIST
        self._max_fraction = max_fraction
        self._known: set[str] = set()

    @property
    def count(self) -> int:
        """Corrupt files of this data set so far."""
        return len(self._known)

    def record(self, corrupt: Iterable[tuple[str, str]]) -> None:
        """Add (relative path, reason) pairs, as a ``Batch`` carries them.

        Raises:
            DataError: more than ``max_fraction`` of the data set is corrupt, or all of it.
        """
        news = {self._index.full_name(path): encodable(reason) for path, reason in corrupt}
        if news.keys() <= self._known:
            return
        self._list.parent.mkdir(parents=True, exist_ok=True)
        text = self._list.read_text(encoding="utf-8", errors="replace") if self._list.exists() else ""
        listed = dict(line.split("\t", 1) for line in text.split("\n") if "\t" in line)
        fresh = {path: reason for path, reason in news.items() if path not in listed}
        # No lock: one small append is atomic, and a file that two ranks list at once still counts once.
        with self._list.open("a", encoding="utf-8") as stream:
            stream.write("".join(f"{path}\t{reason}\n" for path, reason in fresh.items()))
        for path, reason in fresh.items():
            log.warning("Skipped a corrupt image: %s (%s)", path, reason)
        self._known = {path for path in (*listed, *fresh) if self._index.holds(path)}
        none_left = self.count == len(self._index)
        if self.count > self._max_fraction * len(self._index) or none_left:
            path, reason = next(iter(news.items()))
            too_large = "To read larger images, raise dataset.max_megapixels. " if MAX_KEY in reason else ""
            limit = f"more than dataset.max_corrupt_fraction={self._max_fraction:g} allows"
            raise DataError(
                f"{self.count} of {len(self._index)} images in {self._index.place} are corrupt "
                f"({self.count / len(self._index):.2%}), {'so none is left' if none_left else limit}; the latest: "
                f"{path} ({reason}).",
                f"{too_large}Replace or remove the files listed in {self._list}, or allow them: "
                f"dataset.max_corrupt_fraction={math.ceil(100 * self.count / len(self._index)) / 100:g}.",
            )
