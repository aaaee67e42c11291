"""Dynamic batching: images of many requests share a run of the model, and a lone one waits for nobody."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from openmae.serving.fairness import Clock, FairQueue

log = logging.getLogger("openmae")

Model = Callable[[Tensor], Tensor]


class Full(Exception):  # noqa: N818  (what it is, rather than what went wrong)
    """So many images wait that no more are admitted."""


class BatchFailed(Exception):  # noqa: N818
    """The model raised an error; the text says of which kind."""


class Batcher:
    """Runs a model on one image at a time while it is idle, and on all that arrived meanwhile when it was busy.

    There is no delay to set: gathering lasts as long as the batch before takes. Requests take turns, so that one with
    few images does not wait for all of one with many. Everything but the model itself happens on the event loop; the
    model runs in one thread of its own.

    Args:
        model: ``[N, C, H, W]`` to ``[N, ...]``, both on the CPU.
        max_batch: the largest N.
        capacity: images that may be on their way at once.

    Attributes:
        failure: of the latest batch; empty where it went well.
        held: places taken of ``capacity``.
    """

    def __init__(self, model: Model, max_batch: int, capacity: int) -> None:
        self.failure = ""
        self.held = 0
        self._model = model
        self._max_batch = max_batch
        self._capacity = capacity
        self._clock = Clock()
        self._waiting: FairQueue[tuple[Tensor, asyncio.Future[Tensor]]] = FairQueue(self._clock)
        self._running: asyncio.Task[None] | None = None
        self._worker = ThreadPoolExecutor(1, "openmae-model")

    @contextmanager
    def room(self, images: int) -> Iterator[None]:
        """Hold places for as many images, from before they are decoded until they are answered.

        Raises:
            Full: there are not as many.
        """
        if self.held + images > self._capacity:
            raise Full
        self.held += images
        try:
            yield
        finally:
            self.held -= images

    async def __call__(self, images: Sequence[Tensor]) -> list[Tensor]:
        """The model's output for each image.

        Args:
            images: ``[C, H, W]`` each, of one size; uint8 or float32 on the same scale.

        Raises:
            BatchFailed: the model failed on a batch that one of them was in.
        """
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Tensor]] = [loop.create_future() for _ in images]
        for image, future, due in zip(images, futures, self._clock.dues(1 for _ in images), strict=True):
            self._waiting.add((image, future), due)
        self._start()
        return await asyncio.gather(*futures)  # a caller that is cancelled cancels them, and they are passed over

    async def close(self) -> None:
        """Finish what waits, then end the thread."""
        while self._running is not None:
            await self._running
        self._worker.shutdown()

    def _start(self) -> None:
        """Begin the next batch, unless one is running; its end calls this again."""
        if self._running is not None:
            return
        batch: list[tuple[Tensor, asyncio.Future[Tensor]]] = []
        while self._waiting and len(batch) < self._max_batch:
            image, future = self._waiting.take()
            if not future.done():
                batch.append((image, future))
        if batch:
            self._running = asyncio.create_task(self._run(batch))

    async def _run(self, batch: list[tuple[Tensor, asyncio.Future[Tensor]]]) -> None:
        images = [image for image, _ in batch]
        try:
            rows = await asyncio.get_running_loop().run_in_executor(self._worker, self._work, images)
        except Exception as error:  # a runtime may raise anything, and the next batch may be sound
            self.failure = type(error).__name__
            log.exception("The model failed on a batch of %d images.", len(batch))
            for _, future in batch:
                if not future.done():
                    future.set_exception(BatchFailed(self.failure))
        else:
            self.failure = ""
            for (_, future), row in zip(batch, rows, strict=True):
                if not future.done():
                    future.set_result(row)
        finally:
            self._running = None
            self._start()

    def _work(self, images: list[Tensor]) -> list[Tensor]:
        if len({image.dtype for image in images}) > 1:  # a 16-bit file among 8-bit ones
            images = [image.float() for image in images]
        rows = list(self._model(torch.stack(images)))
        if len(rows) != len(images):
            raise RuntimeError(f"{len(images)} images went in and {len(rows)} outputs came back")
        return rows
