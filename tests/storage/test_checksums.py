"""Checksums of objects as Amazon S3 gives them; other stores may give some or none."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import zlib
from typing import Any

import pytest

from openmae.storage.checksums import content_matches

CONTENT = os.urandom(2500)
SIZES = [1000, 1000, 500]
PARTS = [CONTENT[:1000], CONTENT[1000:2000], CONTENT[2000:]]


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def crc32(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "big")


def of_parts(digest: Any) -> str:
    return base64.b64encode(digest(b"".join(map(digest, PARTS)))).decode() + "-3"


class Store:
    """A store that answers HEAD requests about one object."""

    def __init__(self, facts: dict[str, Any], sizes: list[int] | None) -> None:
        self.facts, self.sizes = facts, sizes

    async def _call_s3(self, name: str, **arguments: Any) -> dict[str, Any]:
        assert (name, arguments["ChecksumMode"]) == ("head_object", "ENABLED")
        part = arguments.get("PartNumber")
        size = len(CONTENT) if part is None or self.sizes is None else self.sizes[part - 1]
        return {"ContentLength": size, **self.facts}


KMS = {"ETag": f'"{"0" * 32}"', "ServerSideEncryption": "aws:kms"}


@pytest.mark.parametrize(
    ("facts", "sizes", "known"),
    [
        ({**KMS, "ChecksumSHA256": base64.b64encode(sha256(CONTENT)).decode()}, None, True),
        ({**KMS, "ChecksumCRC32": base64.b64encode(crc32(CONTENT)).decode()}, None, True),
        ({**KMS, "ChecksumSHA256": of_parts(sha256)}, SIZES, True),
        ({**KMS, "ChecksumCRC32": of_parts(crc32)}, SIZES, True),
        ({**KMS, "ChecksumCRC32": of_parts(crc32)}, None, False),  # a store that ignores part numbers
        ({**KMS, "ChecksumCRC64NVME": "AAAAAAAAAAA="}, None, False),
        (KMS, None, False),
        ({"ETag": f'"{"0" * 32}-3"'}, None, False),
        ({"ETag": '"not of this kind"'}, None, False),
        ({**KMS, "ChecksumSHA256": "no base64"}, None, False),
    ],
)
def test_checksums_of_a_store_are_compared(tmp_path, facts, sizes, known):
    path = tmp_path / "m.bin"
    path.write_bytes(CONTENT)
    store = Store(facts, sizes)
    assert asyncio.run(content_matches(store, "bucket", "key", path)) is (True if known else None)
    path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    assert asyncio.run(content_matches(store, "bucket", "key", path)) is (False if known else None)


def test_a_store_that_refuses_the_request_gives_no_checksum(tmp_path):
    class Refusing(Store):
        async def _call_s3(self, name: str, **arguments: Any) -> dict[str, Any]:
            raise PermissionError("Forbidden")

    path = tmp_path / "m.bin"
    path.write_bytes(CONTENT)
    assert asyncio.run(content_matches(Refusing({}, None), "bucket", "key", path)) is None
