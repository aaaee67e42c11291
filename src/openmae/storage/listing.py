"""What lies at a URL (a file, or a folder of files, each with its version), and its bytes from one place to another."""

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
from typing import Any
from urllib.parse import unquote

from fsspec.asyn import AsyncFileSystem

from openmae.errors import DataError
from openmae.storage.filesystem import CONNECTIONS, ask, endpoint, error_code, explain, open_filesystem
from openmae.storage.urls import checked, join, name_of, redact, scheme_of

log = logging.getLogger("openmae")

_MD5 = re.compile(r"[0-9a-f]{32}")
_LISTING_LIMIT = 120.0  # seconds: a million objects are a thousand answers


@dataclass(frozen=True)
class RemoteFile:
    """A file of a store, in one version.

    Attributes:
        name: relative to the folder that was asked for; a single file's own name.
        path: what the file system calls it.
        size: in bytes; None where the server does not say.
        version: ETag, or what else changes with the content.
        md5: of the content, in hexadecimal; empty where the store does not give it.
        ranges: whether a part of it can be asked for.
    """

    name: str
    path: str
    size: int | None
    version: str
    md5: str = ""
    ranges: bool = True


@dataclass(frozen=True)
class Found:
    """What lies at a URL.

    Attributes:
        url: as given.
        files: all of a folder, or the one file and then those beside it that were asked for.
        folder: whether the URL is a folder's.
    """

    url: str
    files: tuple[RemoteFile, ...]
    folder: bool

    @property
    def size(self) -> int:
        """In bytes, of all that say so."""
        return sum(file.size or 0 for file in self.files)

    @property
    def key(self) -> str:
        """Names this content: the same URL with the same versions."""
        digest = hashlib.sha256(redact(self.url).rstrip("/").encode())
        for file in self.files:
            digest.update(f"\0{file.name}\0{file.version}\0{file.size}".encode())
        return digest.hexdigest()[:20]


@dataclass
class Answer:
    """Bytes on their way.

    Attributes:
        read: up to so many next ones, none at the end.
        version: of the file that they are of.
        partial: they begin where it was asked, not at the start of the file.
        md5: of the whole file, where the answer says so.
        size: of the whole file, where the answer says so.
    """

    read: Callable[[int], Awaitable[bytes]]
    version: str
    partial: bool
    md5: str = ""
    size: int | None = None


def look(url: str, suffixes: Sequence[str] = ()) -> Found:
    """Find out what lies at a URL.

    Args:
        url: of a file, or of a folder (a prefix; on a web server, a page of links that ends with a slash).
        suffixes: files named after the one, such as ``.json`` for ``<file>.json``, that are wanted where they exist.

    Raises:
        DataError: nothing is there, or the store does not let us; within 30 seconds.
    """
    url = checked(url)
    filesystem = open_filesystem(url)
    if not url.endswith("/"):
        file = _file_at(filesystem, url)
        if file is not None:
            if unsafe_name(file.name):
                raise DataError(f"{redact(url)}: {file.name!r} is no safe name of a file.", "Rename it.")
            if not file.version:
                log.warning(
                    "%s has neither an ETag nor a date: a copy is taken for the same as long as its size is. "
                    "`mae cache clear` forgets it.",
                    redact(url),
                )
            beside = [_file_at(filesystem, _beside(url, suffix)) for suffix in suffixes]
            return Found(url, (file, *(other for other in beside if other is not None)), folder=False)
    files = () if scheme_of(url).startswith("http") and not url.endswith("/") else list_files(url)
    if not files:
        raise explain(FileNotFoundError(), url)
    return Found(url, files, folder=True)


def exists(url: str) -> bool:
    """Whether a file is there."""
    url = checked(url)
    return _file_at(open_filesystem(url), url) is not None


def require(url: str) -> None:
    """Refuse a URL at which there is neither a file nor a folder that holds one, without listing all of it.

    Raises:
        DataError: nothing is there, or the store does not let us; within 30 seconds.
    """
    url = checked(url)
    filesystem = open_filesystem(url)
    if not url.partition("?")[0].endswith("/"):
        if _file_at(filesystem, url) is not None:
            return
        if scheme_of(url).startswith("http"):
            raise explain(FileNotFoundError(), url)
    if not ask(url, _holds_any(filesystem, url)):
        raise explain(FileNotFoundError(), url)


def list_files(url: str) -> tuple[RemoteFile, ...]:
    """The files below a folder, by name; none where there is no such folder.

    Raises:
        DataError: the store does not let us, a name would lead out of the folder, or two names exclude each other.
    """
    url = checked(url)
    folder = url if url.endswith("/") else join(url, "") + "/"
    folder = folder.rstrip("/") + "/"
    filesystem = open_filesystem(url)
    if not ask(url, _holds_any(filesystem, folder)):  # a store that is silent is known long before the limit of a list
        return ()
    if scheme_of(url).startswith("http"):
        files = ask(url, _list_web_folder(filesystem, folder), limit=_LISTING_LIMIT)
    else:
        files = ask(url, _list_prefix(filesystem, folder), limit=_LISTING_LIMIT)
    files = sorted(files, key=lambda file: file.name)
    names = {file.name for file in files}
    for name in names:
        if unsafe_name(name):
            raise DataError(f"{redact(url)} holds {name!r}, which is no safe name of a file.", "Rename it.")
        if clash := next((str(parent) for parent in PurePosixPath(name).parents if str(parent) in names), ""):
            raise DataError(f"{redact(url)}: {clash!r} is both a file and a folder.", "Rename one of them.")
    return tuple(files)


def unsafe_name(name: str) -> bool:
    """Whether a relative name would lead out of a folder, or break the lines of a list."""
    parts = name.split("/")
    return (
        bool({"", ".", ".."} & set(parts)) or any(ord(sign) < 32 or ord(sign) == 127 for sign in name) or "\\" in name
    )


@asynccontextmanager
async def reading(filesystem: AsyncFileSystem, file: RemoteFile, start: int, stop: int | None) -> AsyncIterator[Answer]:
    """Open bytes ``start`` to ``stop`` of a file; None: to the end.

    Without ranges the answer begins at byte 0.
    """
    whole = start == 0 and stop in (None, file.size)
    span = {} if whole or not file.ranges else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
    if filesystem.protocol and "s3" in filesystem.protocol:
        bucket, key, _ = filesystem.split_path(file.path)
        reply = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **span)
        try:
            facts = _s3_facts(reply, file.path)
            partial = _begins(reply.get("ContentRange", ""), start)
            yield Answer(reply["Body"].read, _version(facts), partial, _s3_md5(reply), facts["size"])
        finally:
            reply["Body"].close()
    elif hasattr(filesystem, "set_session") and "http" in filesystem.protocol:
        session = await filesystem.set_session()
        async with session.get(filesystem.encode_url(file.path), headers=span) as response:
            response.raise_for_status()
            facts = _web_facts(response.headers)
            partial = response.status == 206 and _begins(response.headers.get("Content-Range", ""), start)
            yield Answer(response.content.read, _version(facts), partial, facts["md5"], facts["size"])
    else:
        yield await _piecewise(filesystem, file, start, stop)


async def _piecewise(filesystem: AsyncFileSystem, file: RemoteFile, start: int, stop: int | None) -> Answer:
    """For a file system of which no more is known than that it gives parts of a file."""
    place, end = start, file.size if stop is None else stop

    async def read(count: int) -> bytes:
        nonlocal place
        upto = min(place + max(count, 4 << 20), end or 0)
        if upto <= place:
            return b""
        content: bytes = await filesystem._cat_file(file.path, start=place, end=upto)
        place += len(content)
        return content

    return Answer(read, file.version, partial=True)


def _file_at(filesystem: AsyncFileSystem, url: str) -> RemoteFile | None:
    """The file at a URL; None where there is none."""
    path = url if scheme_of(url).startswith("http") else filesystem._strip_protocol(url)
    name = unquote(name_of(url)) if path == url else name_of(url)
    if path != url and "/" not in path.strip("/"):
        return None  # a bucket
    if scheme_of(url) == "s3":
        question = _s3_file(filesystem, path)
    elif path == url:
        question = _web_file(filesystem, path)
    else:
        question = _other_file(filesystem, path)
    try:
        return replace(ask(url, question), name=name)
    except DataError as error:
        missing = isinstance(error.__cause__, FileNotFoundError) or error_code(error) in ("NoSuchKey", "404")
        if missing and error_code(error) != "NoSuchBucket":
            return None
        raise


async def _s3_file(filesystem: Any, path: str) -> RemoteFile:
    # HEAD has no body and so no reason for a refusal: ask for the file, and do not read it.
    bucket, key, _ = filesystem.split_path(path)
    reply = await filesystem._call_s3("get_object", Bucket=bucket, Key=key)
    reply["Body"].close()
    facts = _s3_facts(reply, path)
    return RemoteFile("", path, facts["size"], _version(facts), _s3_md5(reply))


async def _web_file(filesystem: Any, url: str) -> RemoteFile:
    # a signed address is often good for GET alone; the first byte tells whether parts can be had
    session = await filesystem.set_session()
    async with session.get(filesystem.encode_url(url), headers={"Range": "bytes=0-0"}) as response:
        empty = response.status == 416
        if not empty:
            response.raise_for_status()
        facts = _web_facts(response.headers)
    ranges = response.status == 206 and facts["size"] is not None
    return RemoteFile("", url, 0 if empty else facts["size"], _version(facts), facts["md5"], ranges)


async def _other_file(filesystem: Any, path: str) -> RemoteFile:
    info = await filesystem._info(path)
    if info.get("type") == "directory":
        raise FileNotFoundError(path)
    return _from_info("", info)


async def _list_prefix(filesystem: Any, folder: str) -> list[RemoteFile]:
    root = filesystem._strip_protocol(folder).rstrip("/") + "/"
    found: Mapping[str, Any] = await filesystem._find(root, detail=True)
    return [
        _from_info(path.removeprefix(root), info)
        for path, info in found.items()
        if path.startswith(root) and path != root and not path.endswith("/") and info.get("type") != "directory"
    ]


async def _holds_any(filesystem: Any, url: str) -> bool:
    if scheme_of(url).startswith("http"):
        return bool(await filesystem._ls(url, detail=False))
    folder = filesystem._strip_protocol(url).rstrip("/")
    if scheme_of(url) != "s3":
        return bool(await filesystem._exists(folder))
    bucket, _, prefix = folder.partition("/")
    below = f"{prefix}/" if prefix else ""
    reply = await filesystem._call_s3("list_objects_v2", Bucket=bucket, Prefix=below, MaxKeys=1)
    return bool(reply.get("Contents"))


def _from_info(name: str, info: Mapping[str, Any]) -> RemoteFile:
    facts: dict[str, Any] = {
        "etag": info.get("ETag") or info.get("etag") or "",
        "size": info.get("size"),
        "modified": info.get("LastModified") or info.get("mtime") or info.get("updated") or "",
    }
    md5 = base64.b64decode(info["md5Hash"]).hex() if info.get("md5Hash") else ""
    return RemoteFile(name, info["name"], facts["size"], _version(facts), md5)


async def _list_web_folder(filesystem: Any, folder: str) -> list[RemoteFile]:
    """The files that the pages of links below ``folder`` lead to."""
    base, _, query = folder.partition("?")
    gate = asyncio.Semaphore(CONNECTIONS)

    async def facts(url: str) -> RemoteFile:
        async with gate:
            return replace(await _web_file(filesystem, url), name=unquote(url.removeprefix(base)))

    pages, seen = [base], {base}
    urls: set[str] = set()
    while pages:
        for link in await filesystem._ls(pages.pop() + (f"?{query}" if query else ""), detail=False):
            link = link.partition("?")[0].partition("#")[0]
            if not link.startswith(base) or link in seen or "/../" in link:
                continue
            seen.add(link)
            (pages.append if link.endswith("/") else urls.add)(link)
    return list(await asyncio.gather(*map(facts, sorted(urls))))


def _s3_facts(reply: Mapping[str, Any], path: str) -> dict[str, Any]:
    total = str(reply.get("ContentRange", "")).rpartition("/")[2]
    size = int(total) if total.isdecimal() else reply["ContentLength"]
    if not reply.get("ETag"):
        url = f"s3://{path}"
        kind = str(reply.get("ContentType") or "no content type").partition(";")[0]
        raise DataError(
            f"{redact(url)}: the answer does not come from an object store: {size:,} bytes of {kind}, without an ETag.",
            f"Check {endpoint(url)}, and whether a proxy or a login page answers in its place.",
        )
    return {"etag": reply["ETag"], "size": size, "modified": reply.get("LastModified", "")}


def _begins(content_range: str, start: int) -> bool:
    """Whether ``bytes 10-19/100`` is of a part that begins at ``start``; a server may ignore what was asked for."""
    return content_range.startswith(f"bytes {start}-")


def _s3_md5(reply: Mapping[str, Any]) -> str:
    """An ETag is the MD5 of what was written in one piece and not encrypted with a key of its own."""
    etag = str(reply.get("ETag", "")).strip('"')
    plain = reply.get("ServerSideEncryption") in (None, "AES256") and not reply.get("SSECustomerAlgorithm")
    return etag if plain and _MD5.fullmatch(etag) else ""


def _web_facts(headers: Mapping[str, str]) -> dict[str, Any]:
    total = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
    md5 = headers.get("Content-MD5", "") if "Content-Range" not in headers else ""
    try:
        md5 = base64.b64decode(md5, validate=True).hex()
    except ValueError:
        md5 = ""
    return {
        "etag": headers.get("ETag", ""),
        "size": int(total) if total.isdecimal() else None,
        "modified": headers.get("Last-Modified", ""),
        "md5": md5 if _MD5.fullmatch(md5) else "",
    }


def _version(facts: Mapping[str, Any]) -> str:
    """An ETag without its quotes, else the time of the last change."""
    return str(facts["etag"]).strip('"') or str(facts["modified"])


def _beside(url: str, suffix: str) -> str:
    base, mark, query = (url, "", "") if not scheme_of(url).startswith("http") else url.partition("?")
    return f"{base}{suffix}{mark}{query}"
