"""Fixtures of search tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from tests.helpers.images import write_classes


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use no GPU and no file of the user, and do not wait between two polls of a simulated job."""
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENMAE_JOB_GRACE", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("openmae.automl.worker._POLL", 0.0)


@sqlalchemy.event.listens_for(sqlalchemy.Engine, "connect")
def _hasten(connection: Any, _: Any) -> None:
    """Do not wait for the disk at each write; no test simulates a power failure."""
    if type(connection).__module__ == "sqlite3":
        connection.execute("PRAGMA synchronous = OFF")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``train`` and ``val``: two classes of five images each."""
    return write_classes(tmp_path_factory.mktemp("images"), {"train": 5, "val": 5}, ("blue", "green"))
