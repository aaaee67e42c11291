"""What images a folder holds, and what they are labelled."""

from __future__ import annotations

import csv
import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
import numpy.typing as npt

from openmae.data.decode import MAX_MEGAPIXELS, CorruptImage, Picture, check_length, in_words
from openmae.data.formats import IMAGE_SUFFIXES
from openmae.errors import DataError
from openmae.inputs import open_regular

log = logging.getLogger("openmae")

LABELS_FILE = "labels.csv"
_LAYOUTS = f"Make one folder per class (cat/1.jpg, dog/2.jpg), or a {LABELS_FILE} with columns path,label."

Numbers = Sequence[int] | npt.NDArray[np.int64]


# ---------------------------------------------------------------------------------------------- index


@dataclass(frozen=True)
class ImageIndex:
    """The images below a folder, in one order on every machine.

    Attributes:
        root: the folder.
        paths: posix paths relative to ``root``, sorted.
        labels: the class number of each path, or None where there are no labels.
        class_names: names by class number; empty without labels.
        max_pixels: width x height of the largest image that is decoded.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    max_pixels: int = MAX_MEGAPIXELS * 1_000_000

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def place(self) -> str:
        """Where the images are, as messages name it."""
        return str(self.root)

    @property
    def digest(self) -> str:
        """Tells two data sets apart by their files' names, order and classes: ``1,281,167 images (3f2a91c0)``."""
        content = "\n".join((*self.paths, *self.class_names, *map(str, self.labels or ())))
        return f"{len(self):,} images ({hashlib.sha256(content.encode(errors='surrogateescape')).hexdigest()[:8]})"

    def full_name(self, path: str) -> str:
        """Return the name that one of ``paths`` has in lists that hold several data sets."""
        return str(self.root / path)

    def holds(self, full_name: str) -> bool:
        """Say whether ``full_name`` may be of this data set."""
        return full_name.startswith(f"{self.root}{os.sep}")

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


def find_images(folder: Path) -> list[str]:
    """Return the relative posix paths of all images below ``folder``, sorted.

    Hidden entries and ``__MACOSX`` are passed over; links to folders are followed, each folder once.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        facts = os.stat(where)
        if (facts.st_dev, facts.st_ino) in seen:
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if _visible(name))
        below = Path(where).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        found += [
            prefix + name for name in files if _visible(name) and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)


def index_images(folder: Path, labelled: bool | None) -> ImageIndex:
    """Index the images below ``folder``.

    Labels come from ``labels.csv`` (columns path,label) or else from class folders: the first folder of
    each path names the class. Class numbers follow the sorted names (by value where a labels.csv has
    integers only). One wrapping folder, as archives often have, is stepped into.

    Args:
        folder: a local folder (see ``resolve_source``).
        labelled: True demands labels, False ignores them, None takes them when there are any: a
            labels.csv, or two or more class folders that hold all the images.

    Raises:
        DataError: no images, no labels where they are demanded, or a labels.csv that does not fit.
    """
    root = _unwrapped(folder)
    paths = find_images(root)
    if not paths:
        kinds = " ".join(sorted(extension[1:] for extension in IMAGE_SUFFIXES))
        raise DataError(
            f"The folder {folder} holds no images ({kinds}).", "Put images into it, or name another folder."
        )
    if labelled is False:
        return ImageIndex(root, tuple(paths))
    if (root / LABELS_FILE).is_file():
        return _read_labels(root, paths)
    labels, names = label_by_folder(paths, labelled, str(root), (f"no {LABELS_FILE}", _LAYOUTS))
    return ImageIndex(root, tuple(paths), labels, names)


def label_by_folder(
    paths: Sequence[str], labelled: bool | None, place: str, otherwise: tuple[str, str]
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Return the class number of each path, after its first folder, and the names of the classes, sorted.

    Args:
        paths: posix, relative.
        labelled: True demands labels, None takes them where two or more folders hold all the images.
        place: where the images are, for the error's text.
        otherwise: what else would have labelled them and is not there, and what to do.

    Raises:
        DataError: no labels where they are demanded.
    """
    loose = [path for path in paths if "/" not in path]
    names = sorted({path.split("/", 1)[0] for path in paths if "/" in path})
    if loose or (labelled is None and len(names) < 2):
        if labelled is None:
            return None, ()
        what = f"{len(loose)} of {len(paths)} images lie outside of class folders, such as {loose[0]}"
        raise DataError(f"The images in {place} have no labels: {what}; {otherwise[0]}.", otherwise[1])
    number = {name: i for i, name in enumerate(names)}
    return tuple(number[path.split("/", 1)[0]] for path in paths), tuple(names)


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _unwrapped(folder: Path) -> Path:
    """Step into a lone folder, unless it is itself a class folder (one without folders or labels)."""
    while True:
        entries = [entry for entry in folder.iterdir() if _visible(entry.name)]
        if len(entries) != 1 or not entries[0].is_dir():
            return folder
        inner = [entry for entry in entries[0].iterdir() if _visible(entry.name)]
        if not any(entry.is_dir() or entry.name == LABELS_FILE for entry in inner):
            return folder
        folder = entries[0]


def _read_labels(root: Path, found: Sequence[str]) -> ImageIndex:
    table = root / LABELS_FILE
    rows = _label_rows(table)
    known = set(found)
    missing = [path for path in rows if path not in known and not (root / path).is_file()]
    if missing:
        raise DataError(
            f"{table} names {len(missing)} of {len(rows)} files that do not exist: {', '.join(missing[:3])}.",
            "Paths are relative to the folder of the table. Correct them or drop those rows.",
        )
    if len(known - rows.keys()):
        log.warning("%s: %d images are not in the table and are left out.", table, len(known - rows.keys()))
    values = set(rows.values())
    numeric = all(value.isdecimal() for value in values)
    names = sorted(values, key=lambda value: (int(value) if numeric else 0, value))
    number = {name: i for i, name in enumerate(names)}
    paths = tuple(sorted(rows))
    return ImageIndex(root, paths, tuple(number[rows[path]] for path in paths), tuple(names))


def _label_rows(table: Path) -> dict[str, str]:
    """Return label by relative path."""
    rows: dict[str, str] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            if not {"path", "label"} <= set(reader.fieldnames or ()):
                raise DataError(
                    f"{table} must begin with a line that names the columns path and label; "
                    f"found: {', '.join(reader.fieldnames or ()) or 'nothing'}.",
                    "Write path,label as its first line.",
                )
            for row in reader:
                path, label = (row["path"] or "").strip(), (row["label"] or "").strip()
                _check_row(table, reader.line_num, path, label)
                path = PurePosixPath(path).as_posix()
                if rows.setdefault(path, label) != label:
                    raise DataError(
                        f"{table}, line {reader.line_num}: {path} is labelled {label!r} here and {rows[path]!r} above.",
                        "Keep one row for each file.",
                    )
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} is not a UTF-8 table: {error}.", "Save it as CSV in UTF-8.") from error
    if not rows:
        raise DataError(f"{table} has no rows.", "Add one line path,label for each image.")
    return rows


def _check_row(table: Path, line: int, path: str, label: str) -> None:
    if not path or not label:
        raise DataError(
            f"{table}, line {line}: path {path!r} and label {label!r} must not be empty.",
            "Fill the row or drop it.",
        )
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise DataError(
            f"{table}, line {line}: {path} is not below the folder of the table.",
            "Write paths relative to the folder of the table.",
        )
