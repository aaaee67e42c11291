"""Share decoding and inference fairly among requests, so that a small request does not wait for a large one."""

from __future__ import annotations

import asyncio
import itertools
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from torch import Tensor

_Item = TypeVar("_Item")

_OVERHEAD = 50_000  # cost of an image in addition to its pixels
_LARGE = 8  # an image is large if it has more than an eighth of the pixels that may be decoded at the same time


class FairQueue(Generic[_Item]):
    """A weighted fair queue: the item with the earliest due time is taken first.

    Each item of a request is due its cost after the previous one, and the first one its cost after the current virtual
    time. Taking an item advances the virtual time to its due time. So a small request overtakes a large one, and no
    request waits forever.
    """

    def __init__(self) -> None:
        self._time = 0.0
        self._entries: list[tuple[float, int, _Item]] = []  # sorted
        self._numbers = itertools.count()  # keeps the order of items with equal due times

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, items: Sequence[_Item], costs: Iterable[float]) -> None:
        """Add the items of a request, each with its cost."""
        due = self._time
        for item, cost in zip(items, costs, strict=True):
            due += cost
            insort(self._entries, (due, next(self._numbers), item))

    def take(self, fits: Callable[[_Item], bool] = lambda item: True) -> _Item | None:
        """Remove and return the first item that fits, or return None."""
        for place, (due, _, item) in enumerate(self._entries):
            if fits(item):
                del self._entries[place]
                self._time = max(self._time, due)
                return item
        return None


@dataclass
class _Task:
    work: Callable[[], Any]
    pixels: int
    future: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Decoders:
    """Threads that decode images, in the order of a fair queue.

    Large images use at most ``threads`` threads and ``pixels`` at the same time. This limits memory, and a small image
    does not wait for large ones.

    Args:
        threads: Maximum number of threads for large images. There is one more for small images.
        pixels: Limit on the sum of the pixels of all large images that are decoded at the same time.
    """

    def __init__(self, threads: int, pixels: int) -> None:
        self._threads, self._pixels = threads, pixels
        self._pool = ThreadPoolExecutor(threads + 1, "openmae-decode")
        self._waiting: FairQueue[_Task] = FairQueue()
        self._running = 0
        self._large: list[int] = []  # pixels of the large images that are being decoded

    async def __call__(
        self, works: Sequence[Callable[[], Tensor | Exception]], pixels: Sequence[int]
    ) -> list[Tensor | Exception]:
        """Call each function in ``works``, one per image of a request, and return the results in order."""
        tasks = [_Task(work, size) for work, size in zip(works, pixels, strict=True)]
        self._waiting.add(tasks, (task.pixels + _OVERHEAD for task in tasks))
        self._start()
        return list(await asyncio.gather(*(task.future for task in tasks)))

    def shutdown(self) -> None:
        """Wait for the images that are being decoded, and end the threads."""
        self._pool.shutdown()

    def _is_large(self, task: _Task) -> bool:
        return task.pixels * _LARGE > self._pixels

    def _start(self) -> None:
        while self._running <= self._threads and (task := self._next()) is not None:
            if task.future.done():  # its request was canceled
                continue
            self._running += 1
            if self._is_large(task):
                self._large.append(task.pixels)
            decoding = asyncio.get_running_loop().run_in_executor(self._pool, task.work)
            decoding.add_done_callback(partial(self._finish, task))

    def _next(self) -> _Task | None:
        blocked = len(self._large) >= self._threads

        def fits(task: _Task) -> bool:
            nonlocal blocked
            if not self._is_large(task):
                return True
            blocked = blocked or bool(self._large and sum(self._large) + task.pixels > self._pixels)
            return not blocked  # if one must wait, all large images after it wait too

        return self._waiting.take(fits)

    def _finish(self, task: _Task, decoding: asyncio.Future[Any]) -> None:
        self._running -= 1
        if self._is_large(task):
            self._large.remove(task.pixels)
        if not task.future.done():
            if error := decoding.exception():
                task.future.set_exception(error)
            else:
                task.future.set_result(decoding.result())
        self._start()
