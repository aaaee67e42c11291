"""Verify a file against an S3 object whose ETag is not its MD5: multipart uploads, SSE-KMS.

The ETag of an upload in N parts is the MD5 of the parts' MD5s, followed by ``-N``. A store's other checksums
(``x-amz-checksum-*``) cover the complete object or, with the same suffix, the parts' checksums.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from openmae.storage.filesystem import is_transient

_CHUNK = 1 << 20
_PARTS = re.compile(r"(.+)-([1-9][0-9]{0,4})")


class _Crc32:
    """CRC-32 with the interface of hashlib."""

    def __init__(self, content: bytes = b"") -> None:
        self._value = zlib.crc32(content)

    def update(self, content: bytes) -> None:
        self._value = zlib.crc32(content, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


_MD5 = partial(hashlib.md5, usedforsecurity=False)
_ALGORITHMS: dict[str, Callable[..., Any]] = {
    "SHA256": hashlib.sha256,
    "SHA1": partial(hashlib.sha1, usedforsecurity=False),
    "CRC32": _Crc32,
}


class _Checksum(NamedTuple):
    """The digest of an object or, if ``parts`` is not 0, of the digests of its parts."""

    algorithm: Callable[..., Any]
    digest: bytes
    parts: int


async def content_matches(filesystem: Any, bucket: str, key: str, path: Path) -> bool | None:
    """Return whether a file has the object's checksum; None if the store gives none that can be computed."""

    async def head(**more: Any) -> Mapping[str, Any]:
        return await filesystem._call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED", **more)

    compared, size = False, path.stat().st_size
    try:
        for checksum in _checksums(await head()):
            async for sizes in _part_sizes(head, checksum.parts, size):
                compared = True
                if await asyncio.to_thread(_digest, path, checksum, sizes) == checksum.digest:
                    return True
    except Exception as error:
        if is_transient(error):
            raise
        return None  # a store that does not support these requests
    return False if compared else None


def _checksums(reply: Mapping[str, Any]) -> list[_Checksum]:
    found = []
    etag = _PARTS.fullmatch(str(reply.get("ETag", "")).strip('"'))
    if etag and has_plain_etag(reply) and re.fullmatch("[0-9a-f]{32}", etag[1]):
        found.append(_Checksum(_MD5, bytes.fromhex(etag[1]), int(etag[2])))
    for name, algorithm in _ALGORITHMS.items():
        if value := str(reply.get(f"Checksum{name}") or ""):
            parts = _PARTS.fullmatch(value)
            digest = base64.b64decode(parts[1] if parts else value, validate=True)
            found.append(_Checksum(algorithm, digest, int(parts[2]) if parts else 0))
    return found


def has_plain_etag(reply: Mapping[str, Any]) -> bool:
    """Return whether an object's ETag is made of MD5s; it is not with SSE-KMS or SSE-C."""
    return reply.get("ServerSideEncryption") in (None, "AES256") and not reply.get("SSECustomerAlgorithm")


async def _part_sizes(head: Callable[..., Any], parts: int, size: int) -> AsyncIterator[list[int]]:
    """Yield possible lists of part sizes: first equal sizes except the last, then the sizes that the store reports."""
    if not parts:
        yield [size]
        return
    first = (await head(PartNumber=1))["ContentLength"]
    equal = [*[first] * (parts - 1), size - first * (parts - 1)]
    if 0 < equal[-1] <= first:
        yield equal
    rest = await asyncio.gather(*(head(PartNumber=number) for number in range(2, parts + 1)))
    sizes = [first, *(reply["ContentLength"] for reply in rest)]
    if sizes != equal and sum(sizes) == size:  # a store that ignores PartNumber reports the size of the object
        yield sizes


def _digest(path: Path, checksum: _Checksum, sizes: Sequence[int]) -> bytes:
    digests = []
    with path.open("rb") as file:
        for size in sizes:
            part, left = checksum.algorithm(), size
            while left and (chunk := file.read(min(_CHUNK, left))):
                part.update(chunk)
                left -= len(chunk)
            digests.append(part.digest())
    return checksum.algorithm(b"".join(digests)).digest() if checksum.parts else digests[0]
