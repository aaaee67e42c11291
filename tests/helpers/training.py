"""Training runs that are small enough for tests: a few images of noise, a small model at 32 or 64 px."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openmae.actions import train as train_action
from openmae.actions.run_report import RunReport
from openmae.checkpoints.folder import list_checkpoints
from openmae.results.metrics_csv import Row, read_metrics
from openmae.spec.load import load_spec

Train = Callable[..., dict[str, float]]

TINY = {
    "train.recipe": "tao",
    "model.arch": "vit_tiny_patch16",
    "model.decoder_depth": 1,
    "model.decoder_embed_dim": 32,
    "dataset.augmentation.input_size": 32,
    "dataset.batch_size": 4,
    "dataset.num_workers_per_gpu": 0,
    "train.num_epochs": 2,
    "train.optim.lr": 1e-3,
    "wandb.enable": False,
}
_TIMINGS = ("images_per_s", "data_wait")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Threads of such small models only wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` (21 images) and ``val`` (9 images) of two classes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, counts in {"train/cat": 11, "train/dog": 10, "val/cat": 5, "val/dog": 4}.items():
        (root / name).mkdir(parents=True)
        for number in range(counts):
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def tiny_overrides(photos: Path) -> Callable[..., list[str]]:
    """``tiny_overrides(folder, {key: value})``: a small training's ``key=value`` list."""

    def overrides(folder: Path, changes: dict[str, Any] | None = None) -> list[str]:
        sources = {"dataset.train_data_sources": photos / "train", "dataset.val_data_sources": photos / "val"}
        values = {**TINY, **sources, "train.results_dir": folder, **(changes or {})}
        return [f"{key}={value}" for key, value in values.items() if value is not None]

    return overrides


@pytest.fixture(scope="session")
def train(tiny_overrides: Callable[..., list[str]]) -> Train:
    """``train(folder, {key: value})``: ``mae train`` in this process, without report and images; None unsets a key."""

    def run(folder: Path, changes: dict[str, Any] | None = None) -> dict[str, float]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("after_epoch", "after_stop", "finish"):  # half of such a run's time, and tested elsewhere
                patch.setattr(RunReport, name, lambda *_: None)
            return train_action.run(load_spec(None, tiny_overrides(folder, changes), action="train"))

    return run


@pytest.fixture(scope="session")
def payload_of() -> Callable[[Path], dict[str, Any]]:
    """``payload_of(folder)``: the newest checkpoint's content."""

    def load(folder: Path) -> dict[str, Any]:
        return torch.load(list_checkpoints(folder)[-1], weights_only=True)

    return load


@pytest.fixture(scope="session")
def assert_same_run(payload_of: Callable[[Path], dict[str, Any]]) -> Callable[[Path, Path], None]:
    """``assert_same_run(a, b)``: two results folders hold the same training run, to the last bit."""

    def rows(folder: Path) -> list[Row]:
        return [{k: v for k, v in row.items() if k not in _TIMINGS} for row in read_metrics(folder / "metrics.csv")]

    def check(a: Path, b: Path) -> None:
        assert rows(a) == rows(b)
        one, other = payload_of(a), payload_of(b)
        assert {**one["progress"], "seconds": 0} == {**other["progress"], "seconds": 0}
        for part in ("state_dict", "ema_state_dict", "optimizer"):
            _assert_same(one.get(part), other.get(part), part)

    return check


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Any, Any, str], None]:
    """``assert_same(a, b, where)``: two trees of tensors and plain values are the same, to the last bit."""
    return _assert_same


def _assert_same(a: Any, b: Any, where: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            _assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b, strict=True)):
            _assert_same(*pair, f"{where}.{number}")
    else:
        assert a == b, where
