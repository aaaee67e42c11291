"""Reading labels.csv: a table of paths and labels, as people and spreadsheets write it."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from openmae.data.folder import NO_SUFFIX, counted, first_names, is_image, kind_of
from openmae.errors import DataError
from openmae.inputs import open_regular
from openmae.storage.printable import original_name, printable_name, same_name

log = logging.getLogger("openmae")

_COLUMNS = ("path", "label")
_DELIMITERS = (",", ";", "\t", "|")
_WHOLE_FLOAT = re.compile(r"(-?\d+)\.0+")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_label_table(table: Path, images: Sequence[str]) -> dict[str, str]:
    """Return label by path, in the order of the paths.

    The table is UTF-8 or UTF-16 with a byte order mark, its cells are separated by commas, semicolons, tabs or bars.
    Its first line names the columns path and label, in any case and among others. A path is relative to the table's
    folder or absolute, with slashes or backslashes; the printable form of a name that is not UTF-8 is understood.

    Args:
        table: the file; its folder is the data set.
        images: the paths of all images in that folder.

    Raises:
        DataError: the table cannot be read, or names files that are not there.
    """
    rows = _Rows(table, images)
    for line, path, label in _cells(table):
        rows.add(line, path, label)
    return rows.labels()


class _Rows:
    """Collects the rows of a table, and what is wrong with them."""

    def __init__(self, table: Path, images: Sequence[str]) -> None:
        self._table = table
        self._images = set(images)
        self._labels: dict[str, str] = {}
        self._missing: list[str] = []
        self._not_images: list[str] = []
        self._repeated: list[str] = []
        self._count = 0

    def add(self, line: int, path: str, label: str) -> None:
        self._count += 1
        found = self._resolve(line, path) if path else None
        if found is None and "\n" in path:
            raise DataError(
                f"{self._table}: a quote that is opened before line {line} is not closed: {path[:40]!r}...",
                "Close it, or write a quote that belongs to a name twice, between quotes.",
            )
        if not path or not label:
            raise DataError(
                f"{self._table}, line {line}: path {path!r} and label {label!r} must not be empty.",
                "Fill the row or drop it.",
            )
        if found is None:
            self._missing.append(path)
        elif found not in self._images and kind_of(found) != NO_SUFFIX and not is_image(found):
            self._not_images.append(path)
        elif found in self._labels:
            if self._labels[found] != label:
                raise DataError(
                    f"{self._table}, line {line}: {path} is labelled {label!r} here and {self._labels[found]!r} above.",
                    "Keep one row for each file.",
                )
            self._repeated.append(path)
        else:
            self._labels[found] = label

    def labels(self) -> dict[str, str]:
        """Check the rows together and return them, sorted by path."""
        if not self._count:
            raise DataError(f"{self._table} has no rows.", "Add one line path,label for each image.")
        if self._missing:
            raise self._no_such_files()
        if self._not_images:
            raise DataError(
                f"{self._table} names {len(self._not_images):,} of {self._count:,} files that are not read as images: "
                f"{first_names(self._not_images)}.",
                "Convert them to JPEG or PNG, or drop those rows.",
            )
        if self._repeated:
            log.warning(
                "%s: %s an earlier one, such as that of %s; each image is taken once.",
                *(self._table, counted(len(self._repeated), "row", "repeats", "repeat")),
                printable_name(self._repeated[0]),
            )
        if left := sorted(self._images - self._labels.keys()):
            log.warning(
                "%s: %s left out: %s.",
                *(
                    self._table,
                    counted(len(left), "image", "is not in the table and is", "are not in the table and are"),
                ),
                first_names(left),
            )
        return dict(sorted(_whole_numbers(self._table, self._labels).items()))

    def _resolve(self, line: int, path: str) -> str | None:
        """The path as the index has it; None where there is no such file."""
        root = self._table.parent
        if os.path.isabs(path):
            for folder in (root, root.resolve()):
                if os.path.normpath(path).startswith(f"{folder}{os.sep}"):
                    path = os.path.relpath(os.path.normpath(path), folder)
                    break
            else:
                raise self._outside(line, path)
        for candidate in dict.fromkeys((path, path.replace("\\", "/"), original_name(path))):
            posix = PurePosixPath(candidate)
            if ".." in posix.parts or posix.is_absolute() or re.match(r"[A-Za-z]:/", candidate):
                raise self._outside(line, path)
            if self._exists(posix.as_posix()):
                return posix.as_posix()
        return None

    def _exists(self, path: str) -> bool:
        return path in self._images or os.path.isfile(self._table.parent / path)

    def _outside(self, line: int, path: str) -> DataError:
        return DataError(
            f"{self._table}, line {line}: {path} is not below the folder of the table.",
            "Write paths relative to the folder of the table.",
        )

    def _no_such_files(self) -> DataError:
        problem = (
            f"{self._table} names {len(self._missing):,} of {self._count:,} files that do not exist: "
            f"{first_names(self._missing)}."
        )
        fix = "Paths are relative to the folder of the table. Correct them or drop those rows."
        for why, key in (
            ("differs in upper and lower case or Unicode form", same_name),
            ("differs in its suffix", lambda path: os.path.splitext(path)[0]),
            ("is in a folder", os.path.basename),
        ):
            if match := _nearest(self._missing, self._images, key):
                return DataError(
                    f"{problem} {printable_name(match[1])}, which exists, {why}.",
                    f"Write {printable_name(match[1])} in place of {printable_name(match[0])}, and so on.",
                )
        return DataError(problem, fix)


def _nearest(missing: Sequence[str], images: set[str], key: Callable[[str], str]) -> tuple[str, str] | None:
    """The first missing path that an image has by ``key``, and that image."""
    by_key: Mapping[str, str] = {key(image): image for image in sorted(images, reverse=True)}
    paths = ((path, PurePosixPath(path.replace("\\", "/")).as_posix()) for path in missing)
    return next(((path, by_key[k]) for path, posix in paths for k in (posix, key(posix)) if k in by_key), None)


def _whole_numbers(table: Path, labels: dict[str, str]) -> dict[str, str]:
    """Labels such as 3.0, as pandas writes integers in a column with gaps, become 3."""
    if not all(_WHOLE_FLOAT.fullmatch(label) for label in labels.values()):
        return labels
    log.warning("%s: labels such as %s are read as integers.", table, next(iter(labels.values())))
    return {path: label.split(".")[0] for path, label in labels.items()}


def _cells(table: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line number, path and label of each row."""
    text = _text(table)
    first, _, rest = text.partition("\n")
    shift = 1
    if re.fullmatch(r"sep=.", first.strip()):  # by which Excel is told the separator
        text, shift = rest, 2
        first = rest.partition("\n")[0]
    delimiter = _delimiter(table, first)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        header = [cell.strip().lower() for cell in next(reader)]
        columns = [header.index(name) for name in _COLUMNS]
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            line = reader.line_num + shift - 1
            if any(cells[len(header) :]):
                raise DataError(
                    f"{table}, line {line} has {len(cells)} cells, but the first line names {len(header)} columns.",
                    f'Put a path or label that holds a {delimiter!r} between quotes: "a{delimiter}b.jpg".',
                )
            path, label = (cells[column] if column < len(cells) else "" for column in columns)
            yield line, path, printable_name(label)
    except csv.Error as error:
        raise DataError(
            f"{table}, line {reader.line_num + shift - 1} is not CSV: {error}.", "Save the table as CSV in UTF-8."
        ) from error


def _delimiter(table: Path, header: str) -> str:
    for delimiter in _DELIMITERS:
        cells = next(csv.reader([header.rstrip("\r")], delimiter=delimiter, skipinitialspace=True), [])
        if set(_COLUMNS) <= {cell.strip().lower() for cell in cells}:
            return delimiter
    found = [cell.strip() for cell in re.split("[,;\t|]", header.strip())]
    shown = ", ".join(filter(None, found)) or "nothing"
    problem = f"{table} must begin with a line that names the columns path and label; found: {shown}."
    if len(found) > 1 and is_image(found[0]):
        raise DataError(f"{problem} It seems to begin with the first image.", "Insert path,label as its first line.")
    fix = "Write path,label as its first line."
    if len(found) > 1:
        fix = (
            "Rename the columns that hold the path of each image, with its suffix (cat/1.jpg), and its label to path "
            "and label."
        )
    raise DataError(problem, fix)


def _text(table: Path) -> str:
    """The table's text; UTF-16, as Excel's "Unicode Text" is, by its byte order mark."""
    try:
        with open_regular(table) as stream:
            content = stream.read()
    except OSError as error:
        raise DataError(f"{table} cannot be read ({error.strerror}).", "See to its permissions.") from error
    coding = "utf-16" if content.startswith(_UTF16) else "utf-8-sig"
    try:
        text = content.decode(coding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        guess = content[max(0, error.start - 12) : error.start + 12].decode("cp1252", "replace").split("\n")
        near = next((part for part in guess if not part.isascii()), "").strip()
        raise DataError(
            f"{table} is not a UTF-8 table: line {line} holds the byte {content[error.start]:#x}; in Windows-1252 or "
            f"Latin-1 it would read {near!r}.",
            "Save it as CSV in UTF-8 (in Excel: 'CSV UTF-8'), or convert it: "
            "iconv -f WINDOWS-1252 -t UTF-8 labels.csv > new.csv",
        ) from error
    if "\0" in text:
        raise DataError(
            f"{table} holds NUL characters: it is not UTF-8 text, but perhaps UTF-16 without a byte order mark.",
            "Save it as CSV in UTF-8.",
        )
    return text
