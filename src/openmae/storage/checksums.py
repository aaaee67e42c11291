"""What an S3 store knows of an object's content, where its ETag is not the MD5 of all of it: multi-part uploads, KMS.

The ETag of an upload in N parts is the MD5 of the parts' MD5s, followed by ``-N``. The other checksums of a store
(``x-amz-checksum-*``) are of the complete object, or, with the same ending, of the parts' checksums.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmae.storage.filesystem import is_transient

_CHUNK = 1 << 20
_OF_PARTS = re.compile(r"(.+)-([1-9][0-9]{0,4})")


class _Crc32:
    """With the face of hashlib."""

    def __init__(self, content: bytes = b"") -> None:
        self._value = zlib.crc32(content)

    def update(self, content: bytes) -> None:
        self._value = zlib.crc32(content, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


def _md5(content: bytes = b"") -> Any:
    return hashlib.md5(content, usedforsecurity=False)


def _sha1(content: bytes = b"") -> Any:
    return hashlib.sha1(content, usedforsecurity=False)


@dataclass(frozen=True)
class _Checksum:
    """``digest`` of the object, or of the digests of its ``parts``."""

    algorithm: Callable[..., Any]
    digest: bytes
    parts: int = 0


async def content_matches(filesystem: Any, bucket: str, key: str, path: Path) -> bool | None:
    """Whether a file holds what the store does; None where the store gives no checksum that can be computed here."""

    async def head(**more: Any) -> Mapping[str, Any]:
        return await filesystem._call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED", **more)

    compared, size = False, path.stat().st_size
    try:
        for checksum in _checksums(await head()):
            async for sizes in _splits(head, checksum.parts, size):
                compared = True
                if await asyncio.to_thread(_digest, path, checksum, sizes) == checksum.digest:
                    return True
    except Exception as error:
        if is_transient(error):
            raise
        return None  # a store that does not answer such questions
    return False if compared else None


def _checksums(facts: Mapping[str, Any]) -> list[_Checksum]:
    found = []
    etag = _OF_PARTS.fullmatch(str(facts.get("ETag", "")).strip('"'))
    plain = facts.get("ServerSideEncryption") in (None, "AES256") and not facts.get("SSECustomerAlgorithm")
    if etag and plain and re.fullmatch("[0-9a-f]{32}", etag[1]):
        found.append(_Checksum(_md5, bytes.fromhex(etag[1]), int(etag[2])))
    for name, algorithm in (("SHA256", hashlib.sha256), ("SHA1", _sha1), ("CRC32", _Crc32)):
        if value := str(facts.get(f"Checksum{name}") or ""):
            parts = _OF_PARTS.fullmatch(value)
            digest = base64.b64decode(parts[1] if parts else value, validate=True)
            found.append(_Checksum(algorithm, digest, int(parts[2]) if parts else 0))
    return found


async def _splits(head: Callable[..., Any], parts: int, size: int) -> AsyncIterator[list[int]]:
    """The sizes that the parts of an object may have: all like the first but the last, or as the store says."""
    if not parts:
        yield [size]
        return
    first = (await head(PartNumber=1))["ContentLength"]
    alike = [*[first] * (parts - 1), size - first * (parts - 1)]
    if 0 < alike[-1] <= first:
        yield alike
    rest = await asyncio.gather(*(head(PartNumber=number) for number in range(2, parts + 1)))
    sizes = [first, *(facts["ContentLength"] for facts in rest)]
    if sizes != alike and sum(sizes) == size:  # a store without parts gives the size of the object for each
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
