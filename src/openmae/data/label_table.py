"""Read labels.csv, a table of paths and labels written by hand or by a spreadsheet program."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from openmae.data.folder_listing import NO_SUFFIX, file_kind, first_names, is_image
from openmae.errors import DataError
from openmae.inputs import open_regular
from openmae.storage.printable import counted, original_name, printable_name, same_name

log = logging.getLogger("openmae")

_COLUMNS = ("path", "label")
_WHOLE_FLOAT = re.compile(r"(-?\d+)\.0+")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class _Row(NamedTuple):
    line: int
    path: str
    label: str


def read_label_table(table: Path, images: Sequence[str]) -> dict[str, str]:
    r"""Return a dict from path to label, sorted by path.

    The table is encoded in UTF-8, or in UTF-16 with a byte order mark. Cells are separated by commas, semicolons, tabs
    or vertical bars. The first line must contain the column names path and label, in upper or lower case and at any
    position. Paths are absolute or relative to the folder of the table, with slashes or backslashes. Bytes that are not
    UTF-8 may be written as ``\xhh``. ``images`` are the paths of all images in the folder of the table.

    Raises:
        DataError: the table cannot be read or is inconsistent, or names files that do not exist or are not images.
    """
    known, labels = set(images), dict[str, str]()
    missing, not_images, repeated = list[str](), list[str](), list[str]()
    count = 0
    for row in _rows(table):
        count += 1
        found = _resolve(table, row, known) if row.path else None
        if found is None and "\n" in row.path:
            raise DataError(
                f"{table}: a quote that is opened before line {row.line} is not closed: {row.path[:40]!r}...",
                "Close it. A quote that is part of a name is written twice, inside quotes.",
            )
        if not row.path or not row.label:
            problem = f"{table}, line {row.line}: path {row.path!r} and label {row.label!r} must not be empty."
            raise DataError(problem, "Fill in or remove the row.")
        if found is None:
            missing.append(row.path)
        elif found not in known and file_kind(found) != NO_SUFFIX and not is_image(found):
            not_images.append(row.path)
        elif found not in labels:
            labels[found] = row.label
        elif labels[found] == row.label:
            repeated.append(row.path)
        else:
            raise DataError(
                f"{table}, line {row.line}: {row.path} is labelled {row.label!r} here and {labels[found]!r} above.",
                "Keep one row for each file.",
            )
    if not count:
        raise DataError(f"{table} has no rows.", "Add one line path,label for each image.")
    if missing:
        raise _no_such_files(table, missing, count, known)
    if not_images:
        names = first_names(not_images)
        raise DataError(
            f"{table} names {len(not_images):,} of {count:,} files that are not read as images: {names}.",
            "Convert them to JPEG or PNG, or remove those rows.",
        )
    _warn(table, repeated, sorted(known - labels.keys()))
    return dict(sorted(_whole_numbers(table, labels).items()))


def _warn(table: Path, repeated: Sequence[str], unlisted: Sequence[str]) -> None:
    if repeated:
        log.warning(
            "%s: %s an earlier one, such as that of %s; each image is used once.",
            *(table, counted(len(repeated), "row", "repeats", "repeat"), printable_name(repeated[0])),
        )
    if unlisted:
        listed = counted(len(unlisted), "image", "is not in the table and is", "are not in the table and are")
        log.warning("%s: %s left out: %s.", table, listed, first_names(unlisted))


def _whole_numbers(table: Path, labels: dict[str, str]) -> dict[str, str]:
    """Turn labels such as 3.0 into 3 if all have this form, in which pandas writes integers in a column with gaps."""
    if not all(map(_WHOLE_FLOAT.fullmatch, labels.values())):
        return labels
    log.warning("%s: labels such as %s are read as integers.", table, next(iter(labels.values())))
    return {path: label.split(".")[0] for path, label in labels.items()}


def _resolve(table: Path, row: _Row, known: set[str]) -> str | None:
    """Return the path of a row as it is in the index; None if there is no such file."""
    path, root = row.path, table.parent
    outside = DataError(
        f"{table}, line {row.line}: {path} is not below the folder of the table.",
        "Write paths relative to the folder of the table.",
    )
    if os.path.isabs(path):
        normal = os.path.normpath(path)
        folders = [folder for folder in (root, root.resolve()) if normal.startswith(f"{folder}{os.sep}")]
        if not folders:
            raise outside
        path = os.path.relpath(normal, folders[0])
    for candidate in dict.fromkeys((path, path.replace("\\", "/"), original_name(path))):
        posix = PurePosixPath(candidate)
        if ".." in posix.parts or posix.is_absolute() or re.match(r"[A-Za-z]:/", candidate):
            raise outside
        if posix.as_posix() in known or os.path.isfile(root / posix):
            return posix.as_posix()
    return None


def _no_such_files(table: Path, missing: Sequence[str], count: int, images: set[str]) -> DataError:
    problem = f"{table} names {len(missing):,} of {count:,} files that do not exist: {first_names(missing)}."
    alternatives: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("its upper and lower case or Unicode form differs", same_name),
        ("its suffix differs", lambda path: os.path.splitext(path)[0]),
        ("it is in a folder", os.path.basename),
    )
    for why, key in alternatives:
        by_key = {key(image): image for image in sorted(images, reverse=True)}
        for path in missing:
            posix = PurePosixPath(path.replace("\\", "/")).as_posix()
            if image := by_key.get(posix) or by_key.get(key(posix)):
                name = printable_name(image)
                return DataError(
                    f"{problem} {name} exists, but {why}.",
                    f"Write {name} instead of {printable_name(path)}, and so on.",
                )
    return DataError(
        problem, f"Paths are relative to the folder of the table, {table.parent}. Correct or remove those rows."
    )


def _rows(table: Path) -> Iterator[_Row]:
    text = _text(table)
    first, _, rest = text.partition("\n")
    skipped = 0
    if re.fullmatch(r"sep=.", first.strip()):  # a line for Excel
        text, skipped = rest, 1
        first = rest.partition("\n")[0]
    delimiter = _delimiter(table, first)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        header = [cell.strip().lower() for cell in next(reader)]
        columns = [header.index(name) for name in _COLUMNS]
        for row in reader:
            cells = [cell.strip() for cell in row]
            line = reader.line_num + skipped
            if any(cells[len(header) :]):
                raise DataError(
                    f"{table}, line {line} has {len(cells)} cells, but the first line names {len(header)} columns.",
                    f'Put a path or label that contains {delimiter!r} in quotes: "a{delimiter}b.jpg".',
                )
            if any(cells):
                path, label = (cells[column] if column < len(cells) else "" for column in columns)
                yield _Row(line, path, printable_name(label))
    except csv.Error as error:
        line = reader.line_num + skipped
        raise DataError(f"{table}, line {line} is not CSV: {error}.", "Save the table as CSV in UTF-8.") from error


def _delimiter(table: Path, header: str) -> str:
    for delimiter in (",", ";", "\t", "|"):
        cells = next(csv.reader([header.rstrip("\r")], delimiter=delimiter, skipinitialspace=True), [])
        if set(_COLUMNS) <= {cell.strip().lower() for cell in cells}:
            return delimiter
    found = [cell.strip() for cell in re.split("[,;\t|]", header.strip())]
    shown = ", ".join(filter(None, found)) or "nothing"
    problem = f"{table} must begin with a line that names the columns path and label; found: {shown}."
    if len(found) > 1 and is_image(found[0]):
        raise DataError(f"{problem} It seems to begin with the first image.", "Insert path,label as its first line.")
    if len(found) > 1:
        fix = "Rename the column of image paths (with suffix: cat/1.jpg) to path, and the column of labels to label."
        raise DataError(problem, fix)
    raise DataError(problem, "Write path,label as its first line.")


def _text(table: Path) -> str:
    try:
        with open_regular(table) as stream:
            content = stream.read()
    except OSError as error:
        raise DataError(f"{table} cannot be read ({error.strerror}).", "Check its permissions.") from error
    try:
        text = content.decode("utf-16" if content.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        guess = content.split(b"\n")[line - 1].decode("cp1252", "replace").strip()
        raise DataError(
            f"{table} is not a UTF-8 table: line {line} contains the byte {content[error.start]:#x}; in Windows-1252 "
            f"or Latin-1 it would read {guess[:40]!r}.",
            "Save it as CSV in UTF-8 (in Excel: 'CSV UTF-8'), or convert it: "
            "iconv -f WINDOWS-1252 -t UTF-8 labels.csv > new.csv",
        ) from error
    if "\0" in text:
        raise DataError(
            f"{table} holds NUL characters: it is not UTF-8 text, but perhaps UTF-16 without a byte order mark.",
            "Save it as CSV in UTF-8.",
        )
    return text
