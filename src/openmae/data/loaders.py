"""Data loaders: the batches of one process, from any position of a run."""

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

from openmae.data.corrupt import CorruptFiles, warn_of_further_images
from openmae.data.image_dataset import AddressedSampler, Batch, EvalSampler, ImageDataset
from openmae.data.index import ImageIndex
from openmae.data.scaled_copies import ScaledCopies
from openmae.data.transforms import Transform
from openmae.main_guard import watch_for_reruns

_UPDATE_SECONDS = 10.0  # an update and its checkpoint may take this long


@dataclass(frozen=True)
class LoaderSettings:
    """Settings that the loaders of a process share.

    ``batch_size`` is per process. The list of corrupt files is written to ``results``. ``num_workers`` does not change
    the batches; 0 loads them in this process.
    """

    batch_size: int
    results: Path
    max_corrupt_fraction: float
    num_workers: int = 0
    rank: int = 0
    world_size: int = 1


class _RecordingLoader:
    """A ``DataLoader`` that records corrupt files, and warns of the first file with several images."""

    def __init__(
        self, dataset: ImageDataset, sampler: AddressedSampler | EvalSampler, settings: LoaderSettings
    ) -> None:
        self.dataset = dataset
        self._corrupt = CorruptFiles(dataset.index, settings.results, settings.max_corrupt_fraction)
        self._warned = False
        self._loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=dataset.collate,
            num_workers=settings.num_workers,
            persistent_workers=settings.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_init_worker if settings.num_workers else None,
            # DataLoader draws a seed per iterator, and how often depends on the workers. Keep that away from the global
            # generator.
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def close(self) -> None:
        """End the workers.

        If the garbage collector finds the loader in a cycle instead, it closes the queues of the workers first. They
        then get no message to end, and the collector waits five seconds for each.
        """
        if self._loader._iterator is not None:  # torch has no public way to end persistent workers
            self._loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._loader._iterator = None

    def _batches(self) -> Iterator[Batch]:
        for batch in self._loaded():
            self._corrupt.record(batch.corrupt)
            self._warn_of_further_images(batch)
            yield batch

    def _warn_of_further_images(self, batch: Batch) -> None:
        if batch.further and not self._warned:
            self._warned = True
            warn_of_further_images(self.dataset.index, *batch.further[0])

    def _loaded(self) -> Iterator[Batch]:
        workers = self._loader.num_workers
        if not workers or multiprocessing.get_start_method() == "fork":
            yield from self._loader
            return
        # Workers that are not forked import the user's script, which may lack an `if __name__ == "__main__"` guard.
        with watch_for_reruns(f"dataset.num_workers_per_gpu={workers}"):
            batches = iter(self._loader)
            first = next(batches, None)
        if first is not None:
            yield first
            yield from batches


class TrainingLoader(_RecordingLoader):
    """Shuffled batches of equal size for training, which can start at any position of a run.

    The order and the transforms follow from ``seed`` and the epoch. With ``copies``, samples are made from scaled
    copies of the images.

    Raises:
        DataError: there are fewer images than one batch per process.
    """

    def __init__(
        self,
        index: ImageIndex,
        transform: Transform,
        settings: LoaderSettings,
        seed: int,
        copies: ScaledCopies | None = None,
    ) -> None:
        self._sampler = AddressedSampler(index, settings.batch_size, seed, settings.rank, settings.world_size)
        dataset = ImageDataset(index, transform, seed, replace_corrupt=True, copies=copies)
        super().__init__(dataset, self._sampler, settings)

    def from_position(self, epoch: int, batches_done: int) -> Iterator[Batch]:
        """Yield the batches of an epoch after the first ``batches_done``."""
        if batches_done < len(self):
            self._sampler.position = (epoch, batches_done)
            yield from self._batches()

    def file_of(self, index: int) -> str:
        """Return the path of an image, relative to the data set."""
        return self.dataset.index.paths[index]


class EvaluationLoader(_RecordingLoader):
    """Batches of every readable image once, in order."""

    def __init__(self, index: ImageIndex, transform: Transform, settings: LoaderSettings) -> None:
        sampler = EvalSampler(index, settings.batch_size, settings.rank, settings.world_size)
        super().__init__(ImageDataset(index, transform), sampler, settings)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch in self._batches() if len(batch.images))

    def first(self, count: int) -> Batch:
        """Return up to ``count`` readable images spread evenly over the data set, for display."""
        length = len(self.dataset)
        step = max(1, length // count)
        samples = (self.dataset[0, index] for offset in range(step) for index in range(offset, length, step))
        readable = (sample for sample in samples if len(sample.images))
        batch = self.dataset.collate(list(islice(readable, count)))
        self._warn_of_further_images(batch)
        return batch


def _init_worker(worker: int) -> None:
    """Make a worker ignore signals that are sent to all processes, so that the training process can finish its update.

    A terminal sends SIGINT (Ctrl-C) to every process, and SLURM announces a preemption to every process (SIGUSR1).
    SIGTERM ends a worker only if the training process sends it.
    """
    sys.excepthook = _ignore_lost_connections
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()
    threading.Thread(target=_exit_on_sigterm, args=(parent.pid if parent else None,), daemon=True).start()


def _ignore_lost_connections(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print no traceback if the training process stops while it fetches a batch, since it reports the reason itself.

    The hook is called for errors in the thread of ``multiprocessing.resource_sharer``, which sends the batches.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _exit_on_sigterm(parent: int | None) -> None:
    if hasattr(signal, "sigwaitinfo"):
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
    else:  # macOS does not report the sender, so always give the training process time to finish its update
        signal.sigwait({signal.SIGTERM})
        time.sleep(_UPDATE_SECONDS)
    os._exit(0)
