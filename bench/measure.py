"""Times of calls, measured alternately under the same conditions."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Times of one contestant.

    Attributes:
        seconds: of one call; one value a turn, the mean of the calls in it.
        items: that a call works through, such as images.
    """

    seconds: tuple[float, ...]
    items: int

    @property
    def rate(self) -> float:
        """Items per second, at the median."""
        return self.items / statistics.median(self.seconds)

    @property
    def slowest(self) -> float:
        """Items per second."""
        return self.items / max(self.seconds)

    @property
    def fastest(self) -> float:
        """Items per second."""
        return self.items / min(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """Times of contestants that were run alternately.

    Attributes:
        timings: by contestant, in the order of running.
        reference: the contestant that the others are measured by.
        threads: that torch had, and that contestants were to use.
        load: ``load_average()`` before the first call.
    """

    timings: dict[str, Timing]
    reference: str
    threads: int
    load: float | None

    def ratio(self, name: str, reference: str | None = None) -> float:
        """Return the speed relative to the reference (or another contestant), from the medians."""
        return self.timings[name].rate / self.timings[reference or self.reference].rate

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        contestants = {
            name: {
                "per_second": {"median": timing.rate, "min": timing.slowest, "max": timing.fastest},
                "ratio": self.ratio(name),
                "seconds": list(timing.seconds),
                "items": timing.items,
            }
            for name, timing in self.timings.items()
        }
        return {"reference": self.reference, "threads": self.threads, "load": self.load, "contestants": contestants}


def compare(
    contestants: Mapping[str, Callable[[], object]],
    *,
    items: int,
    turns: int,
    warm_up: int = 3,
    turn_seconds: float = 0.2,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Time contestants alternately (A B C A B C ...), so that a machine that slows down slows all of them.

    A turn begins with a call that is not timed: it brings weights back into the caches, and outlasts the threads of
    the contestant before, which wait for more work in a busy loop. Contestants run on ``torch.get_num_threads()``
    threads.

    Args:
        contestants: what to call, by name; the first is the reference.
        items: that a call works through.
        turns: of each contestant.
        warm_up: calls of each before the first turn; at least 1, since the last tells how many make a turn.
        turn_seconds: that a turn's timed calls should last together; at least one is made.
        clock: seconds.
    """
    load, calls = load_average(), {}
    for name, call in contestants.items():
        once = [_time(call, 1, clock) for _ in range(warm_up)][-1]
        calls[name] = max(1, round(turn_seconds / once))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, call in contestants.items():
            call()
            seconds[name].append(_time(call, calls[name], clock))
    timings = {name: Timing(tuple(values), items) for name, values in seconds.items()}
    return Comparison(timings, next(iter(contestants)), torch.get_num_threads(), load)


def load_average() -> float | None:
    """Processes that wanted a core in the last minute, this one included; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _time(call: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    """Seconds of one of ``count`` calls."""
    start = clock()
    for _ in range(count):
        call()
    return (clock() - start) / count
