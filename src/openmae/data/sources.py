"""From a source in a spec to a local folder: folders as they are, archives extracted once into a cache."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Self

import platformdirs
from filelock import FileLock

from openmae.errors import DataError

log = logging.getLogger("openmae")

CACHE_VARIABLE = "OPENMAE_CACHE"
ARCHIVE_KINDS = ".tar, .tar.gz, .tgz or .zip"
_MARKER = ".openmae-complete"
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


class _StrictTarInfo(tarfile.TarInfo):
    """Python takes a broken or missing header for the end of the archive; only the end mark is that."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, and no end mark") from error


# A regular file of an archive: its name, and how to open it.
_Member = tuple[str, Callable[[], IO[bytes] | None]]


def resolve_source(source: str | os.PathLike[str], cache_dir: Path | None = None) -> Path:
    """Return the local folder that ``source`` stands for.

    A folder is returned as it is. An archive (.tar, .tar.gz, .tgz, .zip) is extracted once: the cache
    entry is named after its path, size and modification time, is filled under a temporary name and
    then renamed, so an interrupted extraction is never taken for a finished one. Several processes
    may ask for the same archive at once; one extracts, the others wait.

    Args:
        source: a folder or a local archive.
        cache_dir: where archives are extracted; default ``$OPENMAE_CACHE``, else the user's cache folder.

    Raises:
        DataError: nothing is there, it is empty, remote, not an archive or damaged, or a member of the
            archive would leave the folder or is a link or a device.
    """
    text = os.fspath(source).strip()
    if not text:
        raise DataError("The data source is empty.", "Name a folder or a local archive.")
    if "://" in text:
        raise DataError(
            f"{text} is a remote source; this version reads local ones.",
            "Copy it to a local folder or archive first and name that.",
        )
    path = Path(text).expanduser().resolve()
    if path.is_dir():
        if not any(path.iterdir()):
            raise DataError(f"The folder {path} is empty.", "Put images into it, or name another folder.")
        return path
    if not path.is_file():
        raise DataError(f"There is no file or folder {path}.", _hint_for_missing(path))
    return _extracted(path, cache_dir or default_cache())


def default_cache() -> Path:
    """Return where archives are extracted: ``$OPENMAE_CACHE``, else the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return (Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("openmae")) / "sources"


def _hint_for_missing(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    if parent != path.parent:
        return f"Check the path: it exists as far as {parent}."
    try:
        near = difflib.get_close_matches(path.name, os.listdir(parent), n=3)
    except PermissionError:
        return f"Check the path; {parent} may not be read."
    return f"Did you mean {', '.join(near)}?" if near else f"Check the path: {parent} has no such entry."


def _extracted(archive: Path, cache: Path) -> Path:
    """Return the cache entry of ``archive``, filled by this process or by another."""
    facts = archive.stat()
    key = hashlib.sha256(f"{archive}\0{facts.st_size}\0{facts.st_mtime_ns}".encode()).hexdigest()[:16]
    entry = cache / f"{archive.name.split('.')[0]}-{key}"
    if (entry / _MARKER).is_file():
        return entry
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):
            if not (entry / _MARKER).is_file():
                _fill(archive, entry)
    except OSError as error:
        raise DataError(
            f"{archive} could not be extracted into {cache}: {error.strerror or error}.",
            f"Make room and see to its permissions, or set {CACHE_VARIABLE} to another folder.",
        ) from error
    return entry


def _fill(archive: Path, entry: Path) -> None:
    """Extract ``archive`` under a temporary name, mark it complete and rename it; the lock is held."""
    for leftover in (entry, *entry.parent.glob(f"{entry.name}.part-*")):
        shutil.rmtree(leftover, ignore_errors=True)
    log.info("Extracting %s into %s", archive, entry)
    part = Path(tempfile.mkdtemp(prefix=f"{entry.name}.part-", dir=entry.parent))
    try:
        count = _extract(archive, part)
        if count == 0:
            raise DataError(f"The archive {archive} holds no files.", "Pack images into it.")
        (part / _MARKER).write_text(f"{archive}\n{count} files\n")
        os.rename(part, entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _extract(archive: Path, folder: Path) -> int:
    count = 0
    try:
        for name, open_member in _members(archive):
            target = folder.joinpath(*_safe_parts(name, archive))
            target.parent.mkdir(parents=True, exist_ok=True)
            stream = open_member()
            assert stream is not None  # regular files always open
            with stream, target.open("wb") as out:
                shutil.copyfileobj(stream, out, length=1 << 20)
            count += 1
    except _DAMAGE as error:
        raise DataError(
            f"The archive {archive} is damaged or cut short after {count} files ({error}).",
            "Copy or pack it again.",
        ) from error
    return count


def _members(archive: Path) -> Iterator[_Member]:
    # A tar may end with a zip, which is_zipfile would believe: ask for a tar first.
    if tarfile.is_tarfile(archive):
        yield from _tar_members(archive)
    elif zipfile.is_zipfile(archive):
        yield from _zip_members(archive)
    else:
        raise DataError(
            f"{archive} is a file but not an archive that can be read.",
            f"Name a folder of images, or an archive ({ARCHIVE_KINDS}).",
        )


def _tar_members(archive: Path) -> Iterator[_Member]:
    with tarfile.open(archive, tarinfo=_StrictTarInfo) as tar:
        for member in tar:
            if member.issym() or member.islnk():
                raise _refused(archive, member.name, f"is a link to {member.linkname!r}")
            if member.isdir():
                _safe_parts(member.name, archive)
            elif member.isfile():
                yield member.name, lambda member=member: tar.extractfile(member)  # type: ignore[misc]
            else:
                raise _refused(archive, member.name, "is a device or another special file")


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as bundle:
        for member in bundle.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind == stat.S_IFLNK:
                raise _refused(archive, member.filename, "is a link")
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refused(archive, member.filename, "is a device or another special file")
            if member.flag_bits & 0x1:
                raise DataError(
                    f"{archive}: member {member.filename!r} is encrypted.",
                    "Pack the images without a password.",
                )
            if member.is_dir():
                _safe_parts(member.filename, archive)
            else:
                yield member.filename, lambda member=member: bundle.open(member)  # type: ignore[misc]


def _safe_parts(name: str, archive: Path) -> tuple[str, ...]:
    """Return the parts of a member's relative path, or refuse one that would leave the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts or "\0" in name:
        raise _refused(archive, name, "would be written outside the folder")
    return path.parts


def _refused(archive: Path, name: str, why: str) -> DataError:
    return DataError(
        f"{archive}: member {name!r} {why}; nothing was extracted.",
        "Pack the images again, as plain files with relative paths.",
    )
