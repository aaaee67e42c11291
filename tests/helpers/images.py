"""Small images in class folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_classes(root: Path, counts: Mapping[str, int], names: Sequence[str] = ("blue", "green", "red")) -> Path:
    """Write ``counts[part]`` images of 40 x 48 px to ``root/<part>/<name>/``; a class differs in one channel."""
    noise = np.random.default_rng(0)
    for part, count in counts.items():
        for channel, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 60, (40, 48, 3), dtype=np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root
