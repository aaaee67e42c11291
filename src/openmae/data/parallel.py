"""Decode all images of a data set in parallel, with one thread per core."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from openmae.data.decode import CorruptImage, ImageFile
from openmae.data.index import ImageIndex
from openmae.machine import usable_cores

_AHEAD = 4  # results per thread computed before the consumer needs them

T = TypeVar("T")


def map_images(index: ImageIndex, function: Callable[[ImageFile, bytes], T]) -> Iterator[T | CorruptImage]:
    """Yield ``function(image, encoded bytes)`` for each image in order, or the error if the image is corrupt.

    Few results are kept in memory.
    """

    def open_and_call(number: int) -> T | CorruptImage:
        try:
            content = index.read(number)
            with ImageFile(index.file(number), io.BytesIO(content), index.max_pixels) as image:
                return function(image, content)
        except CorruptImage as error:
            return error

    threads = usable_cores()
    waiting: deque[Future[T | CorruptImage]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for number in range(len(index)):
                waiting.append(pool.submit(open_and_call, number))
                if len(waiting) > threads * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
