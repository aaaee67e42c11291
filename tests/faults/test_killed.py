"""Trainings that are killed, in whole or in part."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

from tests.helpers.fault_runs import Server, assert_same_end, last_status, newest, until

from openmae.checkpoints.folder import list_checkpoints
from openmae.checkpoints.format import read_training_state

KILLS = 30
TWICE = 12
EVERY_STEP = {"train.checkpoint_interval_unit": "step", "train.num_epochs": 8}


def test_a_run_killed_thirty_times_ends_as_one_that_was_not(server: Server, photos: Path, tmp_path: Path) -> None:
    """Killed at any moment: while it starts, trains, writes a checkpoint."""
    server.finish(tmp_path / "whole", photos, EVERY_STEP)
    draw, kills, folders = random.Random(7), 0, 0
    while kills < KILLS:
        folders += 1
        folder, step = tmp_path / f"killed {folders}", 0
        while True:
            training = server.start(folder, photos, EVERY_STEP)
            if kills < KILLS:
                _let_it_write(draw.choice((0, 1, 2, 3)), folder, training)
                time.sleep(draw.uniform(0, 0.5))
            if kills < KILLS and training.alive():
                training.kill(signal.SIGKILL)
            code = training.code()
            if code == 0:
                break
            assert code == -signal.SIGKILL, training.text
            kills += 1
            if list_checkpoints(folder):
                now = newest(folder)["progress"]["step"]
                assert now >= step, "a finished checkpoint was lost"
                step = now
        assert_same_end(tmp_path / "whole", folder)
        assert not list(folder.glob("*.unreadable")), "a killed run left half a checkpoint under its name"
        assert last_status(folder) == "SUCCESS"


def test_two_fsdp_processes_killed_while_they_write(server: Server, photos: Path, tmp_path: Path) -> None:
    changes = {**EVERY_STEP, "train.num_gpus": 2, "train.num_epochs": 4, "dataset.batch_size": 2}
    changes |= {"train.distributed_strategy": "fsdp"}
    server.finish(tmp_path / "whole", photos, changes)
    draw, folder, step = random.Random(3), tmp_path / "killed", 0
    for _ in range(2):
        training = server.start(folder, photos, changes)
        _let_it_write(draw.choice((1, 2, 3)), folder, training)
        time.sleep(draw.uniform(0, 0.05))
        for pid in (*_children(training.pid), training.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert training.code() == -signal.SIGKILL, training.text
        now = read_training_state(list_checkpoints(folder)[-1], lazily=True)["progress"]["step"]
        assert now > step, "a finished checkpoint was lost"
        step = now
    server.finish(folder, photos, changes)
    assert_same_end(tmp_path / "whole", folder)
    assert not list(folder.glob("*.unreadable")), "a killed run left half a checkpoint under its name"


def _let_it_write(count: int, folder: Path, training) -> None:
    """Return when the run has come so many checkpoints further, or has ended."""
    seen, deadline = set(list_checkpoints(folder)), time.monotonic() + 60
    fresh: set[Path] = set()
    while len(fresh) < count and training.alive():
        fresh |= set(list_checkpoints(folder)) - seen
        assert time.monotonic() < deadline, training.text
        time.sleep(0.005)


def test_a_killed_loader_ends_the_run_and_it_goes_on(server: Server, photos: Path, tmp_path: Path) -> None:
    folder, changes = tmp_path / "results", {"dataset.num_workers_per_gpu": 2, "train.num_epochs": 40}
    training = server.start(folder, photos, changes)
    until(lambda: list_checkpoints(folder), training, "the first checkpoint")
    for child in _children(training.pid):
        os.kill(child, signal.SIGKILL)
        break
    assert training.code() == 1, training.text
    assert "A worker that loads images was killed" in training.text
    assert "dataset.num_workers_per_gpu" in training.text
    assert "Traceback" not in training.text
    assert last_status(folder) == "FAILURE"
    done = newest(folder)["progress"]["epoch"]
    assert done >= 1
    short = {**changes, "train.num_epochs": 40, "train.stop_after_epoch": done + 1}
    server.finish(folder, photos, short)
    server.finish(tmp_path / "whole", photos, short)
    assert_same_end(tmp_path / "whole", folder)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_ctrl_c_twice_ends_at_once(server: Server, photos: Path, tmp_path: Path) -> None:
    """Whatever the second one breaks into; and the run goes on as if nothing had been."""
    changes = {**EVERY_STEP, "train.num_epochs": 60}
    draw, folder, stopped = random.Random(11), tmp_path / "results", 0
    for _ in range(TWICE):
        training = server.start(folder, photos, changes, program=True)
        _let_it_write(1, folder, training)
        for pause in (draw.uniform(0, 0.1), draw.uniform(0, 0.03)):
            time.sleep(pause)
            if training.alive():
                training.kill(signal.SIGINT)
        code = training.code()
        assert code in (0, 130), training.text
        assert "Traceback" not in training.text
        stopped += code == 130
    assert stopped >= TWICE - 2
    server.finish(folder, photos, {**changes, "train.stop_after_epoch": newest(folder)["progress"]["epoch"] + 1})
    assert not list(folder.glob("*.unreadable")), "a checkpoint was left half written"
