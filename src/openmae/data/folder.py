"""What lies below a folder: the images, and an account of everything that is not read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from openmae.data.formats import IMAGE_SUFFIXES, KNOWN_UNREAD_SUFFIXES
from openmae.errors import DataError
from openmae.storage import layout
from openmae.storage.printable import printable_name

LABELS_FILE = "labels.csv"
BROKEN_LINK, SAME_FOLDER = "broken link", "link to a folder that is read already"
NO_SUFFIX = "without a suffix"
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_SHOWN = 8  # kinds that a message names
_START = 4096  # bytes of a file that show what wrote it
_STATUS_KEYS = {"date", "time", "status"}
_WRITERS = ((layout.REPORT, b'name="generator" content="OpenMAE'), ("README.txt", b"made by mae quickstart"))
_OF_SYSTEMS = ("__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")
_RESULT_NAMES = frozenset(
    (
        *("accuracies.png", "history.png"),
        *(layout.CONFUSION_MATRIX, layout.CURVES, layout.DATASET_CHART, layout.PREDICTIONS_SHEET, layout.PROFILE_CHART),
        *(layout.RECONSTRUCTIONS, layout.CHARTS),
    )
)


@dataclass(frozen=True)
class Skipped:
    """Files of one kind that are not read.

    Attributes:
        kind: their suffix, such as ``.heic``, or what they are.
        count: how many.
        example: one of them, relative to the source, printable.
    """

    kind: str
    count: int
    example: str

    def __str__(self) -> str:
        return f"{self.count:,} {self.kind} (such as {self.example})"


@dataclass(frozen=True)
class Listing:
    """Names below a folder.

    Attributes:
        images: relative posix paths, sorted; those that are not UTF-8 as ``os.fsdecode`` gives them.
        skipped: what is not read, the most frequent kind first; results of OpenMAE are not among them.
        results: folders and pictures that actions of OpenMAE have written, which are not read.
    """

    images: list[str]
    skipped: tuple[Skipped, ...] = ()
    results: tuple[str, ...] = ()

    def below(self, prefix: str) -> Listing:
        """Return the listing of a subfolder that holds all of ``images``."""
        shown = printable_name(prefix)
        skipped = tuple(replace(kind, example=kind.example.removeprefix(shown)) for kind in self.skipped)
        return Listing([path.removeprefix(prefix) for path in self.images], skipped, self.results)


@dataclass
class Tally:
    """Counts skipped files by kind."""

    _counts: dict[str, int] = field(default_factory=dict)
    _examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """Count files of a kind; the first name in alphabetical order is kept as the example."""
        self._counts[kind] = self._counts.get(kind, 0) + count
        self._examples[kind] = min(name, self._examples.get(kind, name))

    def add_file(self, name: str) -> None:
        """Count a file by its suffix."""
        self.add(kind_of(name), name)

    def counts(self) -> dict[str, tuple[int, str]]:
        """Return how many files of each kind there are, and one of them; the most frequent kind first."""
        kinds = sorted(self._counts, key=lambda kind: (-self._counts[kind], kind))
        return {kind: (self._counts[kind], self._examples[kind]) for kind in kinds}

    def skipped(self) -> tuple[Skipped, ...]:
        """Return the kinds, the most frequent one first."""
        return tuple(Skipped(kind, count, printable_name(name)) for kind, (count, name) in self.counts().items())


def kind_of(name: str) -> str:
    """Return the suffix of a file in lower case, ``.tar.gz`` in one piece, or "without a suffix"."""
    stem, suffix = os.path.splitext(os.path.basename(name).lower())
    inner = os.path.splitext(stem)[1]
    return printable_name((inner if suffix in _COMPRESSED and inner == ".tar" else "") + suffix) or NO_SUFFIX


def is_visible(name: str) -> bool:
    """Say whether an entry is neither hidden nor a system's own, such as the extra data of macOS."""
    return not name.startswith(".") and name not in _OF_SYSTEMS


def is_image(name: str) -> bool:
    """Say whether a file is taken for an image, by its suffix."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def list_folder(folder: Path) -> Listing:
    """Return the images below ``folder``, and what else is there.

    Links to folders are followed, each folder is read once, under its real name where it has one in ``folder``. Hidden
    entries and ``__MACOSX`` are skipped, and so are results folders below ``folder``: a training run in the folder of
    its images must not read its own pictures. Of a folder that holds other images too, only the results are skipped.

    Raises:
        DataError: a folder cannot be read.
    """
    images: list[str] = []
    results: list[str] = []
    tally = Tally()
    seen: set[tuple[int, int]] = set()
    waiting, links = [""], list[str]()
    while waiting or links:
        prefix = waiting.pop() if waiting else links.pop(0)
        where = folder / prefix
        with _readable(where):
            facts = os.stat(where)
            if (facts.st_dev, facts.st_ino) in seen:
                tally.add(SAME_FOLDER, prefix.rstrip("/"))
                continue
            seen.add((facts.st_dev, facts.st_ino))
            with os.scandir(where) as found:
                entries = {entry.name: entry for entry in found if is_visible(entry.name)}
        ours = is_results(where, entries)
        if ours and prefix and not _holds_images_of_the_user(where):
            results.append(prefix.rstrip("/"))
            continue
        for name, entry in entries.items():
            if ours and name in _RESULT_NAMES:
                results.append(prefix + name)
            elif _is_folder(entry):
                (links if entry.is_symlink() else waiting).append(f"{prefix}{name}/")
            elif is_image(name):  # a broken link, too: it is an image that is missing, and counts as corrupt
                images.append(prefix + name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                tally.add(BROKEN_LINK, prefix + name)
            elif (
                (prefix or name != LABELS_FILE) and name != layout.CORRUPT_LIST and not name.endswith(".tar.index.json")
            ):
                tally.add_file(prefix + name)
        links.sort()
    return Listing(sorted(images), tally.skipped(), tuple(sorted(results)))


def list_entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the visible entries of a folder.

    Raises:
        DataError: it cannot be read.
    """
    with _readable(folder), os.scandir(folder) as found:
        return [entry for entry in found if is_visible(entry.name)]


def is_results(folder: Path, names: Iterable[str]) -> bool:
    """Say whether an action, a job, a search or the quickstart of OpenMAE has written the folder with ``names``."""
    names = set(names)
    if layout.STATUS in names:
        start = _start_of(folder / layout.STATUS).partition(b"\n")[0]
        try:
            entry = json.loads(start)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and entry.keys() >= _STATUS_KEYS:
            return True
    if {layout.JOB_RECORD, layout.JOB_SPEC} <= names:
        return True
    return any(name in names and mark in _start_of(folder / name) for name, mark in _WRITERS)


def _holds_images_of_the_user(folder: Path) -> bool:
    """Say whether a results folder also holds images that no action has written."""
    if (folder / layout.JOB_RECORD).exists() or _WRITERS[1][1] in _start_of(folder / _WRITERS[1][0]):
        return False  # a job's folder, or the quickstart's, which writes images of its own
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if is_visible(name) and name not in _RESULT_NAMES]
        if any(is_visible(name) and is_image(name) and name not in _RESULT_NAMES for name in files):
            return True
    return False


def describe_skipped(skipped: Sequence[Skipped]) -> str:
    """Return the kinds with their numbers and an example each, in one line."""
    more = len(skipped) - _SHOWN
    text = ", ".join(map(str, skipped[:_SHOWN]))
    return f"{text} and {more} more kind{'s' if more > 1 else ''}" if more > 0 else text


def how_to_read(skipped: Sequence[Skipped]) -> str:
    """Return what makes the images among skipped files readable, such as a command; empty where there are none."""
    ways: dict[str, list[str]] = {}
    for kind in skipped:
        if kind.kind in KNOWN_UNREAD_SUFFIXES:
            ways.setdefault(KNOWN_UNREAD_SUFFIXES[kind.kind], []).append(kind.kind)
    return "; ".join(f"{' '.join(kinds)}: {way}" for way, kinds in ways.items())


def _start_of(path: Path) -> bytes:
    try:
        with path.open("rb") if path.is_file() else open(os.devnull, "rb") as file:
            return file.read(_START)
    except OSError:
        return b""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or to where nothing may be read
        return False


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn the error of a folder that cannot be read into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"The folder {printable_name(str(folder))} cannot be read ({error.strerror or error}), so its images would "
            "be missing.",
            "Give yourself the right to read it (chmod -R u+rX), repair the disk or the mount, or move the folder out "
            "of the source.",
        ) from error


def counted(count: int, noun: str, one: str = "", many: str = "") -> str:
    """Return a number and its noun, followed by the verb for one or for many: ``2 images are``."""
    return f"{count:,} {noun} {one}".rstrip() if count == 1 else f"{count:,} {noun}s {many}".rstrip()


def first_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, printable, and how many more there are."""
    return join_first([printable_name(name) for name in names[:most]], most, len(names))


def join_first(texts: Sequence[str], most: int = 3, total: int = 0) -> str:
    """Return the first texts, and how many more there are of ``total`` (default: of ``texts``)."""
    left = (total or len(texts)) - most
    return ", ".join(texts[:most]) + (f" and {left:,} more" if left > 0 else "")
