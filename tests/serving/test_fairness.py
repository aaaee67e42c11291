"""Fair sharing: a small request overtakes a large one, and none waits forever."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openmae.serving.fairness import Decoders, FairQueue
from openmae.serving.micro_batching import Batcher

LIMIT = 20


def test_a_small_request_overtakes_a_large_one() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add([f"large {number}" for number in range(5)], [10] * 5)
    assert queue.take() == "large 0"
    queue.add(["small"], [1])
    assert [queue.take() for _ in range(6)] == ["small", "large 1", "large 2", "large 3", "large 4", None]


def test_a_large_request_gets_its_share_among_many_small_ones() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add(["large"], [10])
    taken: list[str | None] = []
    while "large" not in taken:
        queue.add(["small"], [1])
        taken.append(queue.take())
    assert len(taken) <= 11


@given(st.lists(st.lists(st.integers(1, 100), min_size=1, max_size=6), min_size=1, max_size=6))
def test_each_request_keeps_its_order_and_nothing_is_lost(requests: list[list[int]]) -> None:
    queue: FairQueue[tuple[int, int]] = FairQueue()
    for number, costs in enumerate(requests):
        queue.add([(number, place) for place in range(len(costs))], costs)
    taken = [item for _ in range(len(queue)) if (item := queue.take()) is not None]
    assert len(queue) == 0
    for number, costs in enumerate(requests):
        assert [place for which, place in taken if which == number] == list(range(len(costs)))


def test_an_item_that_does_not_fit_stays_in_its_place() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.add([5, 1, 4], [1, 1, 1])
    assert queue.take(lambda item: item < 5) == 1
    assert queue.take(lambda item: item > 5) is None
    assert [queue.take(), queue.take()] == [5, 4]


def test_large_images_share_pixels_and_leave_a_thread() -> None:
    gate, lock = threading.Event(), threading.Lock()
    running: list[int] = []
    most: list[int] = []

    def large(pixels: int) -> Tensor:
        with lock:
            running.append(pixels)
            most.append(sum(running))
        assert gate.wait(LIMIT)
        with lock:
            running.remove(pixels)
        return torch.tensor(pixels)

    async def work() -> None:
        decoders = Decoders(threads=2, pixels=100)
        sizes = [60, 30, 50, 100, 20, 90]
        heavy = asyncio.create_task(decoders([lambda size=size: large(size) for size in sizes], sizes))
        await asyncio.sleep(0)
        assert [int(one) for one in await decoders([lambda: torch.tensor(1)] * 3, [1, 1, 1])] == [1, 1, 1]
        assert not heavy.done(), "the small ones waited for the large ones"
        gate.set()
        assert [int(one) for one in await heavy] == sizes
        decoders.shutdown()

    asyncio.run(asyncio.wait_for(work(), LIMIT))
    assert max(most) <= 100


def test_an_error_affects_no_other_request() -> None:
    def fail() -> Tensor:
        raise MemoryError("too little")

    async def work() -> None:
        decoders = Decoders(1, 100)
        with pytest.raises(MemoryError):
            await decoders([fail, lambda: torch.tensor(1)], [50, 50])
        assert await decoders([], []) == []
        assert len(await decoders([lambda: torch.tensor(1)], [100])) == 1
        decoders.shutdown()

    asyncio.run(asyncio.wait_for(work(), LIMIT))


def test_a_single_image_does_not_wait_for_all_batches_of_a_large_request() -> None:
    batches: list[list[int]] = []
    gate, began = threading.Semaphore(0), threading.Semaphore(0)

    def model(images: Tensor) -> Tensor:
        batches.append(images[:, 0, 0, 0].tolist())
        began.release()
        assert gate.acquire(timeout=LIMIT)
        return images.float().flatten(1)[:, 0]

    async def work() -> None:
        batcher = Batcher(model, max_batch=2)
        many = asyncio.create_task(batcher([torch.full((3, 1, 1), n, dtype=torch.uint8) for n in range(8)]))
        assert await asyncio.to_thread(began.acquire, timeout=LIMIT)
        single = asyncio.create_task(batcher([torch.full((3, 1, 1), 99, dtype=torch.uint8)]))
        await asyncio.sleep(0)
        gate.release(10)
        assert (await single)[0].item() == 99
        assert [row.item() for row in await many] == list(range(8))
        await batcher.close()

    asyncio.run(asyncio.wait_for(work(), LIMIT))
    assert 99 in batches[1], batches
