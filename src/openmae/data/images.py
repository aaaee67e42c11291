"""What images a folder holds, what they are labelled, and their pixels.

Pixels are decoded once, cropped and scaled as early as the file format allows, and stay 8-bit unless the
file has 16 bits.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from openmae.data.formats import IMAGE_SUFFIXES, READ_FORMATS
from openmae.errors import DataError

log = logging.getLogger("openmae")

LABELS_FILE = "labels.csv"
_LAYOUTS = f"Make one folder per class (cat/1.jpg, dog/2.jpg), or a {LABELS_FILE} with columns path,label."

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the upright image
Size = tuple[int, int]  # height, width
Numbers = Sequence[int] | npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


# ---------------------------------------------------------------------------------------------- index


@dataclass(frozen=True)
class ImageIndex:
    """The images below a folder, in one order on every machine.

    Attributes:
        root: the folder.
        paths: posix paths relative to ``root``, sorted.
        labels: the class number of each path, or None where there are no labels.
        class_names: names by class number; empty without labels.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()

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
        return Picture(self.file(number))

    def read(self, number: int) -> bytes:
        """Return the file of image ``number`` as it is stored; CorruptImage where that cannot be read."""
        with _whatever_ails(self.file(number)):
            return self.file(number).read_bytes()

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


# --------------------------------------------------------------------------------------------- decode


class CorruptImage(Exception):  # noqa: N818  (what it is, rather than what went wrong)
    """An image file that cannot be decoded: ``path`` and ``reason``."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Picture:
    """An image file with its header read: the upright size is known, pixels are decoded on request.

    Use it as a context manager, so that the file is closed.

    Args:
        path: of the file, or the name of ``upload``.
        upload: an open file that somebody sent, to be read in place of ``path``; it is the picture's from then on.
            Only ``READ_FORMATS`` are tried on it, for other decoders run programs (EPS) or are old.

    Raises:
        CorruptImage: on opening or decoding, whatever ails the file.
    """

    def __init__(self, path: Path, upload: BinaryIO | None = None) -> None:
        self.path = path
        with _whatever_ails(path):
            self._image: Image.Image = Image.open(upload or path, formats=READ_FORMATS)
        self.format, self.mode = self._image.format or "", self._image.mode
        self.transparent = self._image.has_transparency_data
        self._orientation = _orientation(self._image)
        width, height = self._image.size
        self._turned = self._orientation >= 5  # the stored image lies on its side
        self.size: Size = (width, height) if self._turned else (height, width)

    def __enter__(self) -> Picture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._image.close()

    def pixels(self, in_chans: int = 3, box: Box | None = None, at_least: Size | None = None) -> Pixels:
        """Decode the part of the upright image inside ``box``; to be called once.

        Args:
            in_chans: 1 (grey), 3 (RGB) or 4 (RGBA). Transparent parts turn white for 1 and 3; an image
                without transparency is opaque for 4.
            box: default the whole image.
            at_least: (height, width) that the caller will scale the box down to. A JPEG is then decoded
                at 1/2, 1/4 or 1/8 scale where that leaves the box at least as large.

        Returns:
            [H, W, in_chans], uint8; for 16-bit grey files float32 on the same scale, value / 257.
            (Pillow reduces 16-bit colour files to 8 bits.)
        """
        height, width = self.size
        left, top, right, bottom = box or (0, 0, width, height)
        with _whatever_ails(self.path):
            if at_least is not None:
                wanted_h = math.ceil(height * at_least[0] / (bottom - top))
                wanted_w = math.ceil(width * at_least[1] / (right - left))
                self._image.draft(
                    "L" if in_chans == 1 else "RGB",
                    (wanted_h, wanted_w) if self._turned else (wanted_w, wanted_h),
                )
            self._image.load()
            image = ImageOps.exif_transpose(self._image) if self._orientation > 1 else self._image
            if image.size != (width, height):  # drafted
                x, y = image.width / width, image.height / height
                left, top = min(round(left * x), image.width - 1), min(round(top * y), image.height - 1)
                right, bottom = max(round(right * x), left + 1), max(round(bottom * y), top + 1)
            if (left, top, right, bottom) != (0, 0, *image.size):
                image = image.crop((left, top, right, bottom))
            return _to_channels(image, in_chans)


def decode(path: Path, in_chans: int = 3) -> Pixels:
    """Decode the whole image: [H, W, in_chans], upright; see ``Picture.pixels``."""
    with Picture(path) as picture:
        return picture.pixels(in_chans)


@contextmanager
def _whatever_ails(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, struct.error, ...
        raise CorruptImage(path, " ".join(f"{error}".split()) or type(error).__name__) from error


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8. Pillow itself turns a TIFF while it loads it."""
    if image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block raises anything, and the pixels may still be sound
        return 1
    return value if value in range(1, 9) else 1


def _to_channels(image: Image.Image, in_chans: int) -> Pixels:
    if image.mode.startswith("I;16"):
        grey = np.array(image, dtype=np.float32) / np.float32(257)
        planes = np.repeat(grey[..., None], in_chans, axis=-1)
        if in_chans == 4:
            planes[..., 3] = 255
        return planes
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no agreed range; convert the file to 8 or 16 bits")
    if in_chans == 4:
        return np.array(image.convert("RGBA"))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if in_chans == 1:
        return np.array(image.convert("L"))[..., None]
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
