"""Loaders: one process's share of the batches, from any place of the run on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType

import torch
from torch.utils.data import DataLoader

from openmae.data.corrupt import CorruptFiles
from openmae.data.image_dataset import AddressedSampler, Batch, EvalSampler, ImageDataset, Sample
from openmae.data.image_index import ImageIndex
from openmae.data.remarks import Remarks
from openmae.data.transforms import Transform
from openmae.main_guard import watch_for_reruns

_UPDATE = 10.0  # seconds that an update and its checkpoint may take


class TrainingLoader:
    """Shuffled batches of one size, addressed by (seed, epoch); a place in the run can be taken up again.

    Args:
        dataset: made with ``replace_corrupt=True``.
        sampler: the order.
        num_workers: processes; 0 loads in this one, with the same result to the bit.
        corrupt: counts what could not be decoded, as batches are taken.
    """

    def __init__(
        self, dataset: ImageDataset, sampler: AddressedSampler, num_workers: int, corrupt: CorruptFiles
    ) -> None:
        self.dataset = dataset
        self._sampler = sampler
        self._corrupt = corrupt
        self._remarks = Remarks(dataset.index)
        self._loader = _data_loader(dataset, sampler, num_workers)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._sampler)

    def from_position(self, epoch: int, batches_done: int) -> Iterator[Batch]:
        """The rest of an epoch's batches."""
        if batches_done >= len(self):
            return
        self._sampler.set_position(epoch, batches_done)
        for batch in _batches(self._loader):
            self._corrupt.record(batch.corrupt)
            self._remarks.record(batch.remarks)
            yield batch
        self._remarks.end_pass()

    def file_of(self, index: int) -> str:
        """The path of an image, relative to the data set."""
        return self.dataset.index.paths[index]


class EvaluationLoader:
    """Every image once, in order, corrupt ones left out.

    Args:
        dataset: made with ``replace_corrupt=False``.
        sampler: the order.
        num_workers: processes.
        corrupt: counts what could not be decoded.
    """

    def __init__(self, dataset: ImageDataset, sampler: EvalSampler, num_workers: int, corrupt: CorruptFiles) -> None:
        self.dataset = dataset
        self._corrupt = corrupt
        self._remarks = Remarks(dataset.index)
        self._loader = _data_loader(dataset, sampler, num_workers)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in _batches(self._loader):
            self._corrupt.record(batch.corrupt)
            self._remarks.record(batch.remarks)
            if len(batch.images):
                yield batch
        self._remarks.end_pass()

    def first(self, count: int) -> Batch:
        """A batch of readable images spread evenly over the data set, for pictures."""
        length = len(self.dataset)
        step = max(1, length // count)
        samples = (self.dataset[0, index] for offset in range(step) for index in range(offset, length, step))
        readable = (sample for sample in samples if sample["image"] is not None)
        batch = self.dataset.collate(list(islice(readable, count)))
        self._remarks.record(batch.remarks)
        return batch


@dataclass(frozen=True)
class LoaderSettings:
    """What a process's loaders have in common.

    Attributes:
        batch_size: images of a batch, of one process.
        results: folder of the list of corrupt files.
        max_corrupt_fraction: the largest bearable share of a data set.
        num_workers: processes that load; 0 loads in this one.
        rank, world_size: which share of the batches.
    """

    batch_size: int
    results: Path
    max_corrupt_fraction: float
    num_workers: int = 0
    rank: int = 0
    world_size: int = 1


def training_loader(index: ImageIndex, transform: Transform, settings: LoaderSettings, seed: int) -> TrainingLoader:
    """A loader over the images of ``index``, shuffled.

    Raises:
        DataError: fewer images than one batch on every process.
    """
    dataset = ImageDataset(index, transform, seed, replace_corrupt=True)
    sampler = AddressedSampler(len(index), settings.batch_size, seed, settings.rank, settings.world_size, index)
    corrupt = CorruptFiles(index, settings.results, settings.max_corrupt_fraction)
    return TrainingLoader(dataset, sampler, settings.num_workers, corrupt)


def evaluation_loader(index: ImageIndex, transform: Transform, settings: LoaderSettings) -> EvaluationLoader:
    """A loader over the images of ``index``, in order."""
    dataset = ImageDataset(index, transform)
    sampler = EvalSampler(len(index), settings.batch_size, settings.rank, settings.world_size, index)
    corrupt = CorruptFiles(index, settings.results, settings.max_corrupt_fraction)
    return EvaluationLoader(dataset, sampler, settings.num_workers, corrupt)


def _data_loader(
    dataset: ImageDataset, sampler: AddressedSampler | EvalSampler, num_workers: int
) -> DataLoader[Sample]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=dataset.collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_interrupts_to_the_loop if num_workers else None,
        # Its own generator: a loader draws a base seed, more often without workers than with them, and would shift the
        # global generator.
        generator=torch.Generator().manual_seed(0),
    )


def _batches(loader: DataLoader[Sample]) -> Iterator[Batch]:
    """What the loader gives. Workers that are not forked import the user's script before they load anything."""
    if not loader.num_workers or multiprocessing.get_start_method() == "fork":
        yield from loader
        return
    with watch_for_reruns(f"dataset.num_workers_per_gpu={loader.num_workers}"):
        batches = iter(loader)
        first = next(batches, None)
    if first is not None:
        yield first
        yield from batches


def _leave_interrupts_to_the_loop(worker: int) -> None:
    """A terminal sends Ctrl-C to every process, SLURM what announces a preemption.

    Workers that died of it would fail the update under way. SIGTERM is how the loop itself ends a worker that hangs.
    """
    sys.excepthook = _ignore_lost_connections
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_the_loop, args=(parent.pid,), daemon=True).start()


def _ignore_lost_connections(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Stay silent when the training process stops in the middle of fetching a batch; it reports the reason itself.

    The thread of ``multiprocessing.resource_sharer`` that hands out batches passes a lost connection to this hook.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _end_for_the_loop(loop: int | None) -> None:
    if hasattr(signal, "sigwaitinfo"):
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != loop:
            pass
    else:  # macOS does not say who sent it: leave the loop the time to finish its update
        signal.sigwait({signal.SIGTERM})
        time.sleep(_UPDATE)
    os._exit(0)
