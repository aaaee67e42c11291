"""Dynamic batching: images of several requests share a run of the model, without a configured delay."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from openmae.serving.fairness import FairQueue
from openmae.serving.uploads import Refused

log = logging.getLogger("openmae")


class BatchFailed(Refused):
    """The model raised an error, whose type is shown (500)."""

    def __init__(self, kind: str) -> None:
        super().__init__(500, f"The model failed on the images ({kind}).", "The server's log has the traceback.")


class Batcher:
    """Runs a model on batches of images from several requests.

    If the model is idle, images run at once. Images that arrive while it is busy form the next batch. Requests share
    the model fairly. Only the model runs in a thread; everything else happens on the event loop.

    Args:
        model: Maps ``[N, C, H, W]`` to ``[N, ...]``, both on the CPU.
        max_batch: Maximum of N.

    Attributes:
        failing: True if the latest batch failed.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], max_batch: int) -> None:
        self.failing = False
        self._model = model
        self._max_batch = max_batch
        self._waiting: FairQueue[tuple[Tensor, asyncio.Future[Tensor]]] = FairQueue()
        self._running: asyncio.Task[None] | None = None
        self._worker = ThreadPoolExecutor(1, "openmae-model")

    async def __call__(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Return the model's output for each image ``[C, H, W]``, uint8 or float32 in 0..255.

        Raises:
            BatchFailed: The model failed on a batch that contains one of the images.
        """
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Tensor]] = [loop.create_future() for _ in images]
        self._waiting.add(list(zip(images, futures, strict=True)), (1 for _ in images))
        self._start()
        return await asyncio.gather(*futures)  # canceled with the caller; _start skips canceled images

    async def close(self) -> None:
        """Wait until all images are finished, and end the thread."""
        while self._running is not None:
            await self._running
        self._worker.shutdown()

    def _start(self) -> None:
        """Start the next batch, unless one is running; at its end, this is called again."""
        if self._running is not None:
            return
        batch: list[tuple[Tensor, asyncio.Future[Tensor]]] = []
        while len(batch) < self._max_batch and (item := self._waiting.take()) is not None:
            if not item[1].done():
                batch.append(item)
        if batch:
            self._running = asyncio.create_task(self._run(batch))

    async def _run(self, batch: list[tuple[Tensor, asyncio.Future[Tensor]]]) -> None:
        images = [image for image, _ in batch]
        try:
            rows = await asyncio.get_running_loop().run_in_executor(self._worker, self._infer, images)
        except Exception as error:  # a runtime may raise any error, and the next batch may succeed
            self.failing = True
            log.exception("The model failed on a batch of %d images.", len(batch))
            for _, future in batch:
                if not future.done():
                    future.set_exception(BatchFailed(type(error).__name__))
        else:
            self.failing = False
            for (_, future), row in zip(batch, rows, strict=True):
                if not future.done():
                    future.set_result(row)
        finally:
            self._running = None
            self._start()

    def _infer(self, images: list[Tensor]) -> list[Tensor]:
        if len({image.dtype for image in images}) > 1:  # a 16-bit file among 8-bit files
            images = [image.float() for image in images]
        rows = list(self._model(torch.stack(images)))
        if len(rows) != len(images):
            raise RuntimeError(f"the model returned {len(rows)} outputs for {len(images)} images")
        return rows
