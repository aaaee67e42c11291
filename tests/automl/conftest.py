"""Fixtures of search tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy
from PIL import Image


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
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for part in ("train", "val"):
        for number, name in enumerate(("blue", "green")):
            (root / part / name).mkdir(parents=True)
            for index in range(5):
                pixels = noise.integers(0, 60, (40, 48, 3), dtype=np.uint8)
                pixels[..., number] += 180
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root
