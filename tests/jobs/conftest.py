"""A root of jobs, pictures, and commands that end at once in place of actions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openmae.jobs import Client, Job


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot, no GPU, a short grace, and nothing of this user's."""
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENMAE_JOBS", str(tmp_path / "jobs"))
    monkeypatch.setenv("OPENMAE_JOB_SLOTS", "1")
    monkeypatch.setenv("OPENMAE_JOB_GRACE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` and ``val``: three classes of four pictures each."""
    root = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for part in ("train", "val"):
        for number, name in enumerate(("blue", "green", "red")):
            (root / part / name).mkdir(parents=True)
            for index in range(4):
                pixels = noise.integers(0, 60, (40, 48, 3), dtype=np.uint8)
                pixels[..., number] += 180
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let jobs run a few lines of Python instead of an action."""

    def use(code: str) -> None:
        monkeypatch.setattr("openmae.jobs.client.command_of", lambda action, spec: [sys.executable, "-c", code])

    return use


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client("local", tmp_path / "jobs")


@pytest.fixture
def submit(client: Client, pictures: Path) -> Callable[..., Job]:
    """Submit a training on the pictures."""

    def create(**arguments: Any) -> Job:
        overrides = {"dataset.train_data_sources": str(pictures / "train"), **arguments.pop("spec_overrides", {})}
        return client.create_job("train", spec_overrides=overrides, **{"automl_policy": "off", **arguments})

    return create
