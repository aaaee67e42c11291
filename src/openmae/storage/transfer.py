"""Files of a store into a folder: several parts at once, in bounded memory, gone on with after a cut, and checked."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fsspec.asyn import AsyncFileSystem

from openmae.errors import DataError
from openmae.storage.checksums import content_matches
from openmae.storage.filesystem import ask, explain, is_transient, open_filesystem
from openmae.storage.listing import Answer, RemoteFile, reading
from openmae.storage.urls import redact

PIECE = 16 << 20  # bytes of a file that are asked for at once
STREAMS = 8
SMALL_STREAMS = 32
STALL = 12.0  # seconds without a byte after which a connection is given up,
PATIENCE = 25.0  # and, if none came by any other either, all is
_CHUNK = 1 << 20
_SECOND_TRIES = 8


class ChangedError(DataError):
    """A file got another version while it was read."""


class _RestartError(ConnectionError):
    """The server gives no parts of a file, so it has to begin anew."""


class Transfer:
    """Copies files into a folder, under their names once they are whole.

    Args:
        url: that they are of, for messages.
        files: to be copied; those that are in the folder already are skipped.
        folder: holds besides, under names with a dot in front, what is under way: a later transfer goes on from that.
        arrived: called with the number of bytes that came (or, where a file has to begin anew, fell away).
    """

    def __init__(self, url: str, files: Sequence[RemoteFile], folder: Path, arrived: Callable[[int], None]) -> None:
        self.url = url
        self.files = files
        self.folder = folder
        self.arrived = arrived
        self._filesystem: AsyncFileSystem
        self._alive = 0.0  # when the last bytes came
        self._width, self._most = 1, SMALL_STREAMS  # requests at once, and what they may become
        self._turns: asyncio.Semaphore

    def run(self, watch: Callable[[], None] | None = None) -> None:
        """Copy all.

        Args:
            watch: called several times a second by this thread.

        Raises:
            ChangedError: another version came up.
            DataError: the store failed for longer than ``PATIENCE`` seconds, or gave what does not match its checksum.
        """
        self._filesystem = open_filesystem(self.url)
        self._alive = time.monotonic()
        ask(self.url, self._run(), limit=math.inf, watch=watch)

    async def _run(self) -> None:
        small, large = [], []
        for file in self.files:
            target = self.folder / file.name
            if target.exists():
                self.arrived(target.stat().st_size)
            elif file.size is None or file.size <= PIECE or not file.ranges:
                small.append(file)
            else:
                large.append(file)
        try:
            await self._each(small, SMALL_STREAMS, self._copy_whole)
            for file in large:
                await self._copy_pieces(file)
        except BaseExceptionGroup as errors:
            raise _first(errors) from None

    async def _each(self, items: Iterable, streams: int, work: Callable) -> None:
        """``work`` on every item, on so many at a time; the first error ends all."""
        waiting = iter(items)
        self._width = min(streams, self._width)
        self._turns = asyncio.Semaphore(self._width)

        async def stream() -> None:
            for item in waiting:
                await work(item)

        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(stream())

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[Callable[[], None]]:
        """One of the requests under way; gives what is to be called when its answer begins.

        They become more with every quick answer, and fewer where the store cannot answer so many in time: what it
        cannot answer it may work on all the same, and a flood of second tries would be the end of it.
        """
        await self._turns.acquire()
        began, given_up = time.monotonic(), False

        def answered() -> None:
            if self._width < self._most and time.monotonic() - began < STALL / 4:
                self._width += 1
                self._turns.release()

        try:
            yield answered
        except TimeoutError:
            self._most = max(1, self._width // 2)
            given_up = self._width > 1
            self._width -= given_up
            raise
        finally:
            if not given_up:
                self._turns.release()

    async def _copy_whole(self, file: RemoteFile) -> None:
        for last in (False, True):
            target, temporary = self._places(file)
            temporary.touch()
            found, digest = await self._copy_span(file, temporary, 0, file.size)
            if await self._accept(file, found, digest, temporary, target, last=last):
                return

    async def _copy_pieces(self, file: RemoteFile) -> None:
        assert file.size is not None
        for last in (False, True):
            target, temporary = self._places(file)
            journal = temporary.with_suffix(".pieces")
            done = _read_journal(journal) if temporary.exists() else set()
            starts = range(0, file.size, PIECE)
            self.arrived(sum(min(PIECE, file.size - start) for start in starts if start in done))
            temporary.touch()
            os.truncate(temporary, file.size)
            md5 = file.md5

            async def piece(start: int, place: Path = temporary, log: Path = journal) -> None:
                nonlocal md5
                md5 = (await self._copy_span(file, place, start, min(start + PIECE, file.size or 0)))[0] or md5
                with log.open("a", encoding="utf-8") as lines:
                    lines.write(f"{start}\n")

            await self._each([start for start in starts if start not in done], STREAMS, piece)
            digest = await asyncio.to_thread(_md5_of, temporary) if md5 else ""
            journal.unlink(missing_ok=True)
            if await self._accept(file, md5, digest, temporary, target, last=last):
                return

    def _places(self, file: RemoteFile) -> tuple[Path, Path]:
        target = self.folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target, self.folder / f".{hashlib.sha256(file.name.encode()).hexdigest()[:16]}.part"

    async def _accept(
        self, file: RemoteFile, md5: str, digest: str, temporary: Path, target: Path, *, last: bool
    ) -> bool:
        """Give a file its name if it is what the store has; False: once more."""
        good: bool | None = digest == md5 if md5 else await self._matches(file, temporary)
        if good is False:
            self.arrived(-temporary.stat().st_size)
            temporary.unlink()
            if last:
                why = f"its MD5 is {digest}, not {md5}" if md5 else "it is not what the store's checksum says"
                raise DataError(
                    f"{redact(self.url)}: {file.name} arrived damaged, twice: {why}.",
                    "Check the network and any proxy, or upload the file again.",
                )
            return False
        if good is None and _is_web_page(file, temporary):
            raise DataError(
                f"{redact(self.url)}: the server sent a web page ({temporary.stat().st_size:,} bytes) instead of "
                f"{file.name}.",
                "Open the address in a browser: it may ask for a login, or lead to a page about the file.",
            )
        os.replace(temporary, target)
        return True

    async def _matches(self, file: RemoteFile, path: Path) -> bool | None:
        """Whether a file is what the store's other checksums say; None where it has none."""
        if "s3" not in self._filesystem.protocol:
            return None
        bucket, key, _ = self._filesystem.split_path(file.path)
        return await content_matches(self._filesystem, bucket, key, path)

    async def _copy_span(self, file: RemoteFile, place: Path, start: int, stop: int | None) -> tuple[str, str]:
        """Write bytes ``start`` to ``stop``, trying again where they were cut off.

        Returns the MD5 that the store gives for the file, and, of a span from the file's beginning, that of what came.
        """
        done, tries, md5 = start, 0, file.md5
        digest = hashlib.md5(usedforsecurity=False)
        with place.open("r+b") as out:
            while True:
                try:
                    async with (
                        self._turn() as answered,
                        asyncio.timeout(STALL) as clock,
                        reading(self._filesystem, file, done, stop) as answer,
                    ):
                        answered()
                        self._check(file, answer)
                        if done and not answer.partial:
                            raise _RestartError
                        md5 = answer.md5 or md5
                        out.seek(done)
                        while chunk := await answer.read(_CHUNK if stop is None else max(1, min(_CHUNK, stop - done))):
                            chunk = chunk if stop is None else chunk[: stop - done]
                            out.write(chunk)
                            digest.update(chunk)
                            done += len(chunk)
                            self.arrived(len(chunk))
                            tries, self._alive = 0, time.monotonic()
                            clock.reschedule(asyncio.get_running_loop().time() + STALL)
                            if done == stop:
                                break
                    if stop is None or done >= stop:
                        if start == 0 and stop in (None, file.size):
                            out.truncate()  # something longer may have been left here
                        return md5, digest.hexdigest()
                    raise ConnectionResetError("the answer ended early")
                except Exception as error:
                    tries += 1
                    silent = time.monotonic() - self._alive
                    if not is_transient(error) or tries > _SECOND_TRIES or silent > PATIENCE:
                        raise explain(error, self.url) from error
                    if not file.ranges or isinstance(error, _RestartError):
                        self.arrived(start - done)
                        done, digest = start, hashlib.md5(usedforsecurity=False)
                    await asyncio.sleep(min(0.1 * 2**tries, 5.0))

    def _check(self, file: RemoteFile, answer: Answer) -> None:
        resized = None not in (answer.size, file.size) and answer.size != file.size
        if answer.version != file.version or resized:
            raise ChangedError(
                f"{redact(self.url)}: {file.name} was changed while it was downloaded.",
                "Wait until it is no longer written, then run the command again.",
            )


def _is_web_page(file: RemoteFile, path: Path) -> bool:
    if file.name.lower().endswith((".html", ".htm", ".xhtml")):
        return False
    with path.open("rb") as content:
        start = content.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<body"))


def _first(errors: BaseExceptionGroup) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _read_journal(path: Path) -> set[int]:
    """Where the pieces begin that are there; a line that was not finished does not count."""
    with suppress(FileNotFoundError):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return {int(line) for line in lines if line.isdecimal()}
    return set()


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
