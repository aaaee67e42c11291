from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openmae.data.index import ImageIndex, index_folder

MakeImages = Callable[[Path, Sequence[str]], Path]


@pytest.fixture
def make_images() -> MakeImages:
    """Write a different small image, gradient and noise, under every relative name."""

    def make(folder: Path, names: Sequence[str]) -> Path:
        for number, name in enumerate(names):
            rng = np.random.default_rng(number)
            rows, columns = np.mgrid[0:40, 0:48]
            base = np.stack([rows * 5, columns * 5, rows + columns * 2], axis=-1)
            pixels = np.clip(base + rng.integers(0, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        return folder

    return make


@pytest.fixture
def index(tmp_path: Path, make_images: MakeImages) -> ImageIndex:
    """Fourteen images in two class folders."""
    names = [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(7)]
    return index_folder(make_images(tmp_path / "set", names), True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set the cache to an empty folder."""
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
