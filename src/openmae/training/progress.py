"""Throughput and progress bar of a training run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import NamedTuple, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


class _Reading(NamedTuple):
    at: float
    waited: float
    images: int


class PaceMeter:
    """Measures images per second, and the fraction of the time spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start an epoch."""
        self._waited, self._images, self._steps = 0.0, 0, 0
        self._start = self._lap = self._now()
        self._last = self._start.at  # end of the last step

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and measure the wait for each."""
        asked = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def count(self, images: int) -> None:
        """Count a step of ``images`` images, summed over all ranks."""
        self._images += images
        self._steps += 1
        self._last = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return ``images_per_s`` and ``data_wait`` (a fraction of the time) since the start of the epoch."""
        return self._since(self._start)

    def lap(self) -> dict[str, float]:
        """Return the same values since the last call of ``lap``."""
        pace = self._since(self._lap)
        self._lap = self._now()
        return pace

    def timing(self, epoch: int, epochs: int, step: int, steps_per_epoch: int) -> dict[str, int | str]:
        """Return the progress fields of TAO's status log at the end of an epoch, after its validation.

        ``epoch`` and ``max_epoch`` are counted from 0, as in TAO's log. Durations are ``H:MM:SS.ffffff``; ``eta`` is
        the time that the remaining epochs will take.
        """
        per_epoch = time.perf_counter() - self._start.at
        durations = {
            "time_per_epoch": per_epoch,
            "time_per_step": (self._last - self._start.at) / max(self._steps, 1),
            "eta": (epochs - 1 - epoch) * per_epoch,
        }
        counts = {"epoch": epoch, "max_epoch": epochs - 1, "step": step, "max_step": epochs * steps_per_epoch}
        return {**counts, **{name: str(timedelta(seconds=seconds)) for name, seconds in durations.items()}}

    def _now(self) -> _Reading:
        return _Reading(time.perf_counter(), self._waited, self._images)

    def _since(self, mark: _Reading) -> dict[str, float]:
        now = self._now()
        elapsed = max(now.at - mark.at, 1e-9)
        images_per_s, waited = (now.images - mark.images) / elapsed, (now.waited - mark.waited) / elapsed
        return {"images_per_s": images_per_s, "data_wait": min(waited, 1.0)}


class EpochBar(Progress):
    """A progress bar for one epoch, with loss, learning rate, images/s and the fraction of time waiting for data.

    ``done`` of ``total`` batches were finished before the run was resumed. Nothing is drawn if there is no terminal.
    """

    def __init__(self, title: str, total: int, done: int, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._epoch = self.add_task(title, total=total, completed=done, numbers="")

    def show(self, batches: int, loss: float | None, lr: float, pace: dict[str, float]) -> None:
        """Advance by ``batches``, and show the latest numbers; ``loss`` is None if it is not known yet."""
        known = "" if loss is None else f"loss {loss:.4f}  "
        numbers = f"{known}lr {lr:.2e}  {pace['images_per_s']:.0f} images/s  data wait {pace['data_wait']:.0%}"
        self.update(self._epoch, advance=batches, numbers=numbers)
