"""Download files into a folder: concurrently, in bounded memory, with retries and verification.

A large file is fetched in pieces of ``PIECE`` bytes, each retried if its connection breaks. A file gets its name only
when it is complete and its checksum matches, so a later transfer can skip it.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from openmae.errors import DataError
from openmae.storage.checksums import content_matches
from openmae.storage.filesystem import ask, explain, is_transient, open_filesystem
from openmae.storage.listing import Answer, RemoteFile, reading
from openmae.storage.urls import redact

PIECE = 16 << 20  # bytes of a file per request
STREAMS = 16  # requests at once
STALL = 12.0  # seconds without data after which a request is retried
PATIENCE = 25.0  # seconds without data on any connection after which requests are not retried
_CHUNK = 1 << 20
_RETRIES = 8


class ChangedError(DataError):
    """A file was replaced by another version while it was read."""


class Transfer:
    """Copies files into a folder.

    Args:
        url: URL of the files.
        files: files to copy; those that are in the folder already are skipped.
        folder: destination; incomplete files have hidden names in it.
        arrived: called with the number of bytes received, or a negative number when bytes are discarded.
    """

    def __init__(self, url: str, files: Sequence[RemoteFile], folder: Path, arrived: Callable[[int], object]) -> None:
        self.url = url
        self.files = files
        self.folder = folder
        self.arrived = arrived
        self._filesystem = open_filesystem(url)
        self._streams = asyncio.Semaphore(STREAMS)
        self._last_arrival = time.monotonic()

    def run(self) -> None:
        """Copy all files.

        Raises:
            ChangedError: a file has changed since it was listed.
            DataError: requests were refused or kept failing, or a checksum does not match.
        """
        ask(self.url, self._copy_all(), limit=math.inf)

    async def _copy_all(self) -> None:
        waiting = iter(self.files)

        async def worker() -> None:
            for file in waiting:
                await self._copy(file)

        async with asyncio.TaskGroup() as group:
            for _ in range(STREAMS):
                group.create_task(worker())

    async def _copy(self, file: RemoteFile) -> None:
        target = self.folder / file.name
        if target.exists():
            self.arrived(target.stat().st_size)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{hashlib.sha256(file.name.encode()).hexdigest()[:16]}.part"
        for _ in range(2):
            temporary.write_bytes(b"")
            md5 = await self._copy_pieces(file, temporary)
            fault = await self._fault(file, temporary, md5)
            if not fault:
                os.replace(temporary, target)
                return
            self.arrived(-temporary.stat().st_size)
        temporary.unlink()
        raise DataError(
            f"{redact(self.url)}: {file.name} arrived damaged, twice: {fault}.",
            "Check the network and any proxy, or upload the file again.",
        )

    async def _copy_pieces(self, file: RemoteFile, path: Path) -> str:
        """Write the content of a file, and return the MD5 that the store reports for it, or ""."""
        spans: list[tuple[int, int | None]] = [(0, file.size)]
        if file.size and file.ranges:
            spans = [(start, min(start + PIECE, file.size)) for start in range(0, file.size, PIECE)]
        async with asyncio.TaskGroup() as group:
            pieces = [group.create_task(self._copy_piece(file, path, *span)) for span in spans]
        return next(filter(None, (piece.result() for piece in pieces)), file.md5)

    async def _copy_piece(self, file: RemoteFile, path: Path, start: int, stop: int | None) -> str:
        """Write bytes ``start`` to ``stop``, or to the end; return the MD5 of the complete file, or ""."""
        for attempt in itertools.count(1):
            done = start
            try:
                async with (
                    self._streams,
                    asyncio.timeout(STALL) as clock,
                    reading(self._filesystem, file, start, stop) as answer,
                ):
                    self._check(file, answer, start)
                    with path.open("r+b") as out:
                        out.seek(start)
                        while done != stop and (chunk := await answer.read(_CHUNK)):
                            chunk = chunk if stop is None else chunk[: stop - done]
                            out.write(chunk)
                            done += len(chunk)
                            self.arrived(len(chunk))
                            self._last_arrival = time.monotonic()
                            clock.reschedule(asyncio.get_running_loop().time() + STALL)
                        if stop is None:
                            out.truncate()  # an earlier attempt may have written more
                if stop in (None, done):
                    return answer.file.md5
                raise ConnectionResetError("the answer ended early")
            except Exception as error:
                self.arrived(start - done)
                silent = time.monotonic() - self._last_arrival
                if not is_transient(error) or attempt > _RETRIES or silent > PATIENCE:
                    raise explain(error, self.url) from error
                await asyncio.sleep(min(0.1 * 2**attempt, 5.0))
        raise AssertionError

    def _check(self, file: RemoteFile, answer: Answer, start: int) -> None:
        found = answer.file
        if found.version != file.version or (None not in (found.size, file.size) and found.size != file.size):
            raise ChangedError(
                f"{redact(self.url)}: {file.name} was changed while it was downloaded.",
                "Wait until it is no longer written, then run the command again.",
            )
        if start and not answer.partial:
            raise ConnectionResetError("the server sends the file from its beginning")

    async def _fault(self, file: RemoteFile, path: Path, md5: str) -> str:
        """Return what is wrong with a copy by the store's checksums, or ""; raise if the copy is a web page instead."""
        if md5:
            digest = await asyncio.to_thread(_md5_of, path)
            return "" if digest == md5 else f"its MD5 is {digest}, not {md5}"
        matches = None
        if "s3" in self._filesystem.protocol:
            bucket, key, _ = self._filesystem.split_path(file.path)
            matches = await content_matches(self._filesystem, bucket, key, path)
        if matches is None and _is_web_page(file, path):
            raise DataError(
                f"{redact(self.url)}: the server sent a web page ({path.stat().st_size:,} bytes) instead of "
                f"{file.name}.",
                "Open the address in a browser: it may ask for a login, or lead to a page about the file.",
            )
        return "it does not match the store's checksum" if matches is False else ""


def _is_web_page(file: RemoteFile, path: Path) -> bool:
    if file.name.lower().endswith((".html", ".htm", ".xhtml")):
        return False
    with path.open("rb") as content:
        start = content.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<body"))


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
