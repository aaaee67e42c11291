"""Resolve a data source to a local folder: download remote sources and extract archives, once, into the cache."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import logging
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, TYPE_CHECKING, Self

from openmae.data.formats import SIGNATURE_BYTES, recognise
from openmae.errors import DataError
from openmae.inputs import irregular
from openmae.storage import cache
from openmae.storage.printable import original_name, printable_name
from openmae.storage.urls import checked, redact

if TYPE_CHECKING:
    from openmae.storage.listing import Found

log = logging.getLogger("openmae")

_EXPECTED = "Name a folder of images, or an archive (.tar, .tar.gz, .tgz or .zip)."
# Limits against archives made to fill the disk.
FREE_BYTES = 10**9  # any archive may hold this much content,
LARGEST_RATIO = 200  # or else this many times its own size
FREE_MEMBERS = 100_000  # any archive may have this many members; with more, the average member must have
SMALLEST_MEMBER = 400  # this many bytes of the archive,
SMALLEST_CONTENT = 64  # and this many bytes of content (no image is smaller)
_LARGEST_HEADER = 1 << 20
_METADATA = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE),
    tarfile.SOLARIS_XHDTYPE,
)
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError),
    *(EOFError, NotImplementedError, UnicodeError),  # UnicodeError: names declared as UTF-8 that are not
)
_ZIP_METHODS = {0: "stored", 8: "deflate", 12: "bzip2", 14: "LZMA"}
_OTHER_ZIP_METHODS = {9: "Deflate64", 93: "Zstandard", 95: "XZ", 98: "PPMd"}


class StrictTarInfo(tarfile.TarInfo):
    """A tar header that must be valid or an end mark; Python takes a broken header for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """Read the next header; raise ReadError if it is broken, unless it follows an end mark."""
        assert isinstance(archive, StrictTar)
        try:
            member = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            archive.ended = True
            archive.on_skip(tarfile.BLOCKSIZE)
            raise
        except (tarfile.HeaderError, gzip.BadGzipFile) as error:  # type: ignore[attr-defined]
            bad_content = isinstance(error, gzip.BadGzipFile) and "CRC" in str(error)
            if bad_content or not archive.ended:
                raise tarfile.ReadError(f"{error}, and no end mark") from error
            if not isinstance(error, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
                log.warning("%s: the data after the end of the tar file is not read.", archive.place)
            raise tarfile.EmptyHeaderError("end") from error  # type: ignore[attr-defined]
        archive.ended = False
        return member

    def _proc_member(self, archive: tarfile.TarFile) -> Self:
        if self.type in _METADATA and self.size > _LARGEST_HEADER:  # tarfile would read it into memory
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


class StrictTar(tarfile.TarFile):
    """A tar file that is read to its end, also if it is a concatenation such as ``cat a.tar b.tar``.

    Attributes:
        ended: whether the last block was an end mark.
        place: path of the file, for messages.
        on_skip: called with the number of bytes of each end mark.
    """

    tarinfo = StrictTarInfo
    ignore_zeros = True
    ended = False
    place = ""
    on_skip: Callable[[int], object] = staticmethod(lambda size: None)


def resolve_source(source: str | os.PathLike[str]) -> Path:
    """Return a local folder with the content of ``source``.

    A local folder is returned as it is. An archive (.tar, .tar.gz, .tgz, .zip) is extracted once per version: an
    incomplete extraction is never used, and of several processes that need the archive at the same time only one
    extracts it. A remote folder is downloaded; a remote archive is downloaded, extracted and then deleted.

    Args:
        source: a folder or an archive: a path, or an s3://, gs://, http:// or https:// URL.

    Raises:
        DataError: the source does not exist, is empty, not an archive, damaged, malicious or too large.
    """
    text = os.fspath(source).strip()
    if not text:
        raise DataError("The data source is empty.", "Name a folder or an archive, local or s3://, gs://, https://.")
    if "://" in text:
        from openmae.storage.download import fetch_with

        return fetch_with(checked(text), _from_store)
    path = local_source(text)
    if path.is_dir():
        return path
    status = path.stat()
    content = f"{path}\0{status.st_size}\0{status.st_mtime_ns}".encode("utf-8", "surrogateescape")
    name = f"{path.name.split('.')[0]}-{hashlib.sha256(content).hexdigest()[:16]}"
    shown = printable_name(str(path))
    return _obtain(name, shown, status.st_size, lambda folder: _extract(path, folder, shown))


def local_source(text: str) -> Path:
    """Return the absolute path of a non-empty folder or a readable file.

    Raises:
        DataError: there is none.
    """
    try:
        path = Path(text).expanduser().resolve()
        if not path.exists() and (other := Path(original_name(text)).expanduser()).exists():
            path = other.resolve()  # the printable form of a name that is not UTF-8, which YAML cannot hold
        if path.is_dir():
            if not any(path.iterdir()):
                raise DataError(f"The folder {path} is empty.", "Put images into it, or name another folder.")
            return path
        if not path.exists():
            raise DataError(f"There is no file or folder {path}.", _hint_for_missing(path))
        if kind := irregular(path):
            raise DataError(f"{path} is {kind}.", _EXPECTED)
        path.open("rb").close()
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a NUL in the path, an unknown user's home
        raise DataError(
            f"{printable_name(text)} cannot be read ({getattr(error, 'strerror', None) or error}).",
            "Grant yourself read permission (chmod -R u+rX), or name another source.",
        ) from error
    return path


def _from_store(found: Found) -> Path:
    from openmae.storage.download import local_copy

    if found.folder:
        return local_copy(found)
    (file,) = found.files
    shown = redact(found.url)

    def build(folder: Path) -> None:
        with cache.holding():
            _extract(local_copy(found), folder, shown)
        cache.remove(cache.root() / cache.REMOTE / found.key)

    return _obtain(f"{file.name.split('.')[0]}-{found.key}", shown, found.size, build)


def _obtain(name: str, origin: str, size: int, build: Callable[[Path], None]) -> Path:
    entry = cache.root() / cache.SOURCES / name
    try:
        return cache.obtain(entry, origin, build, size=size)
    except OSError as error:
        raise DataError(
            f"{origin} could not be extracted into {entry.parent}: {error.strerror or error}.",
            f"Free disk space and check the permissions, or set {cache.CACHE_VARIABLE} to another folder.",
        ) from error


def _hint_for_missing(path: Path) -> str:
    parent = next(folder for folder in path.parents if folder.is_dir())
    if parent != path.parent:
        return f"Check the path: it exists as far as {parent}."
    try:
        near = difflib.get_close_matches(path.name, os.listdir(parent), n=3)
    except PermissionError:
        return f"Check the path; {parent} cannot be read."
    return f"Did you mean {', '.join(near)}?" if near else f"Check the path: {parent} has no such entry."


def _extract(archive: Path, folder: Path, shown: str) -> None:
    """Extract ``archive`` into an empty folder; messages name it ``shown``."""
    count, budget, replaced = 0, _Budget(archive.stat().st_size, shown), ""
    try:
        members = _members(archive, shown, budget)
        log.info("Extracting %s into %s", shown, folder.parent)
        for name, stream in members:
            target = folder.joinpath(*_safe_parts(name, shown))
            if stream is None:  # a folder
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            replaced = replaced or (name if target.exists() else "")
            with stream, target.open("wb") as out:
                while chunk := stream.read(1 << 20):
                    budget.take(len(chunk))
                    out.write(chunk)
            count += 1
    except _DAMAGE as error:
        raise DataError(
            f"The archive {shown} is damaged or truncated after {count} files ({error}).",
            "Copy or pack it again.",
        ) from error
    if count == 0:
        raise DataError(f"The archive {shown} holds no files.", "Pack images into it.")
    if replaced:
        log.warning(
            "%s has several members with the same name, such as %s; only the last one of each name is read.",
            *(shown, printable_name(replaced)),
        )


class _Budget:
    """Counts the content of an archive and raises DataError at the limits."""

    def __init__(self, packed: int, shown: str) -> None:
        self.packed = packed
        self.shown = shown
        self.most = max(FREE_BYTES, LARGEST_RATIO * self.packed)
        self.room = cache.limit()
        self.bytes = 0
        self.members = 0

    def member(self) -> None:
        """Count a member, a folder or a file."""
        self.members += 1
        if self.members > FREE_MEMBERS and (
            self.packed < SMALLEST_MEMBER * self.members or self.bytes < SMALLEST_CONTENT * self.members
        ):
            raise self._refused(f"has more than {self.members - 1:,} members, too many for its size")

    def take(self, count: int) -> None:
        """Count bytes of content."""
        self.bytes += count
        if self.bytes > self.most:
            raise self._refused(f"holds more than {LARGEST_RATIO} times its own size")
        if self.bytes > self.room:
            raise DataError(
                f"{self.shown} holds more than the {cache.gigabytes(self.room)} that the cache may take.",
                f"Set {cache.SIZE_VARIABLE} to a larger number of gigabytes, or extract it and name the folder.",
            )

    def _refused(self, why: str) -> DataError:
        return DataError(
            f"{self.shown} {why}; nothing was extracted.", "If you trust it, extract it yourself and name the folder."
        )


_Members = Iterator[tuple[str, IO[bytes] | None]]


def _members(archive: Path, shown: str, budget: _Budget) -> _Members:
    """Return an iterator over the name of each folder and regular file, and for a file an open stream."""
    # Try tar first: is_zipfile accepts a tar whose last member is a zip.
    if _is_tar(archive):
        return _tar_members(archive, shown, budget)
    if zipfile.is_zipfile(archive):
        return _zip_members(archive, shown, budget)
    with archive.open("rb") as file:
        if recognise(file.read(SIGNATURE_BYTES)):
            parent = os.path.dirname(shown)
            raise DataError(f"{shown} is an image, not a folder or an archive.", f"Name the folder it is in: {parent}")
    raise DataError(f"{shown} is a file but not an archive that can be read.", _EXPECTED)


def _is_tar(archive: Path) -> bool:
    try:
        # Not tarfile.is_tarfile, which reads a first header of any size into memory.
        StrictTar.open(archive).close()
    except tarfile.TarError:
        return False
    return True


def _tar_members(archive: Path, shown: str, budget: _Budget) -> _Members:
    with StrictTar.open(archive) as tar:
        tar.place, tar.on_skip = shown, budget.take
        for member in tar:
            budget.member()
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them in memory
            if member.issym() or member.islnk():
                raise _refused(shown, member.name, f"is a link to {member.linkname!r}")
            if not member.isdir() and not member.isfile():
                raise _refused(shown, member.name, "is a device or another special file")
            yield member.name, tar.extractfile(member)


def _zip_members(archive: Path, shown: str, budget: _Budget) -> _Members:
    with zipfile.ZipFile(archive) as bundle:
        for member in bundle.infolist():
            budget.member()
            if not member.filename:  # zipfile fails on an empty name
                raise _refused(shown, "", "has no name")
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind == stat.S_IFLNK:
                raise _refused(shown, member.filename, "is a link")
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refused(shown, member.filename, "is a device or another special file")
            if member.flag_bits & 0x1:
                problem = f"{shown}: member {member.filename!r} is encrypted."
                raise DataError(problem, "Pack the images without a password.")
            if member.compress_type not in _ZIP_METHODS:
                method = _OTHER_ZIP_METHODS.get(member.compress_type, f"method {member.compress_type}")
                raise DataError(
                    f"{shown}: member {member.filename!r} is compressed with {method}, which is not supported (only "
                    f"{', '.join(_ZIP_METHODS.values())}).",
                    "Extract it with another program (unzip, 7z) and name the folder, or pack it as .tar.",
                )
            yield member.filename, None if member.is_dir() else bundle.open(member)


def _safe_parts(name: str, shown: str) -> tuple[str, ...]:
    """Return the parts of a member's relative path; raise DataError if it would leave the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts or "\0" in name:
        raise _refused(shown, name, "would be written outside the folder")
    if any(ord(sign) < 32 or ord(sign) == 127 for sign in name):
        raise _refused(shown, name, "has a control character in its name")
    return path.parts


def _refused(shown: str, name: str, why: str) -> DataError:
    return DataError(
        f"{shown}: member {name!r} {why}; nothing was extracted.",
        "Pack the images again, as plain files with relative paths.",
    )
