"""Figures with images, and texts of all figures."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from tests.helpers.pixels import assert_blank_edge, count_near, read_pixels

from openmae.results import curves, style
from openmae.results.confusion import save_confusion_matrix
from openmae.results.curves import save_curves
from openmae.results.dataset_report import save_dataset_figure
from openmae.results.images import (
    reconstruction_grid,
    reconstruction_progress,
    reconstruction_strip,
    save_bar_comparison,
    save_predictions,
)
from openmae.results.search_section import save_importances
from openmae.results.style import BLUE, EMPTY, GREY, INK, MUTED


def _images(count: int, height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def _all_visible(images: np.ndarray) -> np.ndarray:
    return np.ones(images.shape[:3], dtype=bool)


class TestPredictions:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (4, 1, 4), (6, 2, 4), (16, 4, 4)])
    def test_a_label_below_each_image(self, tmp_path: Path, channels: int, count: int, rows: int, columns: int) -> None:
        images = np.full((count, 32, 32, channels), 128, dtype=np.uint8)
        path = save_predictions(images, ["cat"] * count, [0.5] * count, tmp_path / "new" / "sheet.png")
        drawn = read_pixels(path)
        assert drawn.shape[1] == 2 * 24 + columns * 224 + (columns - 1) * 24
        assert drawn.shape[0] == 2 * 24 + rows * (224 + 40) + (rows - 1) * 24
        captions = drawn[24 + 224 : 24 + 224 + 40]
        assert count_near(captions[:, 24:100], INK) > 20, "the label"
        assert count_near(captions[:, 24 + 150 : 24 + 224], MUTED, 40) > 20, "the probability"

    def test_long_labels_are_shortened(self, tmp_path: Path) -> None:
        images = np.zeros((2, 64, 64, 3), dtype=np.uint8)
        drawn = read_pixels(save_predictions(images, ["m" * 80, ""], [1.0, 0.004], tmp_path / "sheet.png"))
        percent = 24 + 256 - int(style.text_font(18).getlength("100 %"))
        below = drawn[24 + 256 : 24 + 256 + 40]
        assert count_near(below[:, percent - 30 : percent - 8], INK) > 0, "the label"
        assert (below[:, percent - 7 : percent - 1] == 255).all(), "nothing between it and the probability"


class TestReconstructionProgress:
    @pytest.mark.parametrize(
        ("channels", "height", "width", "tile_h", "tile_w"),
        [(1, 32, 32, 224, 224), (3, 32, 64, 128, 256), (4, 300, 300, 224, 224)],
    )
    def test_a_column_per_epoch_next_to_original_and_mask(
        self, tmp_path: Path, channels: int, height: int, width: int, tile_h: int, tile_w: int
    ) -> None:
        original = _images(2, height, width, channels)
        original[..., 3:] = 255
        hidden = np.zeros(original.shape[:3], dtype=bool)
        strips = {}
        for epoch, value in ((1, 60), (20, 180)):
            pasted = np.full_like(original, value)
            pasted[..., 3:] = 255
            strips[epoch] = reconstruction_strip(original, pasted, hidden, tmp_path / f"{epoch}.png")
        drawn = read_pixels(reconstruction_progress(strips, 2, tmp_path / "progress.png"))
        assert drawn.shape[:2] == (2 * 24 + 34 + 2 * (tile_h + 6) - 6, 2 * 24 + 4 * (tile_w + 6) - 6)
        tiles = [drawn[58 : 58 + tile_h, x : x + tile_w] for x in range(24, 24 + 4 * (tile_w + 6), tile_w + 6)]
        assert tiles[0].std() > 20, "the original"
        assert count_near(tiles[1], GREY) + count_near(tiles[1], EMPTY) == tile_h * tile_w, "masked everywhere"
        assert (tiles[2] == 60).all()
        assert (tiles[3] == 180).all()

    def test_reconstructions_of_other_images_are_left_out(self, tmp_path: Path) -> None:
        """As after a change of the image size or of the number of images."""
        strips = {}
        for epoch, size in ((1, 64), (2, 32), (3, 32)):
            images = _images(2, 32, size, 3)
            strips[epoch] = reconstruction_strip(images, images, _all_visible(images), tmp_path / f"{epoch}.png")
        drawn = read_pixels(reconstruction_progress(strips, 2, tmp_path / "progress.png"))
        assert drawn.shape[1] == 2 * 24 + 4 * (224 + 6) - 6


class TestReconstructionGrid:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("count", [1, 3, 8])
    def test_figure_is_wider_than_tall(self, tmp_path: Path, channels: int, count: int) -> None:
        images = _images(count, 32, 32, channels)
        path = reconstruction_grid(images, images, _all_visible(images), tmp_path / "new" / "grid.png")
        height, width, _ = read_pixels(path).shape
        assert width > height

    def test_small_images_are_enlarged_without_interpolation(self, tmp_path: Path) -> None:
        images = _images(1, 28, 28, 3)
        drawn = read_pixels(reconstruction_grid(images, images, _all_visible(images), tmp_path / "grid.png"))
        tile = images[0].repeat(8, axis=0).repeat(8, axis=1)
        assert np.array_equal(drawn[24 + 34 : 24 + 34 + 224, 24 : 24 + 224], tile)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_columns_are_in_order_and_missing_patches_are_hatched(self, tmp_path: Path, channels: int) -> None:
        original, pasted = (np.full((1, 224, 224, channels), value, dtype=np.uint8) for value in (10, 220))
        visible = np.zeros((1, 224, 224), dtype=bool)
        visible[:, :, :112] = True
        drawn = read_pixels(reconstruction_grid(original, pasted, visible, tmp_path / "grid.png"))
        tiles = [drawn[58 : 58 + 224, 24 + column * 230 : 24 + column * 230 + 224] for column in range(4)]
        halves = [[tile[:, :112], tile[:, 112:]] for tile in tiles]
        plain = [[set(half.ravel().tolist()) for half in pair] for pair in halves]
        assert plain[0] == [{10}, {10}]
        assert plain[1][0] == {10}
        assert plain[2][1] == {220}
        assert plain[3] == [{220}, {220}]
        for hatched in (halves[1][1], halves[2][0]):
            assert count_near(hatched, EMPTY) + count_near(hatched, GREY) == 224 * 112
            assert count_near(hatched, GREY) > 1000

    def test_large_images_are_reduced(self, tmp_path: Path) -> None:
        images = _images(2, 512, 1024, 1)
        drawn = read_pixels(reconstruction_grid(images, images, _all_visible(images), tmp_path / "grid.png"))
        assert drawn.shape[:2] == (2 * 24 + 34 + 2 * 112 + 6, 2 * 24 + 4 * 224 + 3 * 6)

    def test_tall_images_leave_no_group_empty(self, tmp_path: Path) -> None:
        images = np.zeros((4, 224, 40, 3), dtype=np.uint8)
        drawn = read_pixels(reconstruction_grid(images, images, _all_visible(images), tmp_path / "grid.png"))
        assert drawn.shape[1] == 2 * 24 + 2 * (4 * 40 + 3 * 6) + 40

    def test_transparency_is_laid_on_white(self, tmp_path: Path) -> None:
        clear = np.zeros((1, 224, 224, 4), dtype=np.uint8)
        drawn = read_pixels(reconstruction_grid(clear, clear, _all_visible(clear), tmp_path / "grid.png"))
        assert (drawn[150, 100] == 255).all()


class TestBars:
    def test_best_bar_is_blue(self, tmp_path: Path) -> None:
        path = save_bar_comparison(
            {"pretrained": 0.9, "from scratch": 0.45},
            tmp_path / "b.png",
            title="T",
            subtitle="S",
            notes={"pretrained": "1 s", "from scratch": "2 s"},
        )
        drawn = read_pixels(path)
        assert count_near(drawn, BLUE) == pytest.approx(2 * count_near(drawn, GREY), rel=0.05)


def test_drawing_restores_the_settings(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    save_bar_comparison({"a": 0.5}, tmp_path / "b.png", title="T", subtitle="S", notes={"a": ""})
    assert dict(matplotlib.rcParams) == before
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


LONG = ["W" * 40, "猫", "🐈 cat", "two\nlines", "not text \udcff", "_^{\\$"]


class TestText:
    """Figures have room for any text."""

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("classes", [6, 12, 20])
    def test_confusion_matrix(self, tmp_path: Path, classes: int) -> None:
        names = (LONG * 4)[:classes]
        assert_blank_edge(save_confusion_matrix(np.ones((classes, classes), dtype=int), names, tmp_path / "m.png"))

    @pytest.mark.filterwarnings("error")
    def test_predictions(self, tmp_path: Path) -> None:
        images = np.zeros((len(LONG), 8, 8, 3), dtype=np.uint8)
        assert_blank_edge(save_predictions(images, LONG, [1.0] * len(LONG), tmp_path / "p.png"))

    @pytest.mark.filterwarnings("error")
    def test_bars(self, tmp_path: Path) -> None:
        path = save_bar_comparison(
            {"W" * 40: 1.0, "猫": 0.5},
            tmp_path / "b.png",
            title="W" * 90,
            subtitle="s" * 300,
            notes={"W" * 40: "", "猫": "W" * 60},
        )
        assert_blank_edge(path)

    @pytest.mark.filterwarnings("error")
    def test_data_set(self, tmp_path: Path) -> None:
        sizes = np.array([[10, 20], [300, 400]])
        path = save_dataset_figure(
            tmp_path / "d.png",
            name="W" * 300,
            summary="W" * 200,
            class_counts=dict.fromkeys(LONG, 5),
            sizes=sizes,
            file_sizes=np.array([10, 2_000_000]),
        )
        assert_blank_edge(path)

    def test_importances(self, tmp_path: Path) -> None:
        path = save_importances({"train.optim.lr": 0.5, f"dataset.{'W' * 30}": 0.2}, tmp_path / "i.png")
        assert path is not None
        assert_blank_edge(path)

    def test_labels_of_pretraining_accuracies(self, tmp_path: Path) -> None:
        rows = [{"step": 9, "epoch": 0, "train_loss": 1.0, "val_loss": 1.0, "probe_acc": 0.874, "knn_acc": 0.8712}]
        path = save_curves(rows, tmp_path / "c.png")
        assert_blank_edge(path)
        label = curves._BESIDE * curves._WIDTH + style.text_width(["linear probe  87.4 %"], curves._NAME_SIZE)
        assert read_pixels(path).shape[1] >= 2 * (curves._LEFT + curves._WIDTH + label) * style.DPI


_DRAW = """
import hashlib, sys
from pathlib import Path
import matplotlib, numpy as np
from matplotlib import font_manager as fonts
own = [entry for entry in fonts.fontManager.ttflist if entry.fname.startswith(matplotlib.get_data_path())]
mono = next(entry.fname for entry in own if entry.name == "DejaVu Sans Mono")
installed = ["Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "Noto Sans CJK JP", "sans-serif"]
more = [fonts.FontEntry(fname=mono, name=name) for name in installed] if sys.argv[1] == "many" else []
fonts.fontManager.ttflist[:] = [*more, *own]
from openmae.results.confusion import save_confusion_matrix
from openmae.results.curves import save_curves
from openmae.results.images import save_predictions
row = {"step": 9, "epoch": 0, "train_loss": 1.0, "val_loss": 1.0, "probe_acc": 0.874, "knn_acc": 0.8712}
folder = Path(sys.argv[2])
paths = [
    save_confusion_matrix(np.eye(3, dtype=int), ["cat", "dog", "猫"], folder / "m.png"),
    save_curves([row], folder / "c.png"),
    save_predictions(np.zeros((1, 8, 8, 3), np.uint8), ["cat"], [1.0], folder / "p.png"),
]
print([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
"""


@pytest.mark.integration
def test_figures_do_not_depend_on_installed_fonts(tmp_path: Path) -> None:
    drawn = []
    for fonts in ("none", "many"):
        folder = tmp_path / fonts
        folder.mkdir()
        environment = os.environ | {"MPLCONFIGDIR": str(folder)}
        done = subprocess.run(
            [sys.executable, "-c", _DRAW, fonts, str(folder)],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        drawn.append(done.stdout)
    assert drawn[0] == drawn[1]
