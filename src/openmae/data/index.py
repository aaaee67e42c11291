"""The index of a data source: where its images are, and how they are labelled."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from openmae.data.decode import MAX_PIXELS, CorruptImage, ImageFile, check_length, describe_error
from openmae.data.folder_listing import (
    LABELS_FILE,
    FolderListing,
    SkippedFiles,
    describe_skipped,
    first_names,
    how_to_read,
    is_folder,
    list_entries,
    list_folder,
)
from openmae.data.formats import IMAGE_SUFFIXES, KNOWN_UNREAD_SUFFIXES
from openmae.data.label_table import read_label_table
from openmae.errors import DataError
from openmae.inputs import open_regular
from openmae.results.report import Cell, Table
from openmae.storage.printable import counted, listed, printable_name, same_name

log = logging.getLogger("openmae")

Numbers = Sequence[int] | npt.NDArray[np.int64]

_LAYOUTS = f"Make one folder per class (cat/1.jpg, dog/2.jpg), or a {LABELS_FILE} with columns path,label."
_YEAR = r"(19|20)\d\d"
_MONTH = r"(0?[1-9]|1[0-2])"
_DATE = re.compile(rf"{_YEAR}([-_. ]?(0[1-9]|1[0-2])([-_. ]?[0-3]\d)?(\D.*)?)?")
_CAMERA = re.compile(r"(?!\d{8}$)[1-9]\d\d[A-Z0-9_]{5}")  # DCF standard: 100CANON, 101APPLE
_TABLES = frozenset({".csv", ".tsv", ".txt", ".xls", ".xlsx", ".json"})
_SPLITS = frozenset(["train", "training", "val", "valid", "validation", "test", "testing", "eval", "evaluation"])


@dataclass(frozen=True)
class ImageIndex:
    """The images below a folder, in the same order on every machine.

    Attributes:
        root: the folder.
        paths: POSIX paths relative to ``root``, sorted.
        labels: the class number of each path, -1 for an image without a label; None for an unlabelled source.
        class_names: names by class number; empty without labels.
        labelled_by: the origin of the labels, such as "folders"; empty without labels.
        skipped: files of the source that are not read, by kind.
        results: folders in the source that hold results of OpenMAE and are not read.
        max_pixels: width x height of the largest image to decode.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    labelled_by: str = field(default="", compare=False)
    skipped: tuple[SkippedFiles, ...] = field(default=(), compare=False)
    results: tuple[str, ...] = field(default=(), compare=False)
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def place(self) -> str:
        """Name of the source in messages."""
        return printable_name(str(self.root))

    @property
    def remote(self) -> bool:
        """True if the images are downloaded while they are used."""
        return False

    @property
    def unlabelled(self) -> list[int]:
        """The images without a label, by number; empty for an unlabelled source."""
        return [number for number, label in enumerate(self.labels or ()) if label < 0]

    @property
    def digest(self) -> str:
        """A fingerprint of the file names, order and classes, such as ``1,281,167 images (3f2a91c0)``."""
        content = "\n".join((*self.paths, *self.class_names, *map(str, self.labels or ())))
        return f"{len(self):,} images ({hashlib.sha256(content.encode(errors='surrogateescape')).hexdigest()[:8]})"

    def full_name(self, number: int) -> str:
        """Return the printable name of image ``number``, unambiguous among several data sets."""
        return printable_name(str(self.file(number)))

    def holds(self, full_name: str) -> bool:
        """Return whether ``full_name`` is below the folder of this data set."""
        return full_name.startswith(f"{self.place}{os.sep}")

    def file(self, number: int) -> Path:
        """Return the full path of image ``number``; in shards, a name for messages."""
        return self.root / self.paths[number]

    def open(self, number: int) -> ImageFile:
        """Open image ``number``; raise CorruptImage if its header cannot be read."""
        return ImageFile(self.file(number), max_pixels=self.max_pixels)

    def read(self, number: int) -> bytes:
        """Return the encoded bytes of image ``number``; raise CorruptImage if they cannot be read."""
        try:
            with open_regular(self.file(number)) as file:
                check_length(self.file(number), file, self.max_pixels)
                return file.read()
        except OSError as error:
            raise CorruptImage(self.file(number), describe_error(error)) from error

    def version(self, number: int) -> str:
        """Return a text that changes whenever the content of image ``number`` does; raise OSError if it is gone."""
        path = self.file(number)
        status = os.stat(path)
        return f"{path}-{status.st_size}-{status.st_mtime_ns}"

    def key(self, number: int) -> str:
        """Return the path of image ``number`` in the data set, the same for files and shards."""
        return self.paths[number]

    def spread(self, most: int) -> range:
        """Return at most ``most`` of the images, by number, at equal distances."""
        return range(0, len(self), max(1, -(-len(self) // most)))

    def subset(self, numbers: Numbers) -> Self:
        """Return an index of only the images ``numbers``, in that order."""
        labels = None if self.labels is None else tuple(self.labels[number] for number in numbers)
        return replace(self, paths=tuple(self.paths[number] for number in numbers), labels=labels)

    def shuffled(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return the order of an epoch: a permutation of all images, int64 [N]."""
        return rng.permutation(len(self))

    def prepare(self, now: Numbers, soon: Numbers) -> None:
        """Make the images ``now`` readable, and start to prepare those needed ``soon``; does nothing for files."""


def index_folder(folder: Path, labelled: bool | None, shown: str = "") -> ImageIndex:
    """Index the images below ``folder``.

    Labels come from ``labels.csv`` (columns path,label), otherwise from class folders: the first folder of each path
    is its class. Classes are numbered in the order of their sorted names (of their values in a ``labels.csv`` with only
    integers). If the folder contains nothing but another folder, as in many archives, and that one is not a class
    folder, it is indexed instead.

    Args:
        folder: a local folder (see ``resolve_source``).
        labelled: True requires a label for every image, False ignores labels, None uses labels if there are any: a
            labels.csv, or two or more folders, unless their names are dates, splits or those of a camera.
        shown: printable name of the folder in messages; default: its path.

    Raises:
        DataError: a folder cannot be read, there are no images, labels are required but missing, or labels.csv does not
            match the images.
    """
    root, listing = _unwrapped(folder)
    paths = tuple(listing.images)
    if not paths:
        raise _no_images(folder, listing)
    index = ImageIndex(root, paths, skipped=listing.skipped, results=listing.results)
    if labelled is False:
        return index
    table = root / LABELS_FILE
    if table.is_file():
        label_of = read_label_table(table, paths)
        names = sort_class_names(set(label_of.values()))
        warn_of_odd_classes(names, str(table))
        number = {name: i for i, name in enumerate(names)}
        labels = tuple(number[label] for label in label_of.values())
        return replace(index, paths=tuple(label_of), labels=labels, class_names=tuple(names), labelled_by=LABELS_FILE)
    place = (shown or printable_name(str(folder))) + printable_name(str(root).removeprefix(str(folder)))
    for entry in list_entries(root):
        stem, suffix = os.path.splitext(entry.name.lower())
        if stem in ("label", "labels") and suffix in _TABLES:
            log.warning(
                "%s/%s is not read. Labels are only read from a table named %s.", place, entry.name, LABELS_FILE
            )
    numbers, classes = label_by_folder(paths, labelled, place, (f"no {LABELS_FILE}", _LAYOUTS))
    return replace(index, labels=numbers, class_names=classes, labelled_by="folders" if classes else "")


def label_by_folder(
    paths: Sequence[str], labelled: bool | None, place: str, alternative: tuple[str, str]
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Return the class number of each path, given by its first folder, and the sorted names of the classes.

    Args:
        paths: relative POSIX paths.
        labelled: True requires a label for every image; None uses class folders if there are two or more, and images
            outside of them get the number -1.
        place: printable name of the folder that the paths are relative to.
        alternative: for the error message, the other kind of labels that was not found, and the proposed fix.

    Raises:
        DataError: labels are required but missing.
    """
    folders = [path.partition("/")[0] if "/" in path else "" for path in paths]
    name_of = {folder: unicodedata.normalize("NFC", printable_name(folder)) for folder in set(folders)}
    class_of = [name_of[folder] for folder in folders]
    names = sorted(set(class_of) - {""})
    loose = [path for path, name in zip(paths, class_of, strict=True) if not name]
    if labelled and loose:
        what = f"{len(loose)} of {len(paths)} images are outside of class folders, such as {printable_name(loose[0])}"
        raise DataError(f"The images in {place} have no labels: {what}; {alternative[0]}.", alternative[1])
    why_not = _why_no_classes(names, os.path.basename(place.rstrip("/")))
    splits = why_not and _are_splits(names)
    if labelled is None and (len(names) < 2 or why_not):
        if why_not:
            hint = " To read one split, name its folder." if splits else ""
            log.warning("%s: %s, so they are not used as classes.%s", place, why_not, hint)
        return None, ()
    if splits:
        problem = f"The only class folders of {place} are {' and '.join(names)}, the splits of a data set."
        raise DataError(problem, _how_to_split(names, place))
    if why_not:
        log.warning("%s: %s, but they are used as classes.", place, why_not)
    warn_of_odd_classes(names, place)
    if loose:
        log.warning(
            "%s: %s of %s images are outside of the %d class folders and have no label: %s. kNN and probe accuracy "
            "ignore them.",
            *(place, f"{len(loose):,}", f"{len(paths):,}", len(names), first_names(loose)),
        )
    number = {name: i for i, name in enumerate(names)} | {"": -1}
    return tuple(number[name] for name in class_of), tuple(names)


def sort_class_names(names: Collection[str]) -> list[str]:
    """Sort class names, by value if all are integers."""
    numeric = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if numeric else 0, name))


def warn_of_odd_classes(names: Collection[str], place: str) -> None:
    """Warn of class names that may be a mistake: names that differ only in case, and a class -1."""
    alike: dict[str, list[str]] = {}
    for name in sorted(names):
        alike.setdefault(same_name(name), []).append(name)
    if groups := [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]:
        log.warning(
            "%s: these class names differ only in upper and lower case, and are different classes: %s.",
            *(place, ", ".join(groups[:3])),
        )
    if "-1" in names and all(name.removeprefix("-").isdecimal() for name in names):
        log.warning("%s: -1 is used as a class. If it means 'no label', remove those images.", place)


def log_skipped(index: ImageIndex, place: str) -> None:
    """Log which files of a source are not read; ``place`` is its printable name."""
    if index.results:
        log.warning("%s: results of OpenMAE are not read as images: %s.", place, first_names(index.results))
    if index.skipped:
        count = sum(kind.count for kind in index.skipped)
        way = how_to_read(index.skipped)
        log.warning(
            "%s: %s; %s skipped: %s.%s",
            *(place, counted(len(index), "image", "is found", "are found")),
            *(counted(count, "file", "of another kind is", "of other kinds are"), describe_skipped(index.skipped)),
            f" To read them: {way}." if way else "",
        )


def skipped_files_table(indexes: Iterable[ImageIndex]) -> list[Table]:
    """Return the table of files that are not read, for a report; empty if everything is read."""
    rows: list[list[Cell]] = []
    for index in indexes:
        rows += [
            [index.place, kind.kind, kind.count, kind.example, KNOWN_UNREAD_SUFFIXES.get(kind.kind, "")]
            for kind in index.skipped
        ]
        if index.results:
            rows.append([index.place, "results of OpenMAE", len(index.results), first_names(index.results, 1), ""])
    columns = ("source", "kind", "files", "such as", "to read them")
    return [Table("Files that are not read", columns, rows)] if rows else []


def _why_no_classes(names: Sequence[str], parent: str) -> str:
    """Return why the folders ``names`` of ``parent`` are probably not classes; empty if they may be."""
    some = f"the folders {listed(names, 4)}"
    if len(names) < 2:
        return ""
    months = re.fullmatch(_YEAR, parent) and all(re.fullmatch(_MONTH, name) for name in names)
    if months or all(map(_DATE.fullmatch, names)):
        return f"{some} are dates"
    if all(map(_CAMERA.fullmatch, names)):
        return f"{some} are named by a camera"
    if _are_splits(names):
        return f"{some} look like the splits of a data set"
    return ""


def _are_splits(names: Sequence[str]) -> bool:
    return all(_split_name(name) in _SPLITS for name in names)


def _split_name(folder: str) -> str:
    return folder.lower().removeprefix("images_")


def _how_to_split(names: Sequence[str], place: str) -> str:
    """Return how to use the splits ``names`` of a source, for training and validation."""
    if not os.path.isdir(os.path.join(place, names[0])):  # an archive, a URL or shards
        return "Use each split as a separate source, such as a folder or an archive with only its images."
    keys = []
    for role, beginnings in (("train", ("train",)), ("val", ("val", "eval", "test"))):
        found = [name for start in beginnings for name in names if _split_name(name).startswith(start)]
        keys += [f"dataset.{role}_data_sources={place}/{name}" for name in found[:1]]
    return f"Set {' '.join(keys)}."


def _no_images(folder: Path, listing: FolderListing) -> DataError:
    kinds = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
    problem = f"The folder {printable_name(str(folder))} holds no images ({kinds})"
    fix = "Put images into it, or name another folder."
    if listing.results:
        return DataError(
            f"{problem}: {first_names(listing.results)} holds results of OpenMAE, which are not read as images.",
            "Name the folder of the images, or keep images and results in different folders.",
        )
    if not listing.skipped:
        return DataError(f"{problem}.", fix)
    archives = [kind for kind in listing.skipped if kind.kind in (".tar", ".tar.gz", ".tgz", ".zip", ".tar.zst")]
    if archives:
        example = printable_name(str(folder / archives[0].example))
        fix = f"Name one archive ({example}); it is extracted."
        if archives[0].count > 1:
            fix += " To read several as shards, decompress them into plain .tar files in one folder."
    elif way := how_to_read(listing.skipped):
        fix = f"{way[0].upper()}{way[1:]}."
    return DataError(f"{problem}, but {describe_skipped(listing.skipped)}.", fix)


def _unwrapped(folder: Path) -> tuple[Path, FolderListing]:
    """List a folder, or the only folder in it if that contains folders or a labels.csv and so is not a class folder.

    Folders with only results of OpenMAE do not count, so that the results of one run do not change what the next reads.
    """
    listing, prefix = list_folder(folder), ""
    while True:
        entries = [entry for entry in list_entries(folder / prefix) if not _only_results(listing, prefix + entry.name)]
        if len(entries) != 1 or not is_folder(entries[0]):
            break
        inner = list_entries(Path(entries[0].path))
        if not any(is_folder(entry) or entry.name == LABELS_FILE for entry in inner):
            break
        prefix += f"{entries[0].name}/"
    return folder / prefix, replace(listing, images=[path.removeprefix(prefix) for path in listing.images])


def _only_results(listing: FolderListing, path: str) -> bool:
    below = f"{path}/"
    return any(f"{result}/".startswith(below) for result in listing.results) and not any(
        image.startswith(below) for image in listing.images
    )
