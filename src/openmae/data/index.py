"""From a local folder to an index of its images and their labels."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from openmae.data.folder import (
    LABELS_FILE,
    Listing,
    counted,
    describe_skipped,
    first_names,
    how_to_read,
    join_first,
    list_entries,
    list_folder,
)
from openmae.data.formats import IMAGE_SUFFIXES, KNOWN_UNREAD_SUFFIXES
from openmae.data.image_index import ImageIndex
from openmae.data.label_table import read_label_table
from openmae.errors import DataError
from openmae.results.report import Cell, Table
from openmae.storage.printable import printable_name, same_name

log = logging.getLogger("openmae")

_LAYOUTS = f"Make one folder per class (cat/1.jpg, dog/2.jpg), or a {LABELS_FILE} with columns path,label."
_YEAR = r"(19|20)\d\d"
_MONTH = r"(0?[1-9]|1[0-2])"
_MONTHS = (
    "jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|july?|"
    "aug(ust)?|sept?(ember)?|oct(ober)?|nov(ember)?|dec(ember)?"
)
_DATE = re.compile(
    rf"{_YEAR}([-_. ]?(0[1-9]|1[0-2])([-_. ]?[0-3]\d)?(\D.*)?)?|"
    rf"(\d\d?[-_. ]+)?({_MONTHS})\.?([-_. ]*{_YEAR})?",
    re.IGNORECASE,
)
_CAMERA = re.compile(r"(?!\d{8}$)[1-9]\d\d[A-Z0-9_]{5}")  # DCF: 100CANON, 101APPLE
_TABLES = frozenset({".csv", ".tsv", ".txt", ".xls", ".xlsx", ".json"})
_PARTS = frozenset(["train", "training", "val", "valid", "validation", "test", "testing", "eval", "evaluation"])


def index_images(folder: Path, labelled: bool | None, shown: str = "") -> ImageIndex:
    """Index the images below ``folder``.

    Labels come from ``labels.csv`` (columns path,label) or else from class folders: the first folder of each path names
    the class. Class numbers follow the sorted names (by value where all are integers). One wrapping folder, as archives
    often have, is stepped into.

    Args:
        folder: a local folder (see ``resolve_source``).
        labelled: True demands a label for every image, False ignores labels, None takes them when there are any: a
            labels.csv, or two or more class folders.
        shown: how messages name the folder; default: by its path.

    Raises:
        DataError: a folder cannot be read, no images, no labels where they are demanded, or a labels.csv that does not
            fit.
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
        names = class_order(set(label_of.values()))
        warn_of_odd_classes(names, str(table))
        number = {name: i for i, name in enumerate(names)}
        labels = tuple(number[label] for label in label_of.values())
        return replace(index, paths=tuple(label_of), labels=labels, class_names=tuple(names), labelled_by=LABELS_FILE)
    place = (shown or str(folder)) + str(root).removeprefix(str(folder))
    _warn_of_other_tables(root, place)
    numbers, classes = label_by_folder(paths, labelled, place, (f"no {LABELS_FILE}", _LAYOUTS))
    return replace(index, labels=numbers, class_names=classes, labelled_by="folders" if classes else "")


def label_by_folder(
    paths: Sequence[str], labelled: bool | None, place: str, otherwise: tuple[str, str]
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Return the class number of each path, after its first folder, and the names of the classes, sorted.

    Args:
        paths: posix, relative.
        labelled: True demands a label for each, None takes them where there are two or more class folders; an image
            outside of them then has -1.
        place: the folder that the paths are relative to, or how messages name it.
        otherwise: what else would have labelled them and is not there, and what to do.

    Raises:
        DataError: no labels where they are demanded.
    """
    folders = [path.partition("/")[0] if "/" in path else "" for path in paths]
    name_of = {folder: _class_name(folder) for folder in set(folders)}
    class_of = [name_of[folder] for folder in folders]
    names = sorted(set(class_of) - {""})
    loose = [path for path, name in zip(paths, class_of, strict=True) if not name]
    shown = printable_name(place)
    if labelled and loose:
        what = f"{len(loose)} of {len(paths)} images lie outside of class folders, such as {printable_name(loose[0])}"
        raise DataError(f"The images in {shown} have no labels: {what}; {otherwise[0]}.", otherwise[1])
    why_not = _why_no_classes(names, os.path.basename(place.rstrip("/")))
    if labelled is None and (len(names) < 2 or why_not):
        if why_not:
            log.warning("%s: %s. They are not taken as classes.", shown, why_not)
        return None, ()
    if why_not:
        log.warning("%s: %s, but they are taken as classes.", shown, why_not)
    warn_of_odd_classes(names, shown)
    if loose:
        log.warning(
            "%s: %s of %s images lie outside of the %d class folders and have no label: %s. kNN and probe accuracy "
            "leave them out.",
            *(shown, f"{len(loose):,}", f"{len(paths):,}", len(names), first_names(loose)),
        )
    number = {name: i for i, name in enumerate(names)} | {"": -1}
    return tuple(number[name] for name in class_of), tuple(names)


def class_order(names: Collection[str]) -> list[str]:
    """Sort class names; by value where all are integers."""
    numeric = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if numeric else 0, name))


def warn_of_odd_classes(names: Collection[str], place: str) -> None:
    """Log what may be a mistake in the names of classes: names that a person takes for one, and a class -1."""
    alike: dict[str, list[str]] = {}
    for name in sorted(names):
        alike.setdefault(same_name(name), []).append(name)
    if groups := [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]:
        log.warning(
            "%s: these names of classes differ only in upper and lower case, and are different classes: %s.",
            *(place, ", ".join(groups[:3])),
        )
    if "-1" in names and all(name.removeprefix("-").isdecimal() for name in names):
        log.warning("%s: -1 is taken as a class. If it means 'no label', remove those images.", place)


def report_skipped(index: ImageIndex, place: str) -> None:
    """Log what of a source is not read: files of other kinds, and results of earlier runs.

    Args:
        index: of the source.
        place: the source, as the user named it.
    """
    place = printable_name(place)
    if index.results:
        log.warning("%s: results of OpenMAE are not read as images: %s.", place, first_names(index.results))
    if index.skipped:
        count = sum(kind.count for kind in index.skipped)
        way = how_to_read(index.skipped)
        log.warning(
            "%s: %s; %s skipped: %s.%s",
            *(place, counted(len(index), "image", "is read", "are read")),
            *(counted(count, "file", "of another kind is", "of other kinds are"), describe_skipped(index.skipped)),
            f" To read them: {way}." if way else "",
        )


def unread_table(indexes: Iterable[ImageIndex]) -> list[Table]:
    """Return a table for a report of what is not read of some sources; nothing where everything is read."""
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


def _class_name(folder: str) -> str:
    return unicodedata.normalize("NFC", printable_name(folder))


def _warn_of_other_tables(root: Path, place: str) -> None:
    for entry in list_entries(root):
        stem, suffix = os.path.splitext(entry.name.lower())
        if stem in ("label", "labels") and suffix in _TABLES:
            log.warning(
                "%s is not read: a table of labels is named %s.", printable_name(f"{place}/{entry.name}"), LABELS_FILE
            )


def _why_no_classes(names: Sequence[str], above: str) -> str:
    """Why folders are hardly classes; empty where they may be."""
    some = f"the folders {join_first(names, 4)}"
    if len(names) < 2:
        return ""
    if all(map(_DATE.fullmatch, names)) or (
        re.fullmatch(_YEAR, above) and all(re.fullmatch(_MONTH, name) for name in names)
    ):
        return f"{some} are dates"
    if all(map(_CAMERA.fullmatch, names)):
        return f"{some} are a camera's"
    if all(name.lower().removeprefix("images_") in _PARTS for name in names):
        return f"{some} look like parts of a data set, each of which is a source"
    return ""


def _no_images(folder: Path, listing: Listing) -> DataError:
    kinds = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
    problem = f"The folder {printable_name(str(folder))} holds no images ({kinds})"
    fix = "Put images into it, or name another folder."
    if listing.results:
        return DataError(
            f"{problem}: {first_names(listing.results)} holds results of OpenMAE, which are not read as images.",
            "Name the folder of the images, or put the images elsewhere than the results.",
        )
    if not listing.skipped:
        return DataError(f"{problem}.", fix)
    archives = [kind for kind in listing.skipped if kind.kind in (".tar", ".tar.gz", ".tgz", ".zip", ".tar.zst")]
    if archives:
        example = printable_name(str(folder / archives[0].example))
        fix = f"Name one archive ({example}): it is extracted."
        if archives[0].count > 1:
            fix += " Several are read as shards when they are plain .tar files in one folder: decompress them there."
    elif way := how_to_read(listing.skipped):
        fix = f"{way[0].upper()}{way[1:]}."
    return DataError(f"{problem}, but {describe_skipped(listing.skipped)}.", fix)


def _unwrapped(folder: Path) -> tuple[Path, Listing]:
    """Step into a lone folder, unless it is itself a class folder (one without folders or labels), and list it.

    Results of OpenMAE beside a lone folder do not count: the first run must not change what the second one reads.
    """
    listing, prefix = list_folder(folder), ""
    while True:
        entries = list_entries(folder / prefix)
        rest = [entry for entry in entries if not _only_results(listing, prefix + entry.name)]
        if len(rest) != 1 or not rest[0].is_dir():
            break
        inner = list_entries(Path(rest[0].path))
        if not any(entry.is_dir() or entry.name == LABELS_FILE for entry in inner):
            break
        prefix += f"{rest[0].name}/"
    return folder / prefix, listing.below(prefix)


def _only_results(listing: Listing, path: str) -> bool:
    below = f"{path}/"
    return any(f"{result}/".startswith(below) for result in listing.results) and not any(
        image.startswith(below) for image in listing.images
    )
