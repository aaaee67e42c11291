"""The batcher on an event loop, with a model that waits until the test releases each batch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openmae.serving.micro_batching import Batcher, BatchFailed

LIMIT = 20  # seconds; a hang is a failure, not a stuck suite


class Doubler:
    """A model that returns 2x; each batch releases ``began`` and waits for ``gate``."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.gate = threading.Semaphore(0)
        self.began = threading.Semaphore(0)
        self.bad: float | None = None

    def __call__(self, images: Tensor) -> Tensor:
        self.batches.append(images)
        self.began.release()
        assert self.gate.acquire(timeout=LIMIT), "the test let no batch through"
        if self.bad is not None and (images == self.bad).any():
            raise ValueError("a secret of the model")
        return images.float().flatten(1)[:, 0] * 2

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


@pytest.fixture
def model() -> Doubler:
    return Doubler()


def image(value: float, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.full((3, 2, 2), value, dtype=dtype)


def on_loop(work: Callable[[], object]) -> None:
    asyncio.run(asyncio.wait_for(work(), LIMIT))  # type: ignore[arg-type]


async def begun(model: Doubler) -> None:
    """Wait until the next batch is in the model."""
    assert await asyncio.to_thread(model.began.acquire, timeout=LIMIT), "no batch began"


def test_a_single_image_runs_at_once_and_others_gather_in_the_meantime(model: Doubler) -> None:
    async def work() -> None:
        batcher = Batcher(model, max_batch=4)
        first = asyncio.create_task(batcher([image(1)]))
        await begun(model)
        assert model.sizes == [1], "an idle model waited for more images"
        others = [asyncio.create_task(batcher([image(n)])) for n in range(2, 8)]
        await asyncio.sleep(0)
        assert model.sizes == [1]
        model.gate.release(3)
        assert [(await task)[0].item() for task in (first, *others)] == [2 * n for n in range(1, 8)]
        assert model.sizes == [1, 4, 2], "six waiting images are a batch of max_batch and the rest"
        await batcher.close()

    on_loop(work)


def test_images_of_one_request_keep_their_order(model: Doubler) -> None:
    async def work() -> None:
        batcher = Batcher(model, max_batch=3)
        model.gate.release(4)
        assert [row.item() for row in await batcher([image(n) for n in range(10)])] == [2 * n for n in range(10)]
        assert await batcher([]) == []
        await batcher.close()

    on_loop(work)
    assert model.sizes == [3, 3, 3, 1]


def test_floats_and_bytes_share_a_batch(model: Doubler) -> None:
    async def work() -> None:
        batcher = Batcher(model, max_batch=2)
        model.gate.release()
        rows = await batcher([image(3), image(0.25, torch.float32)])
        assert [row.item() for row in rows] == [6, 0.5]
        await batcher.close()

    on_loop(work)


def test_a_failing_batch_affects_no_other(model: Doubler, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        batcher = Batcher(model, max_batch=2)
        model.bad = 9
        tasks = [asyncio.create_task(batcher([image(n)])) for n in (1, 9, 3, 4)]
        model.gate.release(1)
        await begun(model)
        model.gate.release(2)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert model.sizes == [1, 2, 1]
        assert [results[0][0].item(), results[3][0].item()] == [2, 8]  # type: ignore[index]
        for result in results[1:3]:
            assert isinstance(result, BatchFailed)
            assert result.text.startswith("The model failed on the images (ValueError). ")
        assert not batcher.failing, "the last batch succeeded"
        model.gate.release()
        with pytest.raises(BatchFailed):
            await batcher([image(9)])
        assert batcher.failing
        await batcher.close()

    on_loop(work)
    assert "The model failed on a batch of 2 images" in caplog.text
    assert "a secret of the model" in caplog.text, "the log has the traceback"


def test_too_few_outputs_are_an_error() -> None:
    async def work() -> None:
        batcher = Batcher(lambda images: images[:1], max_batch=4)
        with pytest.raises(BatchFailed, match="RuntimeError"):
            await batcher([image(1), image(2)])
        await batcher.close()

    on_loop(work)


def test_a_canceled_caller_blocks_no_other(model: Doubler) -> None:
    async def work() -> None:
        batcher = Batcher(model, max_batch=2)
        running, waiting, other = (asyncio.create_task(batcher([image(n)])) for n in (1, 2, 3))
        await begun(model)
        running.cancel()
        waiting.cancel()
        model.gate.release(2)
        assert (await other)[0].item() == 6
        assert running.cancelled()
        assert [batch[0, 0, 0, 0].item() for batch in model.batches] == [1, 3], "a cancelled image is not run"
        assert model.sizes == [1, 1]
        await batcher.close()

    on_loop(work)


def test_closing_finishes_waiting_images(model: Doubler) -> None:
    async def work() -> None:
        batcher = Batcher(model, max_batch=1)
        tasks = [asyncio.create_task(batcher([image(n)])) for n in range(3)]
        await begun(model)
        closing = asyncio.create_task(batcher.close())
        model.gate.release(3)
        await closing
        assert all(task.done() for task in tasks)
        assert [task.result()[0].item() for task in tasks] == [0, 2, 4]

    on_loop(work)
