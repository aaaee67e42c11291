"""Notices about images that are read, but not as their file may intend; each kind is reported once per run."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple

from openmae.data.decode import Picture
from openmae.data.image_index import ImageIndex

log = logging.getLogger("openmae")

_FIRST = {
    "pages": "%s has %s, of which only the first is read.",
    "warning": "%s is read, although Pillow warns: %s",
}
_ALL = {
    "pages": "At least %d images have several pages or frames, of which only the first is read; "
    "`mae dataset check` lists them.",
    "warning": "At least %d images are read, although Pillow warns; `mae dataset check` lists them.",
}


class Remark(NamedTuple):
    """What is remarkable about one image.

    Attributes:
        path: relative, as in ``ImageIndex.paths``.
        kind: "pages" (the file holds more than the image that is read) or "warning" (of Pillow).
        text: such as "3 pages", or the warning.
    """

    path: str
    kind: str
    text: str

    def log(self, name: str) -> None:
        """Log it about the image ``name``."""
        log.warning(_FIRST[self.kind], name, self.text)


def remarks_on(picture: Picture, path: str) -> list[Remark]:
    """Return what is remarkable about a picture whose pixels have been decoded."""
    found = [Remark(path, "pages", picture.pages)] if picture.pages else []
    return found + [Remark(path, "warning", text) for text in picture.warnings[:1]]


class Remarks:
    """Logs the first remark of each kind, and after one pass over the data how many images have one.

    Of several processes one logs, which sees its share of the images.

    Args:
        index: the data set.
    """

    def __init__(self, index: ImageIndex) -> None:
        self._index = index
        self._paths: dict[str, set[str]] = {}
        self._counted = False

    def record(self, remarks: Iterable[Remark]) -> None:
        """Add the remarks of a batch."""
        for remark in remarks:
            if remark.kind not in self._paths:
                remark.log(self._index.full_name(remark.path))
            self._paths.setdefault(remark.kind, set()).add(remark.path)

    def end_pass(self) -> None:
        """Report the number of images after the first pass over the data, if it is more than one."""
        if not self._counted:
            for kind, paths in self._paths.items():
                if len(paths) > 1:
                    log.warning(_ALL[kind], len(paths))
        self._counted = True
