"""The confusion matrix: sizes, colours and names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.helpers.pixels import count_near, read_pixels

from openmae.results.confusion import save_confusion_matrix
from openmae.results.style import BLUE, RUST


@pytest.mark.parametrize("classes", [2, 15, 16, 60, 61, 251, 1000])
def test_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    matrix = np.eye(classes, dtype=int) * 9
    matrix[0, -1] = 1
    path = save_confusion_matrix(matrix, [f"class {i}" for i in range(classes)], tmp_path / "m.png")
    drawn = read_pixels(path)
    assert max(drawn.shape) < 3200
    assert count_near(drawn, BLUE) > 200


def test_mistakes_are_rust(tmp_path: Path) -> None:
    wrong = read_pixels(save_confusion_matrix(np.array([[0, 5], [5, 0]]), "ab", tmp_path / "wrong.png"))
    assert count_near(wrong, RUST) > 5000
    assert count_near(wrong, BLUE) == 0


def test_matrix_without_images(tmp_path: Path) -> None:
    assert save_confusion_matrix(np.zeros((3, 3), dtype=int), "abc", tmp_path / "m.png").exists()


@pytest.mark.filterwarnings("error")
def test_special_characters_in_names(tmp_path: Path) -> None:
    names = ["$5 note$", "_^{\\", "a class name much longer than the room that it has", "猫"]
    assert save_confusion_matrix(np.eye(4, dtype=int) * 123_456, names, tmp_path / "m.png").exists()
