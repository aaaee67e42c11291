"""A profile of a run without gaps: every moment between two marks belongs to one phase."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

WARMUP_STEPS = 3  # they allocate memory, choose kernels and fill caches

#: Phases of each step, in order; ``other`` is seeding, logging and what else is between.
STEP_PHASES = ("data wait", "host to device", "forward", "backward", "optimizer", "other")
#: Phases between steps.
PAUSES = ("validation", "checkpoints")


class _Stamp:
    """The current time of the host, or the time at which the GPU gets here in its queue; this does not wait for it."""

    def __init__(self, on_gpu: bool) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if on_gpu else None
        self._host = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def reached(self) -> bool:
        return self._event is None or self._event.query()

    def since(self, other: _Stamp) -> float:
        """Return the seconds from ``other`` to this, once it is reached."""
        if self._event is None or other._event is None:
            return self._host - other._host
        return other._event.elapsed_time(self._event) / 1000


class _Mark(NamedTuple):
    stamp: _Stamp
    phase: str
    ends_step: bool


@dataclass(frozen=True)
class Measured:
    """The times measured since the warmup.

    Attributes:
        seconds: total of each phase.
        per_step: seconds of each phase of a step, one entry per step.
    """

    seconds: Mapping[str, float]
    per_step: Mapping[str, array[float]]

    @property
    def steps(self) -> int:
        """Number of steps measured."""
        return len(self.per_step[STEP_PHASES[0]])


class StepClock:
    """Attributes each moment of a run to the phase that ended with it.

    On a GPU the marks are events in its queue, so the phases are the GPU's: work of the host while the GPU is busy
    takes no time, and a wait for data is the time in which the GPU has nothing to do because of it. Nothing is
    synchronised, and a step is as fast as without the clock.

    Args:
        device: of the run.
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
        """Return the times from the warmup to the last mark; waits for the GPU."""
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
