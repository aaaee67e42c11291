"""The figure of a data set, from no readable image to a thousand classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openmae.results.dataset_report import save_dataset_figure
from openmae.results.style import BLUE, RUST


def draw(path: Path, counts: dict[str, int], images: int, **options: Any) -> np.ndarray:
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 6000 if images > 10 else 40, (images, 2))
    save_dataset_figure(
        path,
        name=options.get("name", "photos"),
        summary="summary",
        class_counts=counts,
        sizes=sizes,
        file_sizes=rng.integers(100, 10**7, images),
    )
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def near(pixels: np.ndarray, colour: str) -> int:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels.astype(int) - wanted).max(axis=-1) < 12).sum())


@pytest.mark.parametrize(
    ("counts", "images"),
    [
        ({}, 1),
        ({}, 0),
        ({"a": 0, "b": 1}, 0),
        ({f"class number {i} of a long name": i for i in range(24)}, 400),
        ({f"n{i:08}": 1300 - i for i in range(1000)}, 5000),
        ({"$5_note^2$": 1, "ключ": 2}, 3),
    ],
)
def test_figure_for_every_kind_of_data_set(tmp_path: Path, counts: dict[str, int], images: int) -> None:
    pixels = draw(tmp_path / "a.png", counts, images)
    assert pixels.shape[1] > 1.3 * pixels.shape[0], "the figure is not wider than tall"
    assert (near(pixels, BLUE) > 500) == (images > 0 or bool(counts))


def test_bars_are_as_long_as_classes_are_large(tmp_path: Path) -> None:
    equal = near(draw(tmp_path / "a.png", {"a": 50, "b": 50}, 0), BLUE)
    half = near(draw(tmp_path / "b.png", {"a": 50, "b": 25}, 0), BLUE)
    assert half / equal == pytest.approx(0.75, abs=0.01)


def test_empty_class_is_highlighted(tmp_path: Path) -> None:
    assert near(draw(tmp_path / "a.png", {"a": 5, "b": 0}, 0), RUST) > 20
    assert near(draw(tmp_path / "b.png", {"a": 5, "b": 5}, 0), RUST) == 0


def test_long_name_does_not_change_the_width(tmp_path: Path) -> None:
    short, long = (draw(tmp_path / "a.png", {}, 3, name=name).shape for name in ("photos", "/data" * 100))
    assert short == long
