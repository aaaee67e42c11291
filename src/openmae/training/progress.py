"""What a running training shows and remembers of its own pace."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


class PaceMeter:
    """How fast images pass, and how much of the time the loop waited for them."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin an epoch: forget what was measured."""
        self._waited, self._images, self._steps = 0.0, 0, 0
        self._start = self._mark()
        self._lap = self._start
        self._last = self._start[0]  # when the newest step ended

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass the batches on, and measure the wait for each."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            yield batch

    def count(self, images: int) -> None:
        """Note that ``images`` more (of all ranks) went through a step."""
        self._images += images
        self._steps += 1
        self._last = time.perf_counter()

    def read(self) -> dict[str, float]:
        """``images_per_s``, and ``data_wait`` as a share of the time, since the epoch began."""
        return self._since(self._start)

    def lap(self) -> dict[str, float]:
        """The same since the last lap."""
        pace = self._since(self._lap)
        self._lap = self._mark()
        return pace

    def timing(self, epoch: int, epochs: int, step: int, steps_per_epoch: int) -> dict[str, int | str]:
        """Return the progress fields of TAO's status log, for an epoch that ends now with its validation.

        Args:
            epoch: counted from 0, as TAO does there; so is ``max_epoch``.
            epochs: of the run.
            step: updates of the weights so far.
            steps_per_epoch: updates of an epoch.

        Returns:
            Counts, and durations as ``H:MM:SS.ffffff``; ``eta`` is the time that the other epochs will take.
        """
        per_epoch = time.perf_counter() - self._start[0]
        durations = {
            "time_per_epoch": per_epoch,
            "time_per_step": (self._last - self._start[0]) / max(self._steps, 1),
            "eta": (epochs - 1 - epoch) * per_epoch,
        }
        counts = {"epoch": epoch, "max_epoch": epochs - 1, "step": step, "max_step": epochs * steps_per_epoch}
        return {**counts, **{name: str(timedelta(seconds=seconds)) for name, seconds in durations.items()}}

    def _mark(self) -> tuple[float, float, int]:
        return time.perf_counter(), self._waited, self._images

    def _since(self, mark: tuple[float, float, int]) -> dict[str, float]:
        now = self._mark()
        elapsed = max(now[0] - mark[0], 1e-9)
        return {"images_per_s": (now[2] - mark[2]) / elapsed, "data_wait": min((now[1] - mark[1]) / elapsed, 1.0)}


class EpochBar:
    """A progress bar for one epoch, with loss, learning rate, images/s and the share of time waiting for data.

    Args:
        title: in front of the bar.
        total: batches of the epoch.
        done: batches that an earlier run had done.
        console: where to draw; a console that is no terminal shows nothing.
    """

    def __init__(self, title: str, total: int, done: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=total, completed=done, numbers="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, batches: int, loss: float | None, lr: float, pace: dict[str, float]) -> None:
        """So many batches more; ``loss`` is the newest one that is known, if any is."""
        known = "" if loss is None else f"loss {loss:.4f}  "
        numbers = f"{known}lr {lr:.2e}  {pace['images_per_s']:.0f} images/s  data wait {pace['data_wait']:.0%}"
        self._progress.update(self._task, advance=batches, numbers=numbers)
