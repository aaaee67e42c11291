"""The PyTorch data set of the images of an index, and its samplers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from openmae.data.decode import CorruptImage, ImageFile
from openmae.data.index import ImageIndex
from openmae.data.scaled_copies import ScaledCopies, ScaledImage
from openmae.data.transforms import Transform, rng_at
from openmae.errors import DataError

Address = tuple[int, int]  # epoch, index
_MAX_TRIES = 16  # consecutive images to try if one is corrupt


class Batch(NamedTuple):
    """One batch.

    Attributes:
        images: [B, C, H, W], uint8, or float32 in 0..255 if one of them has 16 bits. B may be 0 in evaluation, where
            all ranks have the same number of batches and corrupt files are left out.
        labels: int64 [B]; -1 for an image without a label.
        indices: int64 [B]; positions in the index of the data set.
        epoch: the epoch that the images were drawn for.
        corrupt: (index, reason) of files that could not be decoded.
        further: (index, description) of files with several images.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    epoch: int
    corrupt: list[tuple[int, str]]
    further: Sequence[tuple[int, str]] = ()


class ImageDataset(Dataset[Batch]):
    """The transformed images of an index; each item is a batch of one image, or an empty one if it cannot be decoded.

    Items are addressed by (epoch, i) and depend on nothing else, so every process makes the same ones.

    Args:
        index: the images and their labels.
        transform: makes a tensor from an open image.
        seed: determines, with the epoch and i, the transform's random numbers.
        replace_corrupt: return the next readable image instead of a corrupt one (training). Otherwise a corrupt image
            is left out of its batch, so that no image counts twice (evaluation).
        copies: make samples from scaled copies of the images, not from the images themselves.
    """

    def __init__(
        self,
        index: ImageIndex,
        transform: Transform,
        seed: int = 0,
        replace_corrupt: bool = False,
        copies: ScaledCopies | None = None,
    ) -> None:
        self.index = index
        self.transform = transform
        self.seed = seed
        self.replace_corrupt = replace_corrupt
        self.copies = copies

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, address: Address) -> Batch:
        epoch, wanted = address
        corrupt: list[tuple[int, str]] = []
        for step in range(min(_MAX_TRIES, len(self)) if self.replace_corrupt else 1):
            number = (wanted + step) % len(self)
            try:
                with self._open(number) as image:
                    pixels = self.transform(image, rng_at(self.seed, epoch, wanted))
                    further = image.further_images
            except CorruptImage as error:
                corrupt.append((number, error.reason))
                continue
            label = -1 if self.index.labels is None else self.index.labels[number]
            several = [(number, further)] if further else []
            return Batch(pixels[None], torch.tensor([label]), torch.tensor([number]), epoch, corrupt, several)
        return self._empty(epoch, corrupt)

    def _open(self, number: int) -> ImageFile | ScaledImage:
        return self.index.open(number) if self.copies is None else self.copies.open(self.index, number)

    def _empty(self, epoch: int, corrupt: list[tuple[int, str]]) -> Batch:
        none = torch.empty(0, dtype=torch.int64)
        images = torch.empty(0, self.transform.in_chans, *self.transform.size, dtype=torch.uint8)
        return Batch(images, none, none, epoch, corrupt)

    def collate(self, batches: Sequence[Batch]) -> Batch:
        """Concatenate batches of one epoch; ``collate_fn`` of the data loader."""
        batches = batches or [self._empty(0, [])]
        readable = [batch for batch in batches if len(batch.images)] or batches[:1]
        images = [batch.images for batch in readable]
        if any(image.is_floating_point() for image in images):
            images = [image.float() for image in images]
        return Batch(
            images=torch.cat(images),
            labels=torch.cat([batch.labels for batch in readable]),
            indices=torch.cat([batch.indices for batch in readable]),
            epoch=batches[0].epoch,
            corrupt=[file for batch in batches for file in batch.corrupt],
            further=[file for batch in batches for file in batch.further],
        )


class AddressedSampler:
    """Batches of (epoch, index) for training, shuffled by (seed, epoch) and split over ranks.

    The last, incomplete batch is dropped. With the same global batch size, a step takes the same images for any number
    of ranks. Each iteration runs from the current position to the end of the epoch, and moves the position to the start
    of the next epoch; ``len()`` is always that of a complete epoch. ``batch_size`` is per rank.

    Attributes:
        position: the epoch, and the number of its batches to skip, where the next iteration starts.

    Raises:
        DataError: there are fewer images than one batch per rank.
    """

    def __init__(self, index: ImageIndex, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        length = len(index)
        if length < batch_size * world_size:
            on_ranks = f" on each of {world_size} processes" if world_size > 1 else ""
            raise DataError(
                f"The training set has {length} images, fewer than one batch of {batch_size}{on_ranks}.",
                f"Set dataset.batch_size to {length // world_size} or less, or add images."
                if length >= world_size
                else "Use fewer GPUs, or add images.",
            )
        self.index = index
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = (0, 0)

    def __len__(self) -> int:
        return len(self.index) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Address]]:
        # A generator, so that the position changes at the first batch and not at iter(), which DataLoader calls twice.
        epoch, done = self.position
        self.position = (epoch + 1, 0)
        order = self.index.shuffled(rng_at(self.seed, epoch, stream="shuffle"))
        for batch in range(done, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            now = order[start : start + self.batch_size]
            self.index.prepare(now, order[start + self.batch_size :])
            yield [(epoch, int(index)) for index in now]


class EvalSampler:
    """Batches of (0, index) in order, every image once, split over ranks.

    All ranks have the same number of batches, since a collective call in the model would hang otherwise; the last batch
    of a rank may be empty.
    """

    def __init__(self, index: ImageIndex, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.index = index
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return math.ceil(len(self.index) / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Address]]:
        indices = range(self.rank, len(self.index), self.world_size)
        for batch in range(len(self)):
            now = indices[batch * self.batch_size : (batch + 1) * self.batch_size]
            self.index.prepare(now, indices[(batch + 1) * self.batch_size :])
            yield [(0, index) for index in now]
