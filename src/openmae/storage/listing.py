"""List files at a URL with their versions, and request parts of them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from openmae.errors import DataError
from openmae.storage.checksums import has_plain_etag
from openmae.storage.filesystem import CONNECTIONS, ask, endpoint, is_missing, missing, open_filesystem
from openmae.storage.urls import append_suffix, checked, is_web, name_of, redact, scheme_of

if TYPE_CHECKING:
    from fsspec.asyn import AsyncFileSystem

log = logging.getLogger("openmae")

_MD5 = re.compile(r"[0-9a-f]{32}")
_LISTING_LIMIT = 120.0  # seconds: a million objects take a thousand requests
_BLOCK = 4 << 20  # bytes per request where a file cannot be streamed


@dataclass(frozen=True)
class RemoteFile:
    """One version of a file in a store.

    Attributes:
        name: path relative to the requested folder; file name if a single file was requested.
        path: path in the fsspec file system.
        size: bytes; None if unknown.
        version: ETag, or the time of the last change.
        md5: MD5 of the content in hexadecimal; empty if unknown.
        ranges: the server supports range requests.
    """

    name: str
    path: str
    size: int | None
    version: str
    md5: str = ""
    ranges: bool = True


@dataclass(frozen=True)
class Found:
    """The file or folder at a URL.

    Attributes:
        url: the URL that was looked up.
        files: all files of a folder, or one file followed by the requested companions that exist.
        folder: True for a folder.
    """

    url: str
    files: tuple[RemoteFile, ...]
    folder: bool

    @property
    def size(self) -> int:
        """Total size in bytes of the files whose size is known."""
        return sum(file.size or 0 for file in self.files)

    @property
    def key(self) -> str:
        """Hash of the URL (without secrets) and the files' names, versions and sizes."""
        digest = hashlib.sha256(redact(self.url).rstrip("/").encode())
        for file in self.files:
            digest.update(f"\0{file.name}\0{file.version}\0{file.size}".encode())
        return digest.hexdigest()[:20]


@dataclass(frozen=True)
class Answer:
    """A response that is being read.

    Attributes:
        read: returns up to the given number of bytes; empty at the end.
        file: the file as the response describes it.
        partial: the content begins at the requested position, not at the start of the file.
    """

    read: Callable[[int], Awaitable[bytes]]
    file: RemoteFile
    partial: bool


def look(url: str, suffixes: Sequence[str] = ()) -> Found:
    """Return what is at a URL.

    Args:
        url: URL of a file or a folder (a prefix; on a web server, a page of links whose URL ends with a slash).
        suffixes: also look for files named ``<file><suffix>``.

    Raises:
        DataError: there is no file or folder, or access is denied.
    """
    url = checked(url)
    filesystem = open_filesystem(url)
    file = None if url.endswith("/") else _file_at(filesystem, url)
    if file is not None:
        if unsafe_name(file.name):
            raise DataError(f"{redact(url)}: {file.name!r} is not a safe file name.", "Rename it.")
        if not file.version:
            log.warning(
                "%s has neither an ETag nor a date, so a copy is considered current while its size is the same. "
                "`mae cache clear` deletes it.",
                redact(url),
            )
        beside = [_file_at(filesystem, append_suffix(url, suffix)) for suffix in suffixes]
        return Found(url, (file, *(other for other in beside if other is not None)), folder=False)
    files = () if is_web(url) and not url.endswith("/") else list_files(url)
    if not files:
        raise missing(url)
    return Found(url, files, folder=True)


def exists(url: str) -> bool:
    """Return whether there is a file at a URL."""
    url = checked(url)
    return _file_at(open_filesystem(url), url) is not None


def require(url: str) -> None:
    """Raise unless there is a file or a non-empty folder at a URL, without listing the folder.

    Raises:
        DataError: there is no file or folder, or access is denied.
    """
    url = checked(url)
    filesystem = open_filesystem(url)
    is_folder = url.endswith("/")
    if not is_folder and _file_at(filesystem, url) is not None:
        return
    if (is_web(url) and not is_folder) or not ask(url, _holds_any(filesystem, url)):
        raise missing(url)


def list_files(url: str) -> tuple[RemoteFile, ...]:
    """Return the files below a folder, sorted by name; empty if there is no such folder.

    Raises:
        DataError: access is denied, a name would lead out of the folder, or a name is both a file and a folder.
    """
    url = checked(url)
    folder = url.rstrip("/") + "/"
    filesystem = open_filesystem(url)
    if not ask(url, _holds_any(filesystem, folder)):  # detects an unresponsive store long before _LISTING_LIMIT
        return ()
    listing = _list_web_folder if is_web(url) else _list_prefix
    files = sorted(ask(url, listing(filesystem, folder), limit=_LISTING_LIMIT), key=lambda file: file.name)
    names = {file.name for file in files}
    for name in names:
        if unsafe_name(name):
            raise DataError(f"{redact(url)} holds {name!r}, which is not a safe file name.", "Rename it.")
        if clash := next((str(parent) for parent in PurePosixPath(name).parents if str(parent) in names), ""):
            raise DataError(f"{redact(url)}: {clash!r} is both a file and a folder.", "Rename one of them.")
    return tuple(files)


def unsafe_name(name: str) -> bool:
    """Return whether a relative name has empty, ``.`` or ``..`` parts, backslashes or control characters."""
    unprintable = any(ord(sign) < 32 or ord(sign) == 127 for sign in name)
    return bool({"", ".", ".."} & set(name.split("/"))) or unprintable or "\\" in name


@asynccontextmanager
async def reading(filesystem: AsyncFileSystem, file: RemoteFile, start: int, stop: int | None) -> AsyncIterator[Answer]:
    """Request bytes ``start`` to ``stop`` of a file, or to its end if ``stop`` is None.

    Servers without support for ranges send the file from its beginning.
    """
    whole = start == 0 and stop in (None, file.size)
    span = {} if whole or not file.ranges else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
    if "s3" in filesystem.protocol:
        bucket, key, _ = filesystem.split_path(file.path)
        reply = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **span)
        try:
            yield Answer(reply["Body"].read, _s3_file(file.path, reply), _begins_at(start, reply.get("ContentRange")))
        finally:
            reply["Body"].close()
    elif "http" in filesystem.protocol:
        session = await filesystem.set_session()
        async with session.get(filesystem.encode_url(file.path), headers=span) as response:
            response.raise_for_status()
            partial = response.status == 206 and _begins_at(start, response.headers.get("Content-Range"))
            yield Answer(response.content.read, _web_file(file.path, response), partial)
    else:
        place, end = start, (file.size if stop is None else stop) or 0

        async def read(count: int) -> bytes:
            nonlocal place
            if place >= end:
                return b""
            content: bytes = await filesystem._cat_file(file.path, start=place, end=min(place + _BLOCK, end))
            place += len(content)
            return content

        yield Answer(read, file, partial=True)


def _begins_at(start: int, content_range: str | None) -> bool:
    """Return whether a range such as ``bytes 10-19/100`` begins at ``start``; a server may send another one."""
    return str(content_range or "").startswith(f"bytes {start}-")


def _file_at(filesystem: AsyncFileSystem, url: str) -> RemoteFile | None:
    path = url if is_web(url) else filesystem._strip_protocol(url)
    if not is_web(url) and "/" not in path.strip("/"):
        return None  # a bucket
    question = {"s3": _ask_s3, "http": _ask_web, "https": _ask_web}.get(scheme_of(url), _ask_other)
    try:
        return ask(url, question(filesystem, path))
    except DataError as error:
        if is_missing(error):
            return None
        raise


async def _ask_s3(filesystem: Any, path: str) -> RemoteFile:
    # GET without reading the body: an error response to HEAD has no body that gives the reason
    bucket, key, _ = filesystem.split_path(path)
    reply = await filesystem._call_s3("get_object", Bucket=bucket, Key=key)
    reply["Body"].close()
    return _s3_file(path, reply)


async def _ask_web(filesystem: Any, url: str) -> RemoteFile:
    # GET, since many signed URLs do not allow HEAD; the first byte shows whether ranges are supported
    session = await filesystem.set_session()
    async with session.get(filesystem.encode_url(url), headers={"Range": "bytes=0-0"}) as response:
        if response.status == 416:
            return replace(_web_file(url, response), size=0)
        response.raise_for_status()
        return _web_file(url, response)


async def _ask_other(filesystem: Any, path: str) -> RemoteFile:
    info = await filesystem._info(path)
    if info.get("type") == "directory":
        raise FileNotFoundError(path)
    return listed_file(name_of(path), info)


def _s3_file(path: str, reply: Mapping[str, Any]) -> RemoteFile:
    total = str(reply.get("ContentRange", "")).rpartition("/")[2]
    size = int(total) if total.isdecimal() else reply["ContentLength"]
    etag = str(reply.get("ETag") or "").strip('"')
    if not etag:
        url, kind = f"s3://{path}", str(reply.get("ContentType") or "no content type").partition(";")[0]
        raise DataError(
            f"{redact(url)}: the response is not from an object store: {size:,} bytes of {kind}, without an ETag.",
            f"Check {endpoint(url)}, and whether a proxy or a login page responds instead.",
        )
    return RemoteFile(
        path.rpartition("/")[2], path, size, etag, etag if _is_md5(etag) and has_plain_etag(reply) else ""
    )


def _web_file(url: str, response: Any) -> RemoteFile:
    headers = response.headers
    total = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
    size = int(total) if total.isdecimal() else None
    version = headers.get("ETag", "").strip('"') or headers.get("Last-Modified", "")
    try:
        md5 = base64.b64decode(headers.get("Content-MD5", ""), validate=True).hex()
    except ValueError:
        md5 = ""
    md5 = md5 if _is_md5(md5) and "Content-Range" not in headers else ""
    return RemoteFile(unquote(name_of(url)), url, size, version, md5, response.status == 206 and size is not None)


def listed_file(name: str, info: Mapping[str, Any]) -> RemoteFile:
    """Return a file from fsspec's ``info`` about it."""
    etag = str(info.get("ETag") or info.get("etag") or "").strip('"')
    modified = str(info.get("LastModified") or info.get("mtime") or info.get("updated") or "")
    md5 = base64.b64decode(info["md5Hash"]).hex() if info.get("md5Hash") else ""
    return RemoteFile(name, info["name"], info.get("size"), etag or modified, md5)


def _is_md5(text: str) -> bool:
    return _MD5.fullmatch(text) is not None


async def _list_prefix(filesystem: Any, folder: str) -> list[RemoteFile]:
    root = filesystem._strip_protocol(folder).rstrip("/") + "/"
    found: Mapping[str, Any] = await filesystem._find(root, detail=True)
    return [
        listed_file(path.removeprefix(root), info)
        for path, info in found.items()
        if path.startswith(root) and path != root and not path.endswith("/") and info.get("type") != "directory"
    ]


async def _list_web_folder(filesystem: Any, folder: str) -> list[RemoteFile]:
    """Return the files linked from the index pages at and below ``folder``."""
    gate = asyncio.Semaphore(CONNECTIONS)

    async def ask_for(url: str) -> RemoteFile:
        async with gate:
            return replace(await _ask_web(filesystem, url), name=unquote(url.removeprefix(folder)))

    pages, seen = [folder], {folder}
    urls: set[str] = set()
    while pages:
        for link in await filesystem._ls(pages.pop(), detail=False):
            link = link.partition("?")[0].partition("#")[0]
            if not link.startswith(folder) or link in seen or "/../" in link:
                continue
            seen.add(link)
            (pages.append if link.endswith("/") else urls.add)(link)
    return list(await asyncio.gather(*map(ask_for, sorted(urls))))


async def _holds_any(filesystem: Any, url: str) -> bool:
    if is_web(url):
        return bool(await filesystem._ls(url, detail=False))
    folder = filesystem._strip_protocol(url).rstrip("/")
    if scheme_of(url) != "s3":
        return bool(await filesystem._exists(folder))
    bucket, _, prefix = folder.partition("/")
    below = f"{prefix}/" if prefix else ""
    reply = await filesystem._call_s3("list_objects_v2", Bucket=bucket, Prefix=below, MaxKeys=1)
    return bool(reply.get("Contents"))
