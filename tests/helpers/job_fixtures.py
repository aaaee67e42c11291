"""Fixtures for tests of jobs: a root, images, and short commands in place of actions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openmae.jobs import Client, Job
from tests.helpers.images import write_classes


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set one slot, no GPU, a short grace period, and no folder of this user."""
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENMAE_JOBS", str(tmp_path / "jobs"))
    monkeypatch.setenv("OPENMAE_JOB_SLOTS", "1")
    monkeypatch.setenv("OPENMAE_JOB_GRACE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``train`` and ``val``: three classes of four images each."""
    return write_classes(tmp_path_factory.mktemp("images"), {"train": 4, "val": 4})


@pytest.fixture
def run_code(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes jobs run a few lines of Python instead of an action."""

    def use(code: str) -> None:
        monkeypatch.setattr("openmae.jobs.prepare.command_of", lambda action, spec: [sys.executable, "-c", code])

    return use


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client("local", tmp_path / "jobs")


@pytest.fixture
def submit(client: Client, images: Path) -> Callable[..., Job]:
    """Return a function that submits a training job on the images."""

    def create(**arguments: Any) -> Job:
        overrides = {"dataset.train_data_sources": str(images / "train"), **arguments.pop("spec_overrides", {})}
        return client.create_job("train", spec_overrides=overrides, **{"automl_policy": "off", **arguments})

    return create
