"""List a folder: its images, and the number of files that are not read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from openmae.data.formats import IMAGE_SUFFIXES, KNOWN_UNREAD_SUFFIXES
from openmae.errors import DataError
from openmae.inputs import open_regular
from openmae.storage import layout
from openmae.storage.atomic import parse_object
from openmae.storage.printable import counted, listed, printable_name

LABELS_FILE = "labels.csv"
BROKEN_LINK, SAME_FOLDER = "broken link", "link to a folder that is read already"
NO_SUFFIX = "without a suffix"
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_SHOWN = 8  # kinds of files listed in a message
_SYSTEM_FOLDERS = ("__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")
_STATUS_KEYS = {"date", "time", "status"}
# Images that actions write into their results folders; other images there belong to the user.
_RESULT_NAMES = {
    *(layout.CONFUSION_MATRIX, layout.CURVES, layout.DATASET_CHART, layout.PREDICTIONS_SHEET, layout.PROFILE_CHART),
    *(layout.RECONSTRUCTIONS, layout.CHARTS, "accuracies.png", "history.png"),  # the last two: quickstart, automl
}


@dataclass(frozen=True)
class SkippedFiles:
    """Files of one kind that are not read; ``kind`` is a suffix or a description, ``example`` a relative path."""

    kind: str
    count: int
    example: str

    def __str__(self) -> str:
        return f"{self.count:,} {self.kind} (such as {self.example})"


@dataclass(frozen=True)
class FolderListing:
    """The contents of a folder.

    ``images`` are relative POSIX paths, sorted, with bytes that are not UTF-8 decoded as by ``os.fsdecode``.
    ``results`` are folders with results of OpenMAE, which are not read.
    """

    images: list[str]
    skipped: tuple[SkippedFiles, ...] = ()
    results: tuple[str, ...] = ()


@dataclass
class SkippedCounter:
    """A counter of skipped files by kind; the example of a kind is its alphabetically first name."""

    _found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """Count ``count`` files of a kind."""
        before, example = self._found.get(kind, (0, name))
        self._found[kind] = before + count, min(name, example)

    def counts(self) -> dict[str, tuple[int, str]]:
        """Return a dict from kind to (count, example), the most frequent kind first."""
        return dict(sorted(self._found.items(), key=lambda item: (-item[1][0], item[0])))

    def skipped(self) -> tuple[SkippedFiles, ...]:
        """Return the kinds, the most frequent first."""
        counts = self.counts().items()
        return tuple(SkippedFiles(kind, count, printable_name(name)) for kind, (count, name) in counts)


def file_kind(name: str) -> str:
    """Return the lower-case suffix of a file (``.tar.gz`` counts as one), or ``NO_SUFFIX``."""
    stem, suffix = os.path.splitext(os.path.basename(name).lower())
    inner = os.path.splitext(stem)[1]
    return printable_name((inner if suffix in _COMPRESSED and inner == ".tar" else "") + suffix) or NO_SUFFIX


def is_visible(name: str) -> bool:
    """Return whether an entry is neither hidden nor a folder of the operating system."""
    return not name.startswith(".") and name not in _SYSTEM_FOLDERS


def is_image(name: str) -> bool:
    """Return whether a file has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def list_folder(folder: Path) -> FolderListing:
    """List the images below ``folder``, recursively, and the files that are not read.

    Links to folders are followed. A folder that can be reached in several ways is read once, by a path without links
    where there is one. Hidden entries and folders of the operating system are skipped, and so are images that OpenMAE
    has written, so that a training run does not read the reconstructions of an earlier one.

    Raises:
        DataError: a folder cannot be read.
    """
    images: list[str] = []
    results: list[str] = []
    skipped = SkippedCounter()
    seen: set[tuple[int, int]] = set()
    waiting, links = [("", False)], list[tuple[str, bool]]()
    while waiting or links:
        prefix, in_results = waiting.pop() if waiting else links.pop(0)
        path = folder / prefix
        with _explained(path):
            status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            skipped.add(SAME_FOLDER, prefix.rstrip("/"))
            continue
        seen.add((status.st_dev, status.st_ino))
        entries = {entry.name: entry for entry in list_entries(path)}
        writer = "" if in_results else _results_writer(path, entries.keys())
        if writer:
            results.append(prefix.rstrip("/") or ".")
            if writer != "action":  # folders of jobs and of the quickstart may contain any image
                continue
            in_results = True
        for name, entry in entries.items():
            if in_results and name in _RESULT_NAMES:
                continue
            if is_folder(entry):
                (links if entry.is_symlink() else waiting).append((f"{prefix}{name}/", in_results))
            elif is_image(name):  # or a broken link, which is reported as a corrupt image when it is read
                images.append(prefix + name)
            elif in_results or name == layout.CORRUPT_LIST or name.endswith(".tar.index.json"):
                continue
            elif entry.is_symlink() and not os.path.exists(entry.path):
                skipped.add(BROKEN_LINK, prefix + name)
            elif prefix or name != LABELS_FILE:
                skipped.add(file_kind(name), prefix + name)
        links.sort()
    return FolderListing(sorted(images), skipped.skipped(), tuple(sorted(results)))


def list_entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the visible entries of a folder.

    Raises:
        DataError: the folder cannot be read.
    """
    with _explained(folder), os.scandir(folder) as found:
        return [entry for entry in found if is_visible(entry.name)]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder without permission
        return False


def describe_skipped(skipped: Sequence[SkippedFiles]) -> str:
    """Return one line with the count and an example of each kind."""
    more = len(skipped) - _SHOWN
    return ", ".join(map(str, skipped[:_SHOWN])) + (f" and {counted(more, 'more kind')}" if more > 0 else "")


def how_to_read(skipped: Sequence[SkippedFiles]) -> str:
    """Return how to make skipped images readable; empty if no skipped file is an image."""
    ways: dict[str, list[str]] = {}
    for kind in skipped:
        if kind.kind in KNOWN_UNREAD_SUFFIXES:
            ways.setdefault(KNOWN_UNREAD_SUFFIXES[kind.kind], []).append(kind.kind)
    return "; ".join(f"{' '.join(kinds)}: {way}" for way, kinds in ways.items())


def _results_writer(folder: Path, names: Set[str]) -> str:
    """Return which part of OpenMAE wrote a folder: "action", "job" or "quickstart"; "" if none did."""
    if {layout.JOB_RECORD, layout.JOB_SPEC} <= names:
        return "job"
    if "README.txt" in names and b"made by mae quickstart" in _first_bytes(folder / "README.txt"):
        return "quickstart"
    if layout.REPORT in names and b'name="generator" content="OpenMAE' in _first_bytes(folder / layout.REPORT):
        return "action"
    if layout.STATUS in names:
        entry = parse_object(_first_bytes(folder / layout.STATUS).partition(b"\n")[0])
        return "action" if entry.keys() >= _STATUS_KEYS else ""
    return ""


def _first_bytes(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(4096)
    except OSError:
        return b""


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"The folder {printable_name(str(folder))} cannot be read ({error.strerror or error}), so its images would "
            "be missing.",
            "Grant yourself read permission (chmod -R u+rX), repair the disk or the mount, or move the folder out of "
            "the source.",
        ) from error


def first_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first ``most`` names, printable, and the number of those left."""
    return listed([*map(printable_name, names[:most]), *names[most:]], most)
