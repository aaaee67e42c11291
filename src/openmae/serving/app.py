"""The HTTP interface of a model: predictions, health, metadata, and a page to try it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from openmae._version import __version__
from openmae.engines.batching import eval_transform
from openmae.engines.predictor import Predictor
from openmae.serving.access_log import log_loop_error
from openmae.serving.fairness import Decoders
from openmae.serving.micro_batching import Batcher
from openmae.serving.settings import Settings
from openmae.serving.uploads import Busy, Intake, Refused, Upload, count_pixels, decode_upload, open_uploads

Entry = tuple[int, dict[str, Any]]  # status and response of one image

TOP = 5  # classes in a response


class Share(BaseModel):
    """A class and its probability."""

    class_: str = Field(alias="class")
    probability: float


class Prediction(BaseModel):
    """One image: class, probability and top of a classifier, the embedding of a pretrained model, or an error."""

    name: str
    class_: str | None = Field(None, alias="class")
    probability: float | None = None
    top: list[Share] | None = Field(None, description=f"The {TOP} most likely classes, best first.")
    embedding: list[float] | None = None
    error: str | None = None


class PredictResponse(BaseModel):
    """The predictions for all images of a request, in order."""

    model: str
    predictions: list[Prediction]


class Failure(BaseModel):
    """The rule that was broken, the value that broke it, and the fix."""

    error: str


class NoneUsable(PredictResponse):
    """A response in which every image has an error."""

    error: str


def create_app(predictor: Predictor, settings: Settings | None = None) -> FastAPI:
    """Return an application that serves a model: ``/predict``, ``/health``, ``/metadata``, ``/openapi.json`` and ``/``.

    Every error is JSON: ``{"error": "rule, value and fix"}``.

    Args:
        predictor: The model; called from a single thread, and not closed.
        settings: The limits; None uses the defaults of :class:`Settings`.
    """
    service = _Service(predictor, settings or Settings())
    app = FastAPI(
        title="OpenMAE",
        version=__version__,
        docs_url=None,  # FastAPI's own pages load scripts from other hosts
        redoc_url=None,
        lifespan=service.lifespan,
    )
    _add_routes(app, service)
    _add_errors(app)
    return app


class _Service:
    """The model, its threads, and the requests in progress.

    Attributes:
        images: Number of images that have been admitted and are not answered yet.
    """

    def __init__(self, predictor: Predictor, settings: Settings) -> None:
        card = predictor.card
        self.card, self.runtime, self.settings = card, predictor.runtime, settings
        self._output = card.outputs[0]
        self._predictor = predictor
        self._transform = eval_transform(card)
        self._batcher = Batcher(self._run, settings.max_batch)
        self._decoders = Decoders(min(4, os.cpu_count() or 1), settings.max_pixels)
        self._headers = ThreadPoolExecutor(2, "openmae-headers")
        self._intake = Intake(settings.max_held_bytes)
        self._requests = self.images = 0
        self._ready = False

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(log_loop_error)
        self._ready = True
        try:
            yield
        finally:
            self._ready = False
            await self._batcher.close()
            self._decoders.shutdown()
            self._headers.shutdown()

    @property
    def status(self) -> str:
        """``ok``, ``failing`` (the latest batch failed) or ``stopped``."""
        if not self._ready:
            return "stopped"
        return "failing" if self._batcher.failing else "ok"

    async def predict(self, request: Request) -> list[Entry]:
        """Return the status and the prediction or error of each image in the request."""
        if not self._ready:
            raise Refused(503, "The server is stopping.", "Try another server, or try again later.")
        async with open_uploads(request, self.settings, self._intake) as uploads:
            if self._requests >= self.settings.max_requests:
                raise Busy("its queue is full")
            sizes = await asyncio.get_running_loop().run_in_executor(
                self._headers, lambda: [count_pixels(upload, self.settings.max_pixels) for upload in uploads]
            )
            with self._admit(sum(sizes), len(uploads)):
                return await self._answers(uploads, sizes)

    @contextmanager
    def _admit(self, pixels: int, images: int) -> Iterator[None]:
        """Reserve capacity for a request and its images. A quarter of the capacity is reserved for small requests."""
        limits = self.settings
        if pixels > limits.max_request_pixels:
            raise Refused(
                413,
                f"The images of a request may have {limits.max_request_pixels:,} pixels together, got {pixels:,}.",
                "Send them in several requests, or scale them down.",
            )
        share = 0.75 if images > limits.max_batch or pixels > limits.max_pixels else 1
        too_many_images = self.images and self.images + images > share * limits.max_waiting
        if too_many_images or self._requests >= max(1, share * limits.max_requests):
            raise Busy("its queue is full")
        self._requests += 1
        self.images += images
        try:
            yield
        finally:
            self._requests -= 1
            self.images -= images

    async def _answers(self, uploads: list[Upload], sizes: list[int]) -> list[Entry]:
        works = [partial(decode_upload, upload, self._transform, self.settings.max_pixels) for upload in uploads]
        images = await self._decoders(works, sizes)
        rows = iter(await self._batcher([image for image in images if isinstance(image, Tensor)]))
        return [
            _refuse(upload.name, image) if isinstance(image, Refused) else self._describe(upload.name, next(rows))
            for upload, image in zip(uploads, images, strict=True)
        ]

    def _run(self, images_BCHW: Tensor) -> Tensor:
        outputs = self._predictor(images_BCHW.to(self._predictor.device))
        return outputs[self._output].float().cpu()

    def _describe(self, name: str, row: Tensor) -> Entry:
        if not bool(row.isfinite().all()):
            problem = f"The model's output for {name} is not finite."
            return _refuse(name, Refused(500, problem, "Export the model in a higher precision."))
        if self.card.stage == "pretrain":
            return 200, {"name": name, "embedding": row.tolist()}
        best = row.log_softmax(0).sort(descending=True, stable=True)  # the same ranking as in inference
        labels, shares = best.indices[:TOP].tolist(), best.values[:TOP].exp().tolist()
        names = self.card.class_names
        top = [{"class": names[label], "probability": share} for label, share in zip(labels, shares, strict=True)]
        return 200, {"name": name, **top[0], "top": top}


def _refuse(name: str, reason: Refused) -> Entry:
    return reason.status, {"name": name, "error": reason.text}


def _add_routes(app: FastAPI, service: _Service) -> None:
    page = (files("openmae.serving") / "page.html").read_text(encoding="utf-8")
    policy = _content_policy(page)
    arch = service.card.model.arch
    binary = {"schema": {"type": "string", "format": "binary"}}
    images = {"type": "array", "items": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "properties": {"images": images}, "required": ["images"]}}
    errors: dict[int | str, dict[str, Any]] = {code: {"model": Failure} for code in (400, 408, 413, 415, 500, 503)}
    errors[422] = {"model": NoneUsable}

    @app.post(
        "/predict",
        response_model=PredictResponse,
        responses=errors,
        openapi_extra={"requestBody": {"content": {"multipart/form-data": form, "image/*": binary}, "required": True}},
    )
    async def predict(request: Request) -> JSONResponse:
        """Classify or embed the images of a form (field `images`, any number of files) or the image in the body.

        The status is 200 if at least one image could be used; the others have an `error`. If none could be used, it is
        that of the first image: 422 not decodable, 413 too many pixels.
        """
        entries = await service.predict(request)
        response = {"model": arch, "predictions": [entry for _, entry in entries]}
        if any(status == 200 for status, _ in entries):
            return JSONResponse(response)
        status, first = entries[0]
        prefix = f"None of the {len(entries)} images could be used; the first: " if len(entries) > 1 else ""
        return JSONResponse({"error": prefix + first["error"], **response}, status)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: {"description": "The latest batch failed, or the server is stopping."}})
    async def health() -> JSONResponse:
        """Return 200 and `ok`, or 503 and `failing` (the latest batch raised an error) or `stopped`."""
        health = {"status": service.status, "model": arch, "images_under_way": service.images}
        return JSONResponse(health, 200 if service.status == "ok" else 503)

    @app.get("/metadata")
    async def metadata() -> dict[str, Any]:
        """Describe the model, its runtime, and the limits of a request."""
        return {
            "card": service.card.to_dict(),
            "runtime": service.runtime,
            "limits": {**asdict(service.settings), "max_request_pixels": service.settings.max_request_pixels},
            "version": __version__,
        }

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        headers = {"Connection": "close"} if error.status == 408 else None  # the rest of the body may still arrive
        return _failure(error.status, error.text, headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return _failure(400, "The client disconnected before its images had arrived.")

    @app.exception_handler(StarletteHTTPException)
    async def other(request: Request, error: StarletteHTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail}. GET /openapi.json lists all paths."
        return _failure(error.status_code, text, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return _failure(500, f"The server failed ({type(error).__name__}). Its log has the traceback.")


def _failure(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": text}, status, headers or ({"Retry-After": "1"} if status == 503 else None))


def _content_policy(page: str) -> str:
    """Return a Content-Security-Policy for the page's inline script and style, and requests to its server."""
    hashes = {}
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
