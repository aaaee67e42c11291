"""Profile a training run: attribute the time between two marks to a phase, without gaps."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

WARMUP_STEPS = 3  # the first steps allocate memory, choose kernels and fill caches

#: Phases of each step, in order; ``other`` is seeding, logging and everything else.
STEP_PHASES = ("data wait", "host to device", "forward", "backward", "optimizer", "other")
#: Phases between steps.
PAUSES = ("validation", "checkpoints")


class _Stamp:
    """A timestamp: on a GPU, an event in its queue, which is recorded without waiting for it."""

    def __init__(self, on_gpu: bool) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if on_gpu else None
        self._host = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def reached(self) -> bool:
        return self._event is None or self._event.query()

    def since(self, other: _Stamp) -> float:
        """Return the seconds since ``other``; both must have been reached."""
        if self._event is None or other._event is None:
            return self._host - other._host
        return other._event.elapsed_time(self._event) / 1000


class _Mark(NamedTuple):
    stamp: _Stamp
    phase: str
    ends_step: bool


@dataclass(frozen=True)
class Measured:
    """The times measured since the warmup: total seconds of each phase, and seconds per step of ``STEP_PHASES``."""

    seconds: Mapping[str, float]
    per_step: Mapping[str, array[float]]

    @property
    def steps(self) -> int:
        """Number of steps measured."""
        return len(self.per_step[STEP_PHASES[0]])


class StepClock:
    """Measures the time of each phase of a run.

    On a GPU the marks are events in its queue, so the times are those of the GPU: work that the host does while the GPU
    is busy takes no time, and ``data wait`` is the time in which the GPU is idle because data is missing. Marking does
    not synchronise and does not slow down the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: deque[_Mark] = deque()
        self._steps_seen = 0
        self._seconds = dict.fromkeys((*STEP_PHASES, *PAUSES), 0.0)
        self._this_step = dict.fromkeys(STEP_PHASES, 0.0)
        self._per_step = {phase: array("d") for phase in STEP_PHASES}
        self.mark("other")

    def mark(self, phase: str, *, ends_step: bool = False) -> None:
        """Attribute the time since the previous mark to ``phase``."""
        self._marks.append(_Mark(_Stamp(self._on_gpu), phase, ends_step))
        while len(self._marks) > 1 and self._marks[1].stamp.reached():
            self._count()

    def read(self) -> Measured:
        """Wait for the GPU, and return the times between the warmup and the last mark."""
        if self._marks and not self._marks[-1].stamp.reached():
            torch.cuda.synchronize()
        while len(self._marks) > 1:
            self._count()
        return Measured(dict(self._seconds), dict(self._per_step))

    def _count(self) -> None:
        before, now = self._marks.popleft(), self._marks[0]
        seconds = now.stamp.since(before.stamp)
        warm = self._steps_seen >= WARMUP_STEPS
        if warm:
            self._seconds[now.phase] += seconds
        if now.phase in self._this_step:
            self._this_step[now.phase] += seconds
        if now.ends_step:
            if warm:
                for phase, values in self._per_step.items():
                    values.append(self._this_step[phase])
            self._this_step = dict.fromkeys(STEP_PHASES, 0.0)
            self._steps_seen += 1
