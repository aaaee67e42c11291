"""Small sets of pictures, and a checkpoint of every family and stage that all tests here share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openmae.actions import export
from openmae.cli.main import main
from openmae.engines.packages import ModelProto
from openmae.results import style

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 40, 40)}

#: A small model of each family: its options, and an input size.
FAMILIES: dict[str, tuple[str, ...]] = {
    "vit": ("model.arch=vit_tiny_patch16", "dataset.augmentation.input_size=32"),
    "convnextv2": ("model.arch=convnextv2_atto", "dataset.augmentation.input_size=64"),
    "hiera": ("model.arch=hiera_tiny_224", "dataset.augmentation.input_size=64"),
}
SMALL = (
    "train.recipe=tao",
    "train.num_epochs=1",
    "dataset.batch_size=4",
    "dataset.num_workers_per_gpu=0",
    "train.optim.lr=1e-3",
    "wandb.enable=false",
)
SMALL_DECODER = ("model.decoder_depth=1", "model.decoder_embed_dim=32")


def paint(path: Path, colour: tuple[int, ...], seed: int, size: tuple[int, int] = (48, 40), mode: str = "RGB") -> None:
    """Write a picture of one colour with noise on it; ``size`` is (width, height)."""
    noise = np.random.default_rng(seed).integers(-30, 30, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).convert(mode).save(path)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extract archives elsewhere than in the user's own cache."""
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session", autouse=True)
def traces() -> Iterator[None]:
    """Trace a checkpoint once per input format and operator set; this takes seconds, nearly all of an export."""
    traced: dict[str, ModelProto] = {}
    trace = export.trace

    def trace_once(model: Any, card: Any, opset: int, **options: Any) -> ModelProto:
        key = repr((card, opset, options))  # the card has the checkpoint's hash
        if key not in traced:
            traced[key] = trace(model, card, opset, **options)
        proto = ModelProto()  # a copy, since its weights are replaced in lower precisions
        proto.CopyFrom(traced[key])
        return proto

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace", trace_once)
        yield


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the figures of reports with a sixteenth of the pixels, in half the time."""
    monkeypatch.setattr(style, "DPI", style.DPI // 4)
    monkeypatch.setitem(style._SETTINGS, "savefig.dpi", style.DPI)


@dataclass(frozen=True)
class Photos:
    """Folders of pictures: no labels; class folders; one more class; a single class."""

    root: Path
    plain: Path
    train: Path
    val: Path
    two_classes: Path
    one_class: Path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    root = tmp_path_factory.mktemp("photos")
    for number in range(8):
        paint(root / "plain" / f"{number}.png", tuple(COLOURS.values())[number % 3], number)
    for part, count in (("train", 4), ("val", 3)):
        for name, colour in COLOURS.items():
            for number in range(count):
                paint(root / part / name / f"{number}.png", colour, 10 + number)
    for name in ("blue", "red"):
        paint(root / "two" / name / "0.png", COLOURS[name], 1)
    for number in range(4):
        paint(root / "one" / "red" / f"{number}.png", COLOURS["red"], number)
    return Photos(root, root / "plain", root / "train", root / "val", root / "two", root / "one")


@dataclass(frozen=True)
class Trained:
    """A results folder of ``mae train``, and what the command was."""

    folder: Path
    overrides: tuple[str, ...]

    @property
    def checkpoint(self) -> Path:
        """The newest."""
        return sorted(self.folder.glob("model_epoch_*.pth"))[-1]


def train_arguments(photos: Photos, family: str, stage: str) -> tuple[str, ...]:
    """Overrides of a short training."""
    common = (*SMALL, *FAMILIES[family], f"train.stage={stage}", f"dataset.val_data_sources={photos.val}")
    if stage == "pretrain":
        return (*common, *SMALL_DECODER, f"dataset.train_data_sources={photos.plain}")
    # MultiStep's drop would come later than the last epoch; without mixing the loss is the validation's
    return (*common, f"dataset.train_data_sources={photos.train}", "dataset.augmentation.auto_aug=''")


Train = Callable[[str, str], Trained]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: Photos) -> Train:
    """Train a family in a stage through the command line, once in a session."""
    made: dict[tuple[str, str], Trained] = {}

    def train(family: str, stage: str) -> Trained:
        if (family, stage) not in made:
            root = tmp_path_factory.mktemp(f"{family}_{stage}")
            overrides = (*train_arguments(photos, family, stage), f"results_dir={root}")
            assert main(["train", *overrides]) == 0
            made[family, stage] = Trained(root / "train", overrides)
        return made[family, stage]

    return train


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[str, Sequence[str]], str]:
    """Run an action that must be refused: exit code 2 and one text on stderr, which is returned."""

    def run(action: str, overrides: Sequence[str]) -> str:
        assert main([action, *overrides]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        return err

    return run
