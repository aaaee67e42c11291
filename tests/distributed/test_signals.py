"""Ctrl-C and preemption: in this process, in one on a terminal, and in several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from openmae.distributed.signals import PREEMPTION, InterruptRelay, InterruptWatch, PreemptionWatch
from openmae.distributed.watchdog import Watchdog
from openmae.errors import Preempted
from openmae.results.status import read_status

LIMIT = 120  # seconds until something hangs
EPOCHS = {"train.num_epochs": 12, "train.checkpoint_interval": 12, "dataset.val_data_sources": None}


def test_the_first_ctrl_c_asks_to_stop_and_the_second_stops_at_once(caplog):
    watch = InterruptWatch()
    with watch:
        signal.raise_signal(signal.SIGINT)
        assert watch.reason is KeyboardInterrupt
        assert "writing a checkpoint after this step. Press Ctrl-C again to stop at once." in caplog.text
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_batches_end_when_any_process_is_asked_to_stop():
    watch, watchdog = InterruptWatch(), Watchdog()
    assert list(watch.until_asked(range(3), watchdog)) == [0, 1, 2]
    watchdog.someone_stopping = True
    assert list(watch.until_asked(range(3), watchdog)) == [], "another one was asked"
    watchdog.someone_stopping = False
    with watch:
        batches = watch.until_asked(range(3), watchdog)
        assert next(batches) == 0
        signal.raise_signal(signal.SIGTERM)
        assert list(batches) == []
    assert watchdog.stopping, "the others are to know"


@pytest.mark.parametrize("number", PREEMPTION)
def test_repeated_preemption_signals_do_not_stop_at_once(number, caplog):
    watch = InterruptWatch()
    with watch:
        for _ in range(3):
            signal.raise_signal(number)
        assert watch.reason is Preempted
        assert caplog.messages == [f"{number.name}: writing a checkpoint after this step."]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_sigterm_after_ctrl_c_stops_at_once():
    watch = InterruptWatch()
    with watch:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGTERM)
    assert not issubclass(caught.type, Preempted), "who canceled a run does not want it back"


def test_a_preemption_outside_the_loop_ends_the_run_once():
    with PreemptionWatch():
        with pytest.raises(Preempted):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # while the run ends


def test_a_second_preemption_signal_after_the_loop_is_ignored():
    with PreemptionWatch():
        with InterruptWatch():
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)  # while the checkpoint is uploaded


@pytest.mark.parametrize("guard", [InterruptWatch, PreemptionWatch, InterruptRelay])
def test_handlers_are_restored(guard):
    before = [signal.getsignal(number) for number in guard.signals]
    with guard():
        assert all(signal.getsignal(number) not in before for number in guard.signals)
    assert [signal.getsignal(number) for number in guard.signals] == before


def test_the_relay_forwards_signals(monkeypatch):
    class Child:
        pid = 12345

    sent = []
    monkeypatch.setattr("multiprocessing.active_children", lambda: [Child()])
    monkeypatch.setattr("os.kill", lambda *what: sent.append(what))
    relay = InterruptRelay()
    with relay:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGINT)
    assert relay.reason is Preempted
    assert sent == [(12345, signal.SIGUSR1), (12345, signal.SIGINT)]


def wait_for(what: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + LIMIT
    while not what():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def start(overrides: list[str]) -> subprocess.Popen:
    """``mae train`` at the head of a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "openmae", "train", *overrides],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def first_epoch_done(folder: Path) -> Callable[[], bool]:
    path = folder / "status.json"
    return lambda: path.exists() and any(entry["status"] == "RUNNING" for entry in read_status(path))


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, EPOCHS)
    return folder


@pytest.mark.integration
@pytest.mark.xdist_group("several processes")
@pytest.mark.parametrize(
    ("number", "code", "said", "status"),
    [
        pytest.param(
            signal.SIGINT, 130, "Interrupted: writing a checkpoint after this step.", "train was interrupted",
            marks=pytest.mark.slow,
        ),
        (signal.SIGTERM, 75, "SIGTERM: writing a checkpoint after this step.", "train was preempted"),
        pytest.param(
            signal.SIGUSR1, 75, "SIGUSR1: writing a checkpoint after this step.", "train was preempted",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_run_resumes_after_a_signal(
    number, code, said, status, uninterrupted, train, tiny_overrides, assert_same_run, payload_of, tmp_path
):
    """A terminal and SLURM signal every process of the group, including the loader's workers."""
    process = start(tiny_overrides(tmp_path, {**EPOCHS, "dataset.num_workers_per_gpu": 2}))
    wait_for(first_epoch_done(tmp_path), process)
    os.killpg(process.pid, number)
    _, text = process.communicate(timeout=LIMIT)
    assert process.returncode == code, text
    assert said in text
    assert ("Preempted: the same command resumes from here." in text) == (code == 75)
    assert "Traceback" not in text
    assert 0 < payload_of(tmp_path)["progress"]["step"] < 60
    assert read_status(tmp_path / "status.json")[-1]["message"] == status
    train(tmp_path, EPOCHS)
    assert_same_run(uninterrupted, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whom", "code"),
    [(signal.SIGINT, "group", 130), (signal.SIGINT, "parent", 130), (signal.SIGTERM, "group", 75)],
)
def test_a_signal_stops_two_processes_once(number, whom, code, tiny_overrides, payload_of, tmp_path):
    changes = {**EPOCHS, "train.num_gpus": 2, "train.gpu_ids": "[0,1]", "dataset.batch_size": 2}
    process = start(tiny_overrides(tmp_path, {**changes, "train.num_epochs": 100}))
    wait_for(first_epoch_done(tmp_path), process)
    send = os.killpg if whom == "group" else os.kill
    send(process.pid, number)
    _, text = process.communicate(timeout=LIMIT)
    assert process.returncode == code, text
    assert "Traceback" not in text
    assert text.count("writing a checkpoint after this step.") == 1
    assert 0 < payload_of(tmp_path)["progress"]["step"] < 500
