"""Pixels of figures that tests draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def read_pixels(path: Path) -> np.ndarray:
    """Return an image file as [H, W, 3] uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def count_near(pixels: np.ndarray, colour: str, tolerance: int = 12) -> int:
    """Return the number of pixels whose channels are all within ``tolerance`` of a colour such as ``#2160a6``."""
    target = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels.astype(int) - target).max(axis=-1) <= tolerance).sum())


def assert_blank_edge(path: Path) -> None:
    """Assert that no text of a figure extends beyond its edge."""
    drawn = read_pixels(path)
    edge = np.concatenate([drawn[:2].ravel(), drawn[-2:].ravel(), drawn[:, :2].ravel(), drawn[:, -2:].ravel()])
    assert (edge == 255).all(), f"{path.name}: a text extends beyond the edge"
