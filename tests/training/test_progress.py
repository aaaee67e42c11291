from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from openmae.checkpoints.folder import CheckpointFolder
from openmae.results.status import StatusLog, read_status
from openmae.training import progress
from openmae.training.progress import PaceMeter, RunBar
from openmae.training.state import Outputs


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


PACE = {"images_per_s": 812.4, "data_wait": 0.07}


def run_bar(terminal: bool, quiet: bool = False, width: int = 80) -> tuple[RunBar, io.StringIO]:
    """A run of 40 batches, 10 of which were finished before it was resumed, and what is drawn."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, _environ={})
    return RunBar(40, 10, lambda: 3723.0, console, quiet=quiet), text


def test_the_bar_shows_the_complete_run_in_80_columns():
    bar, text = run_bar(terminal=True)
    with bar:
        bar.show("epoch 2 of 5", 6, 2, 0.51234, PACE)
        bar.refresh()
    for part in ("epoch 2 of 5", " 30%", "1:02:03 elapsed", "loss 0.5123  812 images/s  data wait 7%"):
        assert part in text.getvalue(), part


def test_the_time_left_is_that_of_all_batches_and_ignores_the_first_step(clock):
    bar, text = run_bar(terminal=True)
    with bar:
        clock.now += 500.0  # the first step compiles
        bar.show("epoch 2 of 5", 6, 2, None, PACE)
        bar.refresh()
        assert "-:--:-- left" in text.getvalue()
        clock.now += 10.0
        bar.show("epoch 2 of 5", 7, 4, 0.5, PACE)  # 24 batches are left, at 2.5 s
        bar.refresh()
    assert "0:01:00 left" in text.getvalue()


def test_without_a_terminal_a_line_is_logged_now_and_then(clock, caplog):
    bar, text = run_bar(terminal=False)
    with caplog.at_level(logging.INFO, "openmae"), bar:
        for step in range(1, 9):
            clock.now += 10.0
            bar.show("epoch 2 of 5", step, 2, 0.51234, PACE)
    assert text.getvalue().strip() == "", "a bar without a terminal"
    assert caplog.messages == [
        "Step 3, in epoch 2 of 5: loss 0.5123  812 images/s  data wait 7%  1:02:03 elapsed  0:02:00 left",
        "Step 6, in epoch 2 of 5: loss 0.5123  812 images/s  data wait 7%  1:02:03 elapsed  0:01:30 left",
    ]


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (False, True)])
def test_no_lines_are_logged_on_a_terminal_or_by_another_process(terminal, quiet, monkeypatch, caplog):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    bar, _ = run_bar(terminal, quiet)
    with caplog.at_level(logging.INFO, "openmae"), bar:
        bar.show("epoch 2 of 5", 1, 2, 0.5, PACE)
    assert not caplog.messages


def test_of_short_epochs_the_first_the_last_and_some_are_logged(tmp_path, monkeypatch, caplog):
    clock = iter([0.0, 1.0, 2.0, 3.5, 4.0, 5.0])
    monkeypatch.setattr("openmae.training.state.time.monotonic", lambda: next(clock))
    outputs = Outputs(CheckpointFolder(tmp_path, "vit_tiny_patch16", 1), {}, status=StatusLog(tmp_path, append=False))
    with caplog.at_level(logging.INFO, "openmae"):
        for epoch in range(6):
            outputs.report(epoch, 6, epoch + 1, {"train_loss": 0.5}, {}, last=epoch == 5)
    shown = [f"Epoch {epoch} of 6, step {epoch}: train_loss 0.5000" for epoch in (1, 4, 6)]
    assert caplog.messages == shown
    assert len(read_status(tmp_path / "status.json")) == 6, "status.json has all epochs"


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
