"""Throughput of a training run, and its progress on the terminal or in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import NamedTuple, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.table import Column
from rich.text import Text

from openmae.results.trials import duration

T = TypeVar("T")

LINE_SECONDS = 30.0  # between two lines of the log without a terminal

log = logging.getLogger("openmae")


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


class RunBar(Progress):
    """The progress of a run: a bar with a line of numbers on a terminal, or a line of the log every ``LINE_SECONDS``.

    Args:
        total: batches of the run; ``done`` of them were finished before it was resumed.
        seconds: returns how long the run has taken so far, with its earlier parts.
        quiet: log no lines, because another process does.
    """

    def __init__(
        self, total: int, done: int, seconds: Callable[[], float], console: Console, *, quiet: bool = False
    ) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            _TimeColumn(self._times),
        )
        self._numbers = ""
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._lines = not (quiet or console.is_terminal)
        self._seconds, self._total, self._done = seconds, total, done
        self._first: tuple[float, int] | None = None  # time and batches after the first step, which may compile
        self._line_at = time.perf_counter()
        self._left: float | None = None
        self._run = self.add_task("", total=total, completed=done)

    def show(self, where: str, step: int, batches: int, loss: float | None, pace: Mapping[str, float]) -> None:
        """Advance by ``batches``, and show the latest numbers; ``loss`` is None if it is not known yet.

        ``where`` is the epoch in words, ``step`` the number of the step.
        """
        now = time.perf_counter()
        self._done += batches
        if self._first is None:
            self._first = now, self._done
        elif self._done > self._first[1]:
            self._left = (self._total - self._done) * (now - self._first[0]) / (self._done - self._first[1])
        known = "" if loss is None else f"loss {loss:.4f}  "
        self._numbers = f"{known}{pace['images_per_s']:.0f} images/s  data wait {pace['data_wait']:.0%}"
        self.update(self._run, description=where, completed=self._done)
        if self._lines and now - self._line_at >= LINE_SECONDS:
            self._line_at = now
            log.info("Step %d, in %s: %s  %s", step, where, self._numbers, self._times())

    def get_renderables(self) -> Iterator[RenderableType]:
        """Return the bar and the line of numbers."""
        yield from super().get_renderables()
        yield Text(self._numbers, no_wrap=True, overflow="ellipsis")

    def _times(self) -> str:
        left = "-:--:--" if self._left is None else duration(self._left)
        return f"{duration(self._seconds())} elapsed  {left} left"


class _TimeColumn(ProgressColumn):
    max_refresh = 0.5

    def __init__(self, text: Callable[[], str]) -> None:
        super().__init__(Column(no_wrap=True))
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(self._text())
