"""Three classes of small pictures, as SKILL.md supposes them: ``photos``, ``labelled/train`` and ``labelled/val``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this user's: no cache, no jobs, no Weights & Biases, no GPU."""
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENMAE_JOBS", str(tmp_path / "jobs"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of SKILL.md's commands."""
    noise = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for channel, name in enumerate(("blue", "green", "red")):
            for number in range(count):
                pixels = noise.integers(0, 60, (40, 48, 3), dtype=np.uint8)
                pixels[..., channel] += 180
                paths = [tmp_path / "labelled" / part / name / f"{number}.png"]
                paths += [tmp_path / "photos" / f"{name}{number}.png"] if part == "train" else []
                for path in paths:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
