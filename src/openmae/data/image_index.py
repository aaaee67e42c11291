"""The index of a data set: where its images are, and what they are labelled."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from openmae.data.decode import MAX_MEGAPIXELS, CorruptImage, Picture, check_length, in_words
from openmae.data.folder import Skipped
from openmae.inputs import open_regular
from openmae.storage.printable import printable_name

Numbers = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageIndex:
    """The images below a folder, in one order on every machine.

    Attributes:
        root: the folder.
        paths: posix paths relative to ``root``, sorted.
        labels: the class number of each path, -1 where it has none, or None where there are no labels.
        class_names: names by class number; empty without labels.
        labelled_by: what the labels were taken from, such as "folders"; empty without labels.
        skipped: files of the source that are not read, by kind.
        results: folders and pictures in the source that are not read, since OpenMAE has written them.
        max_pixels: width x height of the largest image that is decoded.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    labelled_by: str = field(default="", compare=False)
    skipped: tuple[Skipped, ...] = field(default=(), compare=False)
    results: tuple[str, ...] = field(default=(), compare=False)
    max_pixels: int = MAX_MEGAPIXELS * 1_000_000

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def place(self) -> str:
        """Where the images are, as messages name it."""
        return printable_name(str(self.root))

    @property
    def unlabelled(self) -> list[int]:
        """The numbers of images without a label where others have one."""
        return [number for number, label in enumerate(self.labels or ()) if label < 0]

    @property
    def digest(self) -> str:
        """Tells two data sets apart by their files' names, order and classes: ``1,281,167 images (3f2a91c0)``."""
        content = "\n".join((*self.paths, *self.class_names, *map(str, self.labels or ())))
        return f"{len(self):,} images ({hashlib.sha256(content.encode(errors='surrogateescape')).hexdigest()[:8]})"

    def full_name(self, path: str) -> str:
        """Return the name, printable, that one of ``paths`` has in lists that hold several data sets."""
        return printable_name(str(self.root / path))

    def holds(self, full_name: str) -> bool:
        """Say whether ``full_name`` may be of this data set."""
        return full_name.startswith(f"{self.place}{os.sep}")

    def file(self, number: int) -> Path:
        """Return the full path of image ``number``."""
        return self.root / self.paths[number]

    def picture(self, number: int) -> Picture:
        """Open image ``number``; CorruptImage where its header cannot be read."""
        return Picture(self.file(number), max_pixels=self.max_pixels)

    def read(self, number: int) -> bytes:
        """Return the file of image ``number`` as it is stored; CorruptImage where that cannot be read."""
        try:
            with open_regular(self.file(number)) as file:
                check_length(self.file(number), file, self.max_pixels)
                return file.read()
        except OSError as error:
            raise CorruptImage(self.file(number), in_words(error)) from error

    def key(self, number: int) -> str:
        """Return the path of image ``number`` within the data set, whatever that is stored in."""
        return self.paths[number]

    def subset(self, numbers: Numbers) -> Self:
        """Return the images ``numbers``, in that order."""
        labels = None if self.labels is None else tuple(self.labels[number] for number in numbers)
        return replace(self, paths=tuple(self.paths[number] for number in numbers), labels=labels)

    def shuffled(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return an epoch's order: a permutation of the numbers of all images, int64 [N]."""
        return rng.permutation(len(self))

    def prepare(self, now: Numbers, soon: Numbers) -> None:
        """Make images ``now`` ready to be read, and begin to do so for ``soon``; files of a folder always are."""
