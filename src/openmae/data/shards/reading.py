"""Read images from WebDataset shards without unpacking them.

An index (see ``tar_index``) gives random access to a shard: one ``pread`` per image. A ``ShardedIndex`` is therefore an
``ImageIndex`` like any other: order and augmentation follow from (seed, epoch, index), ranks and workers split the
batches, and a resumed run is bit-identical to an uninterrupted one.

Local shards are shuffled like files, so the same images give the same run from either. Random reads cost no more than
with separate files: one seek per image, and one open file per shard.

Remote shards are downloaded completely, one at a time, into the cache, and read there. (Reading single images would
need one billed request each, and a stream cannot be resumed at a sample.) A random order over all images would need all
shards at once. Instead, the shards are permuted, and the images of each are spread at random over the next ``WINDOW``
shards' worth of images. This order is also a permutation that follows from (seed, epoch). Threads download the next
shards in the background. Every node downloads every shard, since the order does not depend on the number of nodes. The
cache needs space for about ``WINDOW`` + 3 shards; with less, shards are downloaded repeatedly.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from openmae.data.decode import CorruptImage, ImageFile
from openmae.data.index import ImageIndex, Numbers
from openmae.data.shards.tar_index import Shard, read_member
from openmae.storage.printable import printable_name

WINDOW = 8  # remote shards whose images are shuffled together
MEMBER = "!"  # separates the name of a shard from that of an image in it


@dataclass(frozen=True, eq=False)
class ShardedIndex(ImageIndex):
    """The images of shards, in the order of the shards and of their members.

    Paths are ``NAME.tar!cat/1.jpg``; ``root`` is the folder of local shards and empty for remote ones.

    Attributes:
        pattern: the source as the user wrote it, without secrets.
        shards: the tar files.
        shard_of: int32 [N], the shard of each image.
        offsets: int64 [N], the offset of each image in its shard, in bytes.
        sizes: int64 [N], the size of each image in bytes.
        prefetcher: downloads remote shards; None for local ones.
    """

    pattern: str = ""
    shards: tuple[Shard, ...] = ()
    shard_of: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    offsets: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    sizes: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    prefetcher: ShardPrefetcher | None = None

    @property
    def place(self) -> str:
        """Name of the source in messages."""
        return self.pattern

    @property
    def remote(self) -> bool:
        """True if the shards are downloaded while they are used."""
        return self.prefetcher is not None

    def full_name(self, number: int) -> str:
        """Return the printable name of image ``number``, unambiguous among several data sets."""
        return f"{self._shard(number).shown}{MEMBER}{printable_name(self.key(number))}"

    def holds(self, full_name: str) -> bool:
        """Return whether ``full_name`` is in one of these shards."""
        return any(full_name.startswith(f"{shard.shown}{MEMBER}") for shard in self.shards)

    def open(self, number: int) -> ImageFile:
        """Open image ``number``; raise CorruptImage if its header cannot be read."""
        return ImageFile(self.file(number), io.BytesIO(self.read(number)), self.max_pixels)

    def read(self, number: int) -> bytes:
        """Return the encoded bytes of image ``number``; raise CorruptImage if they cannot be read."""
        shard = self._shard(number)
        content = read_member(shard, int(self.offsets[number]), int(self.sizes[number]))
        if content is None:
            raise CorruptImage(self.file(number), f"{printable_name(shard.name)} has changed since it was indexed")
        return content

    def version(self, number: int) -> str:
        """Return a text that changes whenever the shard of image ``number`` does."""
        shard = self._shard(number)
        return f"{shard.place}-{shard.stamp}-{self.offsets[number]}-{self.sizes[number]}"

    def key(self, number: int) -> str:
        """Return the path of image ``number`` in its shard."""
        return self.paths[number].removeprefix(f"{self._shard(number).name}{MEMBER}")

    def _shard(self, number: int) -> Shard:
        return self.shards[self.shard_of[number]]

    def subset(self, numbers: Numbers) -> Self:
        """Return an index of only the images ``numbers``, in that order."""
        chosen = super().subset(numbers)
        places = np.asarray(numbers, dtype=np.int64)
        return replace(chosen, shard_of=self.shard_of[places], offsets=self.offsets[places], sizes=self.sizes[places])

    def shuffled(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return the order of an epoch, int64 [N]; see the module docstring."""
        if self.prefetcher is None or len(self.shards) <= WINDOW:
            return rng.permutation(len(self))
        return windowed_order(self.shard_of, len(self.shards), rng)

    def prepare(self, now: Numbers, soon: Numbers) -> None:
        """Download the shards of the images ``now``, and start to download those needed ``soon``."""
        if self.prefetcher is not None:
            reach = 2 * len(self) // len(self.shards)
            first = self.shard_of[np.asarray(now, dtype=np.int64)]
            later = self.shard_of[np.asarray(soon[:reach], dtype=np.int64)]
            self.prefetcher.fetch(*([self.shards[i] for i in dict.fromkeys(part.tolist())] for part in (first, later)))


def windowed_order(shard_of: npt.NDArray[np.int32], shards: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return a permutation of images, int64 [N], that needs about ``WINDOW`` shards at any position.

    ``shard_of`` [N] is the shard of each image, and ``shards`` is the number of shards.
    """
    queue = rng.permutation(shards)
    counts = np.bincount(shard_of, minlength=shards)[queue]
    start = np.empty(shards)
    start[queue] = np.cumsum(counts) - counts
    spread = WINDOW * len(shard_of) / shards
    return np.argsort(start[shard_of] + spread * rng.random(len(shard_of)), kind="stable")


class ShardPrefetcher:
    """Downloads remote shards, one at a time, in threads of the process that runs the sampler.

    These are daemon threads and not a pool, so that a slow store does not delay the end of the program.
    """

    def __init__(self) -> None:
        self._fetched: dict[Shard, Future[None]] = {}

    def __reduce__(self) -> tuple[type[ShardPrefetcher], tuple[()]]:
        return ShardPrefetcher, ()  # threads are not copied to other processes

    def fetch(self, now: Sequence[Shard], soon: Sequence[Shard]) -> None:
        """Start to download all shards, and wait for those needed ``now``.

        Raises:
            DataError: a shard needed ``now`` cannot be downloaded.
        """
        wanted = list(dict.fromkeys((*now, *soon)))
        # Forget the other shards, since the cache may delete them before they are needed again.
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
