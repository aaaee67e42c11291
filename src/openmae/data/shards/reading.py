"""Images in WebDataset shards, read where they lie.

A shard is a tar file that its index (``tar_index``) turns into random access: one ``pread`` an image, no unpacking. So
shards are an ``ImageIndex`` like any other, and everything that is promised of folders holds: the order and the
augmentation are addressed by (seed, epoch, index), ranks and workers share the batches, a run resumes at a sample and
equals an uninterrupted one bit for bit.

Order. Local shards are shuffled whole, as folders are: the same images give the same run from either. Reading them at
random costs no more than loose files do (one seek an image instead of two or more, and one open file a shard).

Remote shards are fetched whole, one after the other, into the cache, and read there: a request for each image would
cost one round trip and one billed request each, and a stream could not be resumed at a sample. An epoch over all
images at random would need all shards at once, so theirs is an order that ``WINDOW`` shards suffice for: the shards
are permuted, and the images of a shard are spread at random over ``WINDOW`` shards' worth of images from the shard's
place on. That order, too, is one permutation that follows from (seed, epoch). While a batch is made a thread fetches
the shards that come next. Every node fetches every shard, since a step takes the same images on one rank as on
several; the cache must have room for about ``WINDOW`` + 3 shards, or it fetches some of them again and again.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from openmae.data.decode import CorruptImage, Picture
from openmae.data.image_index import ImageIndex, Numbers
from openmae.data.shards.tar_index import Shard, read_member
from openmae.storage.printable import printable_name
from openmae.storage.urls import redact

WINDOW = 8  # remote shards whose images are shuffled together
MEMBER = "!"  # between the name of a shard and of an image in it


@dataclass(frozen=True, eq=False)
class ShardedIndex(ImageIndex):
    """The images of shards: by shard in the order of their names, within it as they lie.

    Paths are ``NAME.tar!cat/1.jpg``; ``root`` is the folder of the shards, empty for remote ones.

    Attributes:
        pattern: as the user wrote it, without secrets.
        shards: the tar files.
        shard_of: int32 [N], which shard each image is in.
        offsets, sizes: int64 [N], where its bytes are.
    """

    pattern: str = ""
    shards: tuple[Shard, ...] = ()
    shard_of: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    offsets: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    sizes: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    ahead: Ahead | None = None

    @property
    def place(self) -> str:
        return self.pattern

    def full_name(self, path: str) -> str:
        shard, _, member = path.partition(MEMBER)
        return f"{self._shard_names()[shard]}{MEMBER}{printable_name(member)}"

    def holds(self, full_name: str) -> bool:
        return any(full_name.startswith(f"{name}{MEMBER}") for name in self._shard_names().values())

    def _shard_names(self) -> dict[str, str]:
        return {shard.name: printable_name(redact(shard.place)) for shard in self.shards}

    def file(self, number: int) -> Path:
        """Return the name of image ``number``, which is no file of its own."""
        return self.root / self.paths[number]

    def picture(self, number: int) -> Picture:
        return Picture(self.file(number), io.BytesIO(self.read(number)), self.max_pixels)

    def read(self, number: int) -> bytes:
        shard = self.shards[self.shard_of[number]]
        offset, size = int(self.offsets[number]), int(self.sizes[number])
        content = read_member(shard, offset, size)
        if content is None:
            raise CorruptImage(self.file(number), f"{printable_name(shard.name)} has changed since it was indexed")
        return content

    def key(self, number: int) -> str:
        return self.paths[number].partition(MEMBER)[2]

    def subset(self, numbers: Numbers) -> Self:
        chosen = super().subset(numbers)
        places = np.asarray(numbers, dtype=np.int64)
        return replace(chosen, shard_of=self.shard_of[places], offsets=self.offsets[places], sizes=self.sizes[places])

    def shuffled(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        if self.ahead is None or len(self.shards) <= WINDOW:
            return rng.permutation(len(self))
        return windowed_order(self.shard_of, len(self.shards), rng)

    def prepare(self, now: Numbers, soon: Numbers) -> None:
        if self.ahead is not None:
            reach = 2 * len(self) // len(self.shards)
            first = self.shard_of[np.asarray(now, dtype=np.int64)]
            later = self.shard_of[np.asarray(soon[:reach], dtype=np.int64)]
            self.ahead.fetch(*([self.shards[i] for i in dict.fromkeys(part.tolist())] for part in (first, later)))


def windowed_order(shard_of: npt.NDArray[np.int32], shards: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return a permutation of images that has about ``WINDOW`` shards under way at any place, int64 [N].

    Args:
        shard_of: [N], which of the ``shards`` each image is in.
        shards: how many.
        rng: of the epoch.
    """
    queue = rng.permutation(shards)
    counts = np.bincount(shard_of, minlength=shards)[queue]
    start = np.empty(shards)
    start[queue] = np.cumsum(counts) - counts
    spread = WINDOW * len(shard_of) / shards
    return np.argsort(start[shard_of] + spread * rng.random(len(shard_of)), kind="stable")


class Ahead:
    """Fetches remote shards, one at a time, in threads of the process that knows the order.

    Threads of their own and not a pool's: one that waits for a slow store must not hold up the end of the program.
    """

    def __init__(self) -> None:
        self._fetched: dict[Shard, Future[None]] = {}

    def __reduce__(self) -> tuple[type[Ahead], tuple[()]]:
        return Ahead, ()  # a process that this one starts has none of its threads

    def fetch(self, now: Sequence[Shard], soon: Sequence[Shard]) -> None:
        """Fetch shards, and wait for those that are needed ``now``.

        Raises:
            DataError: one of these cannot be had.
        """
        wanted = list(dict.fromkeys((*now, *soon)))
        # What is left behind is forgotten: the cache may have let go of it when it is wanted again.
        self._fetched = {shard: self._fetched[shard] for shard in wanted if shard in self._fetched}
        for shard in wanted:
            if shard not in self._fetched:
                self._fetched[shard] = Future()
                threading.Thread(target=self._run, args=(shard, self._fetched[shard]), daemon=True).start()
        for shard in now:
            self._fetched[shard].result()

    @staticmethod
    def _run(shard: Shard, future: Future[None]) -> None:
        try:
            shard.fetch()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)  # raised where the shard is waited for
