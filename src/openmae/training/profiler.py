"""What the time of a run goes to, without a gap: every moment between two marks belongs to one phase."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch

WARMUP_STEPS = 3  # they allocate, choose kernels and fill caches

#: Phases that each update goes through, in this order; ``other`` is drawing, logging and what else lies between.
STEP_PHASES = ("data wait", "host to device", "forward", "backward", "optimizer", "other")
#: Phases between updates.
PAUSES = ("validation", "checkpoints")


class _Stamp(Protocol):
    """A moment."""

    def reached(self) -> bool:
        """Whether it has come."""

    def since(self, other: Self) -> float:
        """Seconds from ``other`` to it, once it has come."""


class _HostStamp:
    """Now, on the host's clock."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def reached(self) -> bool:
        return True

    def since(self, other: _HostStamp) -> float:
        return self._at - other._at


class _CudaStamp:
    """When the GPU gets here in its queue: nobody waits for it, and it costs the GPU next to nothing."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def reached(self) -> bool:
        return self._event.query()

    def since(self, other: _CudaStamp) -> float:
        return other._event.elapsed_time(self._event) / 1000


class _Mark(NamedTuple):
    stamp: _Stamp
    phase: str
    ends_step: bool


@dataclass(frozen=True)
class Measured:
    """What a clock has measured since the warm-up.

    Attributes:
        seconds: of each phase, in all.
        per_step: of each phase of an update, an entry an update, in seconds.
    """

    seconds: Mapping[str, float]
    per_step: Mapping[str, array[float]]

    @property
    def steps(self) -> int:
        """Updates measured."""
        return len(self.per_step[STEP_PHASES[0]])


class StepClock:
    """Gives each moment of a run to the phase that ended with it.

    On a GPU the marks are events in its queue, so the phases are the GPU's: what the host does while the GPU is busy
    takes no time, and a wait for data is the time in which the GPU has nothing to do because of it. Nothing is
    synchronised, and a step runs as it does without the clock.

    Args:
        device: that the run computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._stamp = _CudaStamp if device.type == "cuda" else _HostStamp
        self._marks: deque[_Mark] = deque()
        self._steps_seen = 0
        self._seconds = dict.fromkeys((*STEP_PHASES, *PAUSES), 0.0)
        self._this_step = dict.fromkeys(STEP_PHASES, 0.0)
        self._per_step = {phase: array("d") for phase in STEP_PHASES}
        self.mark("other")

    def mark(self, phase: str, *, ends_step: bool = False) -> None:
        """The time since the mark before was spent on ``phase``."""
        self._marks.append(_Mark(self._stamp(), phase, ends_step))
        while len(self._marks) > 1 and self._marks[1].stamp.reached():
            self._count()

    def read(self) -> Measured:
        """All since the warm-up, up to the last mark."""
        if self._marks and not self._marks[-1].stamp.reached():
            torch.cuda.synchronize()
        while len(self._marks) > 1:
            self._count()
        return Measured(dict(self._seconds), dict(self._per_step))

    def _count(self) -> None:
        before, now = self._marks.popleft(), self._marks[0]
        seconds = now.stamp.since(before.stamp)  # type: ignore[arg-type]
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
