"""From a request's body to the images in it, within limits."""

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
from starlette.exceptions import HTTPException
from torch import Tensor

from openmae.data.decode import CorruptImage, NotAnImage, Picture, TooManyPixels
from openmae.data.formats import FORMAT_TITLES
from openmae.data.transforms import EvalTransform
from openmae.serving.settings import Settings

FIELDS = ("images", "file")
_MEND = "Send multipart/form-data with the field 'images' (curl -F images=@photo.jpg), or an image/* body."


class Refused(Exception):  # noqa: N818  (what it is, rather than what went wrong)
    """A request, or an image in it, that is not served.

    Args:
        status: of HTTP.
        problem: the rule that was broken and the value that broke it.
        fix: what to do about it.
    """

    def __init__(self, status: int, problem: str, fix: str) -> None:
        super().__init__(status, problem, fix)
        self.status = status
        self.text = f"{problem} {fix}"


@dataclass(frozen=True)
class Upload:
    """An image as it arrived: its name, or its number, and the encoded bytes."""

    name: str
    file: BinaryIO


class _Body:
    """The bytes of a request as they arrive, announced or not, counted against a limit."""

    def __init__(self, request: Request, limit: int) -> None:
        self._receive = request.receive
        self._limit = limit
        announced = request.headers.get("content-length", "")
        self._announced = int(announced) if announced.isdecimal() else 0
        self._seen = 0

    async def receive(self) -> Any:
        """The next message of ASGI. What a client sends after a refusal uvicorn reads and drops.

        Raises:
            Refused: 413, the body is longer than the limit.
        """
        if self._announced > self._limit:
            raise _too_large(self._limit, f"{self._announced:,} bytes")
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit:
            raise _too_large(self._limit, "more")
        return message


@asynccontextmanager
async def open_uploads(request: Request, settings: Settings) -> AsyncIterator[list[Upload]]:
    """The images of a request: the files of a form, or the body itself. They are closed at the end.

    Raises:
        Refused: 400 no image, 408 too slow, 413 too many bytes or images, 415 neither form nor image.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "multipart/form-data" and not kind.startswith("image/"):
        raise Refused(415, f"The content type must be multipart/form-data or image/*, got {kind or 'none'!r}.", _MEND)
    request = Request(request.scope, _Body(request, settings.max_bytes).receive)
    try:
        async with asyncio.timeout(settings.read_seconds):
            if kind.startswith("image/"):
                uploads = _read_body(await request.body())
            else:
                uploads = await _read_form(request, settings.max_images)
    except TimeoutError as error:
        raise Refused(
            408, f"The body must arrive within {settings.read_seconds:g} seconds.", "Send fewer or smaller images."
        ) from error
    try:
        yield uploads
    finally:
        await request.close()


def _read_body(body: bytes) -> list[Upload]:
    if not body:
        raise Refused(400, "The request holds no image: its body has 0 bytes.", _MEND)
    return [Upload("image", io.BytesIO(body))]


async def _read_form(request: Request, max_images: int) -> list[Upload]:
    try:
        form = await request.form(max_files=max_images + 1, max_fields=max_images + 1)
    except HTTPException as error:
        if "Too many" in error.detail:
            raise _too_many(max_images) from error
        raise Refused(400, f"The form cannot be read: {error.detail.rstrip('.')}.", _MEND) from error
    files = [part for field, part in form.multi_items() if field in FIELDS and isinstance(part, UploadFile)]
    if not files:
        found = ", ".join(sorted(form)[:5]) or "nothing"
        raise Refused(400, f"The form has no file in the field 'images'; found: {found}.", _MEND)
    if len(files) > max_images:
        raise _too_many(max_images)
    return [Upload(part.filename or f"image {n}", part.file) for n, part in enumerate(files, start=1)]


def _too_many(max_images: int) -> Refused:
    return Refused(413, f"A request may hold {max_images} images at most.", "Send them in several requests.")


def _too_large(limit: int, got: str) -> Refused:
    return Refused(
        413,
        f"The request's body may have {limit:,} bytes at most, got {got}.",
        "Send fewer or smaller images, or start the server with a larger --max-request-mb.",
    )


def decode_upload(upload: Upload, transform: EvalTransform, max_pixels: int) -> Tensor:
    """``[C, H, W]`` as evaluation sees it; see :class:`EvalTransform`.

    Raises:
        Refused: 413 too many pixels, decided by the header; 422 no image that can be decoded.
    """
    try:
        upload.file.seek(0)
        with Picture(Path(upload.name), upload.file, max_pixels) as picture:
            return transform(picture)
    except TooManyPixels as error:
        raise Refused(
            413,
            f"An image may have {max_pixels:,} pixels at most; {upload.name} has {error.got}.",
            "Scale it down, or start the server with a larger --max-pixels.",
        ) from error
    except NotAnImage as error:
        raise Refused(422, f"{upload.name}: {error.reason}.", "Send an image that opens in a viewer.") from error
    except CorruptImage as error:
        raise Refused(
            422,
            f"{upload.name} cannot be decoded: {error.reason}.",
            f"Save it again as {', '.join(FORMAT_TITLES[:-1])} or {FORMAT_TITLES[-1]}.",
        ) from error
