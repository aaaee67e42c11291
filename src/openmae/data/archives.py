"""From a source in a spec to a local folder: fetched where it is remote, an archive extracted once into the cache."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import logging
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, TYPE_CHECKING, Self, cast

from openmae.errors import DataError
from openmae.inputs import irregular
from openmae.storage import cache
from openmae.storage.printable import original_name, printable_name
from openmae.storage.urls import is_remote, redact

if TYPE_CHECKING:
    from openmae.storage.listing import Found

log = logging.getLogger("openmae")

ARCHIVE_KINDS = ".tar, .tar.gz, .tgz or .zip"
FREE_BYTES = 10**9  # that any archive may hold; a larger content must not be
LARGEST_RATIO = 200  # times as large as the archive
FREE_MEMBERS = 100_000  # that any archive may have; of more, each must take
SMALLEST_MEMBER = 400  # bytes of the archive,
SMALLEST_CONTENT = 64  # and have so many itself: there are no smaller pictures
_LARGEST_HEADER = 1 << 20
_METADATA = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE),
    tarfile.SOLARIS_XHDTYPE,
)
# UnicodeError: of names that are not the UTF-8 that they are said to be
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError),
    *(EOFError, NotImplementedError, UnicodeError),
)
_ZIP_METHODS = {0: "stored", 8: "deflate", 12: "bzip2", 14: "LZMA"}
_OTHER_ZIP_METHODS = {9: "Deflate64", 93: "Zstandard", 95: "XZ", 98: "PPMd"}


class StrictTarInfo(tarfile.TarInfo):
    """Python takes a broken or missing header for the end of the archive; only the end mark is that."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, and no end mark") from error

    def _proc_member(self, archive: tarfile.TarFile) -> Self:
        if self.type in _METADATA and self.size > _LARGEST_HEADER:  # it would be read into memory
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def tar_parts(
    first: tarfile.TarFile, place: str, take: Callable[[int], None] = lambda count: None
) -> Iterator[tarfile.TarFile]:
    """Yield a tar file and those that are written after it in the same stream, as ``cat a.tar b.tar`` does.

    Each one must be read to its end before the next is asked for.

    Args:
        first: at the start of the stream.
        place: of the stream, for a warning about what follows and is no tar file.
        take: counts the bytes that are looked through.
    """
    part, stream = first, cast("IO[bytes]", first.fileobj)
    try:
        while True:
            yield part
            start = _next_header(stream, place, take)
            if start is None:
                return
            stream.seek(start)
            part = tarfile.open(fileobj=stream, mode="r:", tarinfo=StrictTarInfo)  # noqa: SIM115
    finally:
        first.close()


def _next_header(stream: IO[bytes], place: str, take: Callable[[int], None]) -> int | None:
    """Where the next tar file begins, after the end mark of the one before; None where there is none."""
    try:
        while block := stream.read(tarfile.BLOCKSIZE):
            take(len(block))
            if block.strip(b"\0"):
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                return stream.tell() - len(block)
    except (tarfile.HeaderError, gzip.BadGzipFile) as error:  # type: ignore[attr-defined]
        if isinstance(error, gzip.BadGzipFile) and "CRC" in str(error):
            raise
        log.warning("%s: after the end of the tar file there is something that is not read.", place)
    return None


# A regular file of an archive: its name, and how to open it.
_Member = tuple[str, Callable[[], IO[bytes] | None]]


def resolve_source(source: str | os.PathLike[str], cache_dir: Path | None = None) -> Path:
    """Return the local folder that ``source`` stands for.

    A folder is returned as it is. An archive (.tar, .tar.gz, .tgz, .zip) is extracted once for each version: an
    interrupted extraction is never taken for a finished one, and of several processes that ask for it at once one
    extracts. A remote folder is downloaded; a remote archive is downloaded, extracted and then removed.

    Args:
        source: a folder or an archive: a path, or an s3://, gs://, http:// or https:// URL.
        cache_dir: where archives are extracted; default ``sources`` in the cache.

    Raises:
        DataError: nothing is there, it is empty, not an archive, damaged or made to do harm, or does not fit.
    """
    text = os.fspath(source).strip()
    if not text:
        raise DataError("The data source is empty.", "Name a folder or an archive, local or s3://, gs://, https://.")
    if is_remote(text):
        return _remote(text)
    if "://" in text:
        scheme = text.partition("://")[0]
        raise DataError(f"{redact(text)}: {scheme}:// cannot be read.", "Use s3://, gs://, https:// or a local path.")
    try:
        path = Path(text).expanduser().resolve()
        if not path.exists() and (other := Path(original_name(text)).expanduser()).exists():
            path = other.resolve()  # the printable form of a name that is not UTF-8, which a spec cannot hold
        if path.is_dir():
            if not any(path.iterdir()):
                raise DataError(f"The folder {path} is empty.", "Put images into it, or name another folder.")
            return path
        if path.exists() and (kind := irregular(path)):
            raise DataError(f"{path} is {kind}.", f"Name a folder of images, or an archive ({ARCHIVE_KINDS}).")
        if not path.is_file():
            raise DataError(f"There is no file or folder {path}.", _hint_for_missing(path))
        facts = path.stat()
        path.open("rb").close()
    except (OSError, ValueError, RuntimeError) as error:  # no right to read it, a NUL in it, no such user's home
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{printable_name(text)} cannot be read ({getattr(error, 'strerror', None) or error}).",
            "Give yourself the right to read it (chmod -R u+rX), or name another source.",
        ) from error
    content = f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}".encode("utf-8", "surrogateescape")
    key = hashlib.sha256(content).hexdigest()[:16]
    entry = (cache_dir or cache.root() / cache.SOURCES) / f"{path.name.split('.')[0]}-{key}"
    return _obtained(entry, printable_name(str(path)), facts.st_size, lambda part: _fill(path, part))


def _remote(url: str) -> Path:
    from openmae.storage.download import fetch_with

    return fetch_with(url, _from_store)


def _from_store(found: Found) -> Path:
    from openmae.storage.download import local_copy

    if found.folder:
        return local_copy(found)
    (file,) = found.files
    shown = redact(found.url)
    entry = cache.root() / cache.SOURCES / f"{file.name.split('.')[0]}-{found.key}"
    downloads = cache.root() / cache.REMOTE / found.key

    def build(part: Path) -> None:
        with cache.holding():
            archive = local_copy(found)
            _fill(archive, part, shown)
        cache.remove(downloads)

    return _obtained(entry, shown, found.size, build)


def _obtained(entry: Path, origin: str, size: int, build: Callable[[Path], None]) -> Path:
    try:
        return cache.obtain(entry, origin, build, size=size)
    except OSError as error:
        raise DataError(
            f"{origin} could not be extracted into {entry.parent}: {error.strerror or error}.",
            f"Make room and see to its permissions, or set {cache.CACHE_VARIABLE} to another folder.",
        ) from error


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


def _fill(archive: Path, folder: Path, shown: str = "") -> None:
    """Extract ``archive`` into an empty folder."""
    log.info("Extracting %s into %s", shown or archive, folder.parent)
    try:
        count = _extract(archive, folder)
    except DataError as error:
        raise DataError(error.problem.replace(str(archive), shown or str(archive)), error.fix) from error
    if count == 0:
        raise DataError(f"The archive {shown or archive} holds no files.", "Pack images into it.")


def _extract(archive: Path, folder: Path) -> int:
    count, budget, replaced = 0, _Budget(archive), ""
    try:
        for name, open_member in _members(archive, budget):
            target = folder.joinpath(*_safe_parts(name, archive))
            target.parent.mkdir(parents=True, exist_ok=True)
            replaced = replaced or (name if target.exists() else "")
            stream = open_member()
            assert stream is not None  # regular files always open
            with stream, target.open("wb") as out:
                shutil.copyfileobj(_Counting(stream, budget), out, length=1 << 20)
            count += 1
    except _DAMAGE as error:
        raise DataError(
            f"The archive {archive} is damaged or cut short after {count} files ({error}).",
            "Copy or pack it again.",
        ) from error
    if replaced:
        log.warning(
            "%s has several members of one name, such as %s: of each name only the last one is read.",
            *(printable_name(str(archive)), printable_name(replaced)),
        )
    return count


class _Budget:
    """What an archive may hold before it is taken for one that is made to fill the disk."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        self.packed = archive.stat().st_size
        self.most = max(FREE_BYTES, LARGEST_RATIO * self.packed)
        self.room = cache.limit()
        self.bytes = 0
        self.members = 0

    def member(self) -> None:
        """Count one member, a folder or a file."""
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
                f"{self.archive} holds more than the {cache.gigabytes(self.room)} that the cache may take.",
                f"Set {cache.SIZE_VARIABLE} to a larger number of gigabytes, or extract it and name the folder.",
            )

    def _refused(self, why: str) -> DataError:
        return DataError(
            f"{self.archive} {why}; nothing was extracted.", "If it is right, extract it yourself and name the folder."
        )


class _Counting:
    """A stream to copy from."""

    def __init__(self, stream: IO[bytes], budget: _Budget) -> None:
        self._stream = stream
        self._budget = budget

    def read(self, size: int = -1, /) -> bytes:
        chunk = self._stream.read(size)
        self._budget.take(len(chunk))
        return chunk


def _members(archive: Path, budget: _Budget) -> Iterator[_Member]:
    # A tar may end with a zip, which is_zipfile would believe: ask for a tar first.
    if _is_tar(archive):
        yield from _tar_members(archive, budget)
    elif zipfile.is_zipfile(archive):
        yield from _zip_members(archive, budget)
    else:
        raise DataError(
            f"{archive} is a file but not an archive that can be read.",
            f"Name a folder of images, or an archive ({ARCHIVE_KINDS}).",
        )


def _is_tar(archive: Path) -> bool:
    try:
        tarfile.open(archive, tarinfo=StrictTarInfo).close()
    except tarfile.TarError:
        return False
    return True


def _tar_members(archive: Path, budget: _Budget) -> Iterator[_Member]:
    first = tarfile.open(archive, tarinfo=StrictTarInfo)  # noqa: SIM115  (tar_parts closes it)
    for tar in tar_parts(first, str(archive), budget.take):
        for member in tar:
            budget.member()
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            if member.issym() or member.islnk():
                raise _refused(archive, member.name, f"is a link to {member.linkname!r}")
            if member.isdir():
                _safe_parts(member.name, archive)
            elif member.isfile():
                yield member.name, lambda tar=tar, member=member: tar.extractfile(member)  # type: ignore[misc]
            else:
                raise _refused(archive, member.name, "is a device or another special file")


def _zip_members(archive: Path, budget: _Budget) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as bundle:
        for member in bundle.infolist():
            budget.member()
            if not member.filename:  # which zipfile itself does not expect
                raise _refused(archive, "", "has no name")
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
            if member.compress_type not in _ZIP_METHODS:
                method = _OTHER_ZIP_METHODS.get(member.compress_type, f"method {member.compress_type}")
                raise DataError(
                    f"{archive}: member {member.filename!r} is compressed by {method}, which cannot be read here "
                    f"(only {', '.join(_ZIP_METHODS.values())}).",
                    "Extract it with another program (unzip, 7z) and name the folder, or pack it as .tar.",
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
    if any(ord(sign) < 32 or ord(sign) == 127 for sign in name):
        raise _refused(archive, name, "has a control character in its name")
    return path.parts


def _refused(archive: Path, name: str, why: str) -> DataError:
    return DataError(
        f"{archive}: member {name!r} {why}; nothing was extracted.",
        "Pack the images again, as plain files with relative paths.",
    )
