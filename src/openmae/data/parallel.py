"""An ordered parallel map that keeps few results in memory, with one thread per core."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_AHEAD = 4  # results per thread computed before the consumer needs them

T = TypeVar("T")


def map_ordered(function: Callable[[int], T], count: int) -> Iterator[T]:
    """Yield ``function(0)`` to ``function(count - 1)`` in order, computed in parallel."""
    threads = os.cpu_count() or 1
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for number in range(count):
                waiting.append(pool.submit(function, number))
                if len(waiting) > threads * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
