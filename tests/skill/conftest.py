"""Three classes of small images in the folders of SKILL.md: ``photos``, ``labelled/train`` and ``labelled/val``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from tests.helpers.images import write_classes


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use no file of the user, no Weights & Biases and no GPU."""
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENMAE_JOBS", str(tmp_path / "jobs"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder of SKILL.md's commands."""
    write_classes(tmp_path / "labelled", {"train": 8, "val": 4})
    (tmp_path / "photos").mkdir()
    for path in (tmp_path / "labelled" / "train").rglob("*.png"):
        shutil.copy(path, tmp_path / "photos" / f"{path.parent.name}{path.name}")
    monkeypatch.chdir(tmp_path)
    return tmp_path
