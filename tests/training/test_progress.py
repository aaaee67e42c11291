from __future__ import annotations

import io

import pytest
from rich.console import Console

from openmae.training import progress
from openmae.training.progress import EpochBar, PaceMeter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def slow_loader(clock, seconds):
    for second in seconds:
        clock.now += second
        yield second


def test_pace_and_data_wait(clock):
    pace = PaceMeter()
    for _ in pace.watch(slow_loader(clock, [1.0, 1.0])):
        clock.now += 3.0
        pace.count(16)
    assert pace.read() == {"images_per_s": 32 / 8, "data_wait": 2 / 8}


def test_a_lap_measures_since_the_last_one(clock):
    pace = PaceMeter()
    laps = []
    for wait in pace.watch(slow_loader(clock, [9.0, 1.0])):
        clock.now += 1.0
        pace.count(int(10 * wait))
        laps.append(pace.lap())
    assert laps == [{"images_per_s": 9.0, "data_wait": 0.9}, {"images_per_s": 5.0, "data_wait": 0.5}]
    assert pace.read() == {"images_per_s": 100 / 12, "data_wait": 10 / 12}


def test_restart_forgets_the_previous_epoch(clock):
    pace = PaceMeter()
    list(pace.watch(slow_loader(clock, [5.0])))
    pace.count(100)
    pace.restart()
    clock.now += 2.0
    pace.count(4)
    assert pace.read() == {"images_per_s": 2.0, "data_wait": 0.0}


def test_pace_without_elapsed_time(clock):
    assert PaceMeter().read() == {"images_per_s": 0.0, "data_wait": 0.0}


def drawn(terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=160, _environ={})
    with EpochBar("epoch 2/5", 8, 3, console) as bar:
        bar.show(2, 0.51234, 1.5e-4, {"images_per_s": 812.4, "data_wait": 0.07})
        bar.refresh()
    return text.getvalue()


def test_the_bar_shows_loss_rate_pace_and_wait():
    text = drawn(terminal=True)
    for part in ("epoch 2/5", "5/8", "loss 0.5123", "lr 1.50e-04", "812 images/s", "data wait 7%"):
        assert part in text


def test_there_is_no_bar_without_a_terminal():
    assert drawn(terminal=False).strip() == ""


def test_timing_has_the_fields_of_tao(monkeypatch):
    """Epoch 3 of 5 of two steps a second each, and half a second of validation."""
    clock = iter([0.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr("openmae.training.progress.time.perf_counter", lambda: next(clock))
    pace = PaceMeter()
    for _ in range(2):
        pace.count(16)
    assert pace.timing(2, 5, 6, 2) == {
        "epoch": 2,
        "max_epoch": 4,
        "step": 6,
        "max_step": 10,
        "time_per_epoch": "0:00:02.500000",
        "time_per_step": "0:00:01",
        "eta": "0:00:05",
    }
