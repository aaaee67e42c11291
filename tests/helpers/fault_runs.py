"""Training runs in processes that may be killed, and their results folders."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openmae.checkpoints.folder import list_checkpoints
from openmae.results.status import read_status
from tests.helpers.training import TINY

LIMIT = 120.0  # seconds until something hangs
_SETTINGS = {**TINY, "train.num_epochs": 3, "train.keep_checkpoints": 2}
#: Half of such a run's time, and tested elsewhere.
PLAIN = {"openmae.actions.sections:PICTURES": 1}


def draw_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """Noise, in two classes."""
    noise = np.random.default_rng(seed)
    for number in range(count):
        path = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return folder


@dataclass
class Training:
    """One process of ``mae train``."""

    server: Server
    pid: int
    log: Path

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def alive(self) -> bool:
        return not self.server.readable(0)

    def code(self) -> int:
        """Its exit code; a run that hangs fails the test."""
        if not self.server.readable(LIMIT):
            os.kill(self.pid, 9)
            pytest.fail(f"the run hangs:\n{self.text}")
        return self.server.answer()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass
class Server:
    """See ``fork_server.py``."""

    folder: Path
    process: subprocess.Popen[bytes]
    runs: int = 0

    def readable(self, seconds: float) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def start(
        self, results: Path | str, source: Path, changes: Mapping[str, Any] | None = None, **more: Any
    ) -> Training:
        """A training; ``more`` goes to the fork server."""
        values = {
            **_SETTINGS,
            "dataset.train_data_sources": source,
            "train.results_dir": results,
            **(changes or {}),
        }
        self.runs += 1
        log = self.folder / f"{self.runs}.log"
        argv = ["train", *(f"{key}={value}" for key, value in values.items())]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"argv": argv, "log": str(log), "patch": PLAIN, **more}).encode() + b"\n")
        self.process.stdin.flush()
        return Training(self, self.answer(), log)

    def finish(self, *arguments: Any, **more: Any) -> Training:
        """A training that comes to its end."""
        training = self.start(*arguments, **more)
        assert training.code() == 0, training.text
        return training


def until(ready: Callable[[], Any], training: Training, what: str) -> Any:
    """Wait for a true value while a training runs, and return it."""
    deadline = time.monotonic() + LIMIT
    while not (value := ready()):
        assert training.alive(), f"the run ended before {what}:\n{training.text}"
        assert time.monotonic() < deadline, f"{what} did not happen within {LIMIT:g} s"
        time.sleep(0.01)
    return value


def epochs_done(folder: Path) -> int:
    """As the status tells them."""
    path = folder / "status.json"
    return sum(entry["status"] == "RUNNING" for entry in read_status(path)) if path.exists() else 0


def last_status(folder: Path) -> str:
    return read_status(folder / "status.json")[-1]["status"]


def newest(folder: Path) -> dict[str, Any]:
    """The newest checkpoint's content."""
    return torch.load(list_checkpoints(folder)[-1], weights_only=True)


def assert_same(one: Any, other: Any, where: str = "checkpoint") -> None:
    """The same to the last bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}.{number}")
    else:
        assert one == other, where


def assert_same_end(one: Path, other: Path) -> None:
    """Two folders' trainings ended with the same weights, moments and place."""
    first, second = newest(one), newest(other)
    for payload in (first, second):
        del payload["progress"]["seconds"]
    for part in ("state_dict", "optimizer", "progress"):
        assert_same(first[part], second[part], part)
