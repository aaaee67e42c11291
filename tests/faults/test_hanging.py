"""One of several processes stops responding: it is named, and nothing is left running."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from tests.helpers.fault_runs import Server, Training, last_status, newest, until

from openmae.checkpoints.folder import list_checkpoints

PATIENCE = 8
LONG = {"train.num_gpus": 2, "train.num_epochs": 3000}
#: Seconds for the decision, and for processes that must be killed: see distributed/rendezvous.py.
MORE = 30

HANGING_DISK = """
import os, threading
_open = os.open
def _hanging(path, *arguments, **named):
    if str(path).endswith({image!r}) and os.path.exists({mark!r}):
        threading.Event().wait()
    return _open(path, *arguments, **named)
os.open = _hanging
"""


def _begin(server: Server, photos: Path, folder: Path, **variables: str) -> tuple[Training, list[int]]:
    environment = {"OPENMAE_ANSWER_SECONDS": str(PATIENCE), **variables}
    training = server.start(folder, photos, LONG, environment=environment)
    until(lambda: len(list_checkpoints(folder)) > 1, training, "the second checkpoint")
    return training, [pid for pid in _children(training.pid) if _is_worker(pid)]


def _children(pid: int) -> list[int]:
    """In the order in which they were started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_worker(pid: int) -> bool:
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _ends_with_an_error(training: Training, pids: list[int], folder: Path, since: float) -> str:
    assert training.code() == 1, training.text
    assert time.monotonic() - since < PATIENCE + MORE, "it ended too late"
    assert all(map(_is_gone, pids)), "processes are left running"
    assert "Traceback" not in training.text
    assert last_status(folder) == "FAILURE"
    assert "resumes from the newest checkpoint" in training.text
    assert newest(folder)["progress"]["step"] > 0
    return training.text


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_is_named_and_ended(server: Server, photos: Path, tmp_path: Path, rank: int) -> None:
    """Process 0 holds the store through which the others would learn who is late."""
    folder = tmp_path / "results"
    training, pids = _begin(server, photos, folder)
    assert len(pids) == 2, training.text
    os.kill(pids[rank], signal.SIGSTOP)
    since, before = time.monotonic(), newest(folder)["progress"]["step"]
    text = _ends_with_an_error(training, pids, folder, since)
    assert f"Process {rank} (node 0) has not responded for {PATIENCE} s." in text, text
    done = newest(folder)["progress"]
    assert done["step"] >= before, "a finished checkpoint was lost"
    if rank:
        server.finish(folder, photos, {**LONG, "train.stop_after_epoch": done["epoch"] + 1})
        assert newest(folder)["progress"]["epoch"] == done["epoch"] + 1
        assert last_status(folder) == "SUCCESS"


def test_a_process_whose_read_never_ends_is_named(server: Server, photos: Path, tmp_path: Path) -> None:
    """A disk that stops responding, played by an ``os.open`` that never returns for one image."""
    folder, hangs = tmp_path / "results", tmp_path / "hangs"
    (tmp_path / "sitecustomize.py").write_text(HANGING_DISK.format(image="cat/0.png", mark=str(hangs)))
    training, pids = _begin(server, photos, folder, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    hangs.touch()
    text = _ends_with_an_error(training, pids, folder, time.monotonic())
    assert re.search(rf"Process [01] \(node 0\) has not responded for {PATIENCE} s\.", text), text
