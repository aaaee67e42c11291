"""Who is next: work of many requests takes turns, so that a small request does not wait for a large one."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

_Item = TypeVar("_Item")

_OPENING = 50_000  # pixels' worth of work that every image takes
_LARGE = 8  # an image is large above this part of the pixels that are decoded at once


@dataclass
class Clock:
    """Virtual time: when the work that was begun last was due."""

    time: float = 0.0

    def dues(self, costs: Iterable[float]) -> list[float]:
        """When each piece of a request's work is due: at what the request takes up to it, counted from now."""
        return list(itertools.accumulate(costs, initial=self.time))[1:]


class FairQueue(Generic[_Item]):
    """Weighted fair queueing: what is due first goes first, and the clock is set to it.

    So a request with little work passes one with much, and none waits for ever, since the clock goes on with each item.
    Queues that share a clock share the work fairly.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, _Item]] = []
        self._numbers = itertools.count()  # of those due together the first to come

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, item: _Item, due: float) -> None:
        """Add an item; see ``Clock.dues``."""
        heapq.heappush(self._heap, (due, next(self._numbers), item))

    def peek(self) -> tuple[float, _Item]:
        """When the next item is due, and the item."""
        due, _, item = self._heap[0]
        return due, item

    def take(self) -> _Item:
        """Remove and return the next item."""
        due, _, item = heapq.heappop(self._heap)
        self._clock.time = max(self._clock.time, due)
        return item


@dataclass
class _Task:
    work: Callable[[], Tensor | Exception]
    pixels: int
    future: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Decoders:
    """Threads that decode images, each when it is its request's turn.

    Large images share ``pixels`` and all threads but one: memory stays bounded, and a small image never waits for the
    end of a large one.

    Args:
        threads: for large images; one more is for small ones alone.
        pixels: of all large images that are decoded at once, and the most that one may have.
    """

    def __init__(self, threads: int, pixels: int) -> None:
        self._threads, self._pixels = threads, pixels
        self._pool = ThreadPoolExecutor(threads + 1, "openmae-decode")
        self._clock = Clock()
        self._small: FairQueue[_Task] = FairQueue(self._clock)
        self._large: FairQueue[_Task] = FairQueue(self._clock)
        self._running: set[asyncio.Task[None]] = set()
        self._sizes: list[int] = []  # of the large ones that run

    async def __call__(
        self, works: Sequence[Callable[[], Tensor | Exception]], pixels: Sequence[int]
    ) -> list[Tensor | Exception]:
        """Do the works of one request, and return their results in order; call it on the event loop."""
        tasks = [_Task(work, size) for work, size in zip(works, pixels, strict=True)]
        for task, due in zip(tasks, self._clock.dues(task.pixels + _OPENING for task in tasks), strict=True):
            (self._large if self._is_large(task) else self._small).add(task, due)
        self._start()
        return list(await asyncio.gather(*(task.future for task in tasks)))

    def shutdown(self) -> None:
        """Finish what runs."""
        self._pool.shutdown()

    def _is_large(self, task: _Task) -> bool:
        return task.pixels * _LARGE > self._pixels

    def _start(self) -> None:
        while (queue := self._next()) is not None:
            task = queue.take()
            if task.future.done():  # its request was given up
                continue
            if self._is_large(task):
                self._sizes.append(task.pixels)
            running = asyncio.create_task(self._run(task))
            self._running.add(running)
            running.add_done_callback(self._running.discard)

    def _next(self) -> FairQueue[_Task] | None:
        """The queue whose next image is due first among those that have a thread."""
        open_queues = []
        if len(self._running) <= self._threads:
            if len(self._small):
                open_queues.append(self._small)
            if len(self._large) and len(self._sizes) < self._threads:
                _, task = self._large.peek()
                if not self._sizes or sum(self._sizes) + task.pixels <= self._pixels:
                    open_queues.append(self._large)
        return min(open_queues, key=lambda queue: queue.peek()[0], default=None)

    async def _run(self, task: _Task) -> None:
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._pool, task.work)
            if not task.future.done():
                task.future.set_result(result)
        except Exception as error:
            if not task.future.done():
                task.future.set_exception(error)
        finally:
            if self._is_large(task):
                self._sizes.remove(task.pixels)
            self._running.discard(asyncio.current_task())  # type: ignore[arg-type]
            self._start()
