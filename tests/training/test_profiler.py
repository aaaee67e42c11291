"""Time is attributed to the phase that ended with it, from the end of the warmup on."""

from __future__ import annotations

import pytest
import torch

from openmae.training import profiler
from openmae.training.profiler import STEP_PHASES, WARMUP_STEPS, StepClock

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def at(monkeypatch):
    """``at(t)``: the time is t seconds."""
    now = [0.0]
    monkeypatch.setattr(profiler.time, "perf_counter", lambda: now[0])
    return lambda t: now.__setitem__(0, t)


def step(clock: StepClock, at, start: float, wait: float, forward: float) -> float:
    for phase, seconds in (("data wait", wait), ("forward", forward)):
        start += seconds
        at(start)
        clock.mark(phase)
    clock.mark("other", ends_step=True)
    return start


def test_every_moment_after_the_warmup_belongs_to_a_phase(at):
    clock, now = StepClock(CPU), 0.0
    for _ in range(WARMUP_STEPS):
        now = step(clock, at, now, 10.0, 10.0)
    assert clock.read().steps == 0
    for wait in (1.0, 2.0, 6.0):
        now = step(clock, at, now, wait, 4.0)
    at(now + 0.5)
    clock.mark("validation")
    measured = clock.read()
    assert measured.steps == 3
    assert measured.seconds["data wait"] == pytest.approx(9.0)
    assert measured.seconds["forward"] == pytest.approx(12.0)
    assert measured.seconds["validation"] == pytest.approx(0.5)
    assert sum(measured.seconds.values()) == pytest.approx(21.5)
    assert list(measured.per_step["data wait"]) == pytest.approx([1.0, 2.0, 6.0])
    assert measured.per_step.keys() == set(STEP_PHASES)


def test_the_batches_of_a_step_are_added_up(at):
    clock = StepClock(CPU)
    for number in range(WARMUP_STEPS + 1):
        for part in range(3):
            at(10 * number + part + 1)
            clock.mark("forward")
        clock.mark("other", ends_step=True)
        at(10 * number + 10)
        clock.mark("checkpoints")
    assert list(clock.read().per_step["forward"]) == pytest.approx([3.0])


class FakeQueue:
    """A simulated queue of a GPU: an event is reached when the GPU has worked up to it."""

    def __init__(self) -> None:
        self.gpu = 0.0
        self.waits = 0

    def event(self, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self) -> None:
        self.waits += 1
        self.gpu = float("inf")


class FakeEvent:
    """A simulated ``torch.cuda.Event``."""

    ends = iter(())

    def __init__(self, queue: FakeQueue) -> None:
        self.queue = queue

    def record(self) -> None:
        self.when = next(FakeEvent.ends)

    def query(self) -> bool:
        return self.queue.gpu >= self.when

    def elapsed_time(self, other: FakeEvent) -> float:
        assert other.query()
        assert self.query()
        return 1000 * (other.when - self.when)


def test_marks_do_not_wait_for_the_gpu(monkeypatch):
    queue = FakeQueue()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(torch.cuda, "synchronize", queue.synchronize)
    monkeypatch.setattr(FakeEvent, "ends", iter(float(n) for n in range(100)))
    clock = StepClock(GPU)
    for number in range(WARMUP_STEPS + 2):
        clock.mark("forward")
        clock.mark("other", ends_step=True)
        queue.gpu = 2.0 * number  # two marks a step: it lags behind
    assert queue.waits == 0
    assert len(clock._marks) < 6, "what was reached is not kept"
    measured = clock.read()
    assert queue.waits == 1
    assert list(measured.per_step["forward"]) == pytest.approx([1.0, 1.0])
    assert measured.seconds["other"] == pytest.approx(2.0)
