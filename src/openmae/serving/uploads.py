"""Read the images of a request from its body, within limits."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from torch import Tensor

from openmae.data.decode import CorruptImage, ImageFile, NotAnImage, TooManyPixels, read_header
from openmae.data.formats import FORMAT_TITLES
from openmae.data.transforms import EvalTransform
from openmae.serving.settings import Settings

FIELDS = ("images", "file")
_USAGE = "Send multipart/form-data with the field 'images' (curl -F images=@photo.jpg), or an image/* body."


class Refused(Exception):  # noqa: N818  (a state rather than an error)
    """A request, or an image in it, is refused.

    Args:
        status: HTTP status.
        problem: The rule and the value that violates it.
        fix: How to fix the request.
    """

    def __init__(self, status: int, problem: str, fix: str) -> None:
        super().__init__(status, problem, fix)
        self.status = status
        self.text = f"{problem} {fix}"


class Busy(Refused):
    """The server has no capacity for a request at the moment (503)."""

    def __init__(self, reason: str) -> None:
        super().__init__(503, f"The server is busy: {reason}.", "Try again in a second.")


@dataclass(frozen=True)
class Upload:
    """An encoded image, with its file name or a name such as ``image 2``."""

    name: str
    file: BinaryIO


class Intake:
    """Limits the size in bytes of the bodies of all requests together.

    If the limit is exceeded, the largest incomplete body is refused. So clients that never finish their requests cannot
    block the server.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bodies: set[_Body] = set()

    def add(self, body: _Body) -> None:
        """Count the bytes of a body so far; refuse the largest incomplete one (503) if the limit is exceeded."""
        self._bodies.add(body)
        while sum(one.size for one in self._bodies) > self._limit:
            incomplete = [one for one in self._bodies if one.timer is not None]
            largest = max(incomplete, key=lambda one: one.size, default=body)
            if largest is body:
                raise _out_of_memory()
            self.remove(largest)
            largest.give_way()

    def remove(self, body: _Body) -> None:
        """Stop counting a body that has been answered or refused."""
        self._bodies.discard(body)


class _Body:
    """The body of a request while it arrives, with or without a content length.

    Attributes:
        size: The number of bytes that have arrived.
        timer: The time limit for its arrival; None once it is complete.
        gave_way: True if it was refused to make room for others.
    """

    def __init__(self, request: Request, limit: int, intake: Intake) -> None:
        self._receive = request.receive
        self._limit = limit
        self._intake = intake
        length = request.headers.get("content-length", "")
        self._length = int(length) if length.isdecimal() else 0
        self.size = 0
        self.timer: asyncio.Timeout | None = None
        self.gave_way = False

    async def receive(self) -> Any:
        """Return the next ASGI message. After a refusal, uvicorn reads and drops the rest of the body.

        Raises:
            Refused: With status 413 if the body exceeds its limit, or 503 if all bodies together exceed theirs.
        """
        if self._length > self._limit:
            raise self._too_large(f"{self._length:,} bytes")
        message = await self._receive()
        self.size += len(message.get("body", b""))
        if self.size > self._limit:
            raise self._too_large("more")
        self._intake.add(self)
        return message

    def give_way(self) -> None:
        """Stop waiting for the rest of the body."""
        self.gave_way = True
        if self.timer is not None:
            self.timer.reschedule(asyncio.get_running_loop().time())

    def _too_large(self, got: str) -> Refused:
        return Refused(
            413,
            f"The request's body may have {self._limit:,} bytes at most, got {got}.",
            "Send fewer or smaller images, or start the server with a larger --max-request-mb.",
        )


@asynccontextmanager
async def open_uploads(request: Request, settings: Settings, intake: Intake) -> AsyncIterator[list[Upload]]:
    """Yield the images of a request (the files of a form, or the body itself), and close them at the end of the block.

    The body of the request must not have been read yet.

    Raises:
        Refused: 400 no image, 408 too slow, 413 too many bytes or images, 415 neither form nor image, 503 no room.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "multipart/form-data" and not kind.startswith("image/"):
        raise Refused(415, f"The content type must be multipart/form-data or image/*, got {kind or 'none'!r}.", _USAGE)
    body = _Body(request, settings.max_bytes, intake)
    request = Request(request.scope, body.receive)
    uploads: list[Upload] = []
    try:
        try:
            async with asyncio.timeout(settings.read_seconds) as body.timer:
                if kind.startswith("image/"):
                    uploads = _read_body(await request.body())
                else:
                    uploads = await _read_form(request, settings.max_images)
        except TimeoutError as error:
            if body.gave_way:
                raise _out_of_memory() from error
            raise Refused(
                408, f"The body must arrive within {settings.read_seconds:g} seconds.", "Send fewer or smaller images."
            ) from error
        finally:
            body.timer = None
        yield uploads
    finally:
        for upload in uploads:
            upload.file.close()
        intake.remove(body)


def _read_body(body: bytes) -> list[Upload]:
    if not body:
        raise Refused(400, "The request has no image: its body has 0 bytes.", _USAGE)
    return [Upload("image", io.BytesIO(body))]


class _FormParser(MultiPartParser):
    """A parser that keeps files in memory, which ``Intake`` limits; on disk, each file would need a descriptor."""

    spool_max_size = max_file_size = 1 << 40


async def _read_form(request: Request, max_images: int) -> list[Upload]:
    parser = _FormParser(request.headers, request.stream(), max_files=max_images + 1, max_fields=max_images + 1)
    too_many = Refused(413, f"A request may have {max_images} images at most.", "Send them in several requests.")
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many" in error.message:
            raise too_many from error
        raise Refused(400, f"The form cannot be read: {error.message.rstrip('.')}.", _USAGE) from error
    files = [part for field, part in form.multi_items() if field in FIELDS and isinstance(part, UploadFile)]
    if not files:
        found = ", ".join(sorted(form)[:5]) or "nothing"
        raise Refused(400, f"The form has no file in the field 'images'; found: {found}.", _USAGE)
    if len(files) > max_images:
        raise too_many
    return [Upload(part.filename or f"image {n}", part.file) for n, part in enumerate(files, start=1)]


def _out_of_memory() -> Busy:
    return Busy("the requests in progress use all memory allowed for uploads")


def count_pixels(upload: Upload, max_pixels: int) -> int:
    """Return the number of pixels according to the image's header, or 0 if ``decode_upload`` will refuse the image."""
    try:
        header = read_header(Path(upload.name), upload.file, max_pixels)
    except Exception:  # too many pixels, or any error that a decoder raises for a damaged file
        return 0
    return header.width * header.height


def decode_upload(upload: Upload, transform: EvalTransform, max_pixels: int) -> Tensor | Refused:
    """Return an image ``[C, H, W]``, transformed as in evaluation, or why it is refused.

    The status is 413 if it has too many pixels, and 422 if it cannot be decoded.
    """
    try:
        with ImageFile(Path(upload.name), upload.file, max_pixels) as file:
            return transform(file)
    except TooManyPixels as error:
        problem = f"An image may have {error.max_pixels:,} pixels at most; {upload.name} has {error.got}."
        return Refused(413, problem, "Scale it down, or start the server with a larger --max-pixels.")
    except NotAnImage as error:
        return Refused(422, f"{upload.name}: {error.reason}.", "Send an image that opens in a viewer.")
    except CorruptImage as error:
        formats = f"{', '.join(FORMAT_TITLES[:-1])} or {FORMAT_TITLES[-1]}"
        return Refused(422, f"{upload.name} cannot be decoded: {error.reason}.", f"Save it again as {formats}.")
