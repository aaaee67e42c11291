"""Tests of files in which other programs wrap weights: each gives the same outputs."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.checkpoints import IMAGES, State, behind
from torch import nn

from openmae.checkpoints.format import read_checkpoint
from openmae.checkpoints.weights import load_backbone
from openmae.errors import CheckpointError

pytestmark = pytest.mark.integration


def trunk(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith("head")}


def zeroed(state: State) -> State:
    return {name: value * 0 for name, value in state.items()}


def submitit_arguments() -> argparse.Namespace:
    """Return ``args`` as the SLURM scripts of the official MAE and ConvNeXt V2 store them."""
    return argparse.Namespace(output_dir=pathlib.PosixPath("/job/1"), job_dir=pathlib.Path("/job"), lr=None)


WRAPPED: dict[str, Callable[[State], Any]] = {
    "bare": lambda s: s,
    "DataParallel": lambda s: behind("module.", s),
    "compiled": lambda s: behind("_orig_mod.", s),
    "compiled inside": lambda s: {name.replace("blocks.", "blocks._orig_mod."): v for name, v in s.items()},
    "DataParallel and compiled": lambda s: {"model": behind("module._orig_mod.", s)},
    "Lightning": lambda s: {"state_dict": behind("model.", s), "epoch": 3, "hyper_parameters": {"lr": 1e-3}},
    "Lightning with more": lambda s: {"state_dict": {**behind("model.", s), "criterion.weight": torch.ones(4)}},
    "Lightning net": lambda s: {"state_dict": behind("net.", s)},
    "encoder": lambda s: {"state_dict": behind("encoder.", s)},
    "DeepSpeed": lambda s: {"module": s, "dp_world_size": 1, "ds_config": {"zero": {"stage": 1}}},
    "SWA": lambda s: {**behind("module.", s), "n_averaged": torch.tensor(5)},
    "params": lambda s: {"params": s},
    "nested": lambda s: {"state": {"model": behind("backbone.", s)}, "step": 3},
    "submitit": lambda s: {"model": s, "args": submitit_arguments()},
    "windows path": lambda s: {"model": s, "path": pathlib.PureWindowsPath("C:/runs")},
    "numpy scalar": lambda s: {"state_dict": s, "best": np.float64(71.3), "bool": np.bool_(True)},
    "numpy arrays": lambda s: {name: value.numpy() for name, value in s.items()},
    "numpy state": lambda s: {"model": s, "rng": np.random.RandomState(0).get_state()},
    "defaultdict": lambda s: {"model": s, "stats": collections.defaultdict(list, {"a": [1]})},
    "deque": lambda s: {"model": s, "losses": collections.deque([1.0, 2.0], maxlen=4)},
    "namespace": lambda s: {"model": s, "args": types.SimpleNamespace(lr=1)},
    "dates": lambda s: {"model": s, "at": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)},
    "timm with EMA": lambda s: {"state_dict": s, "state_dict_ema": s, "arch": "x", "args": argparse.Namespace()},
    "EMA of ConvNeXt V2's scripts": lambda s: {"model": zeroed(s), "model_ema": s},
    "DINO": lambda s: {"student": behind("module.backbone.", zeroed(s)), "teacher": behind("backbone.", s)},
    "a copy beside": lambda s: {**s, **behind("momentum_encoder.", zeroed(s))},
    "momentum": lambda s: {"state_dict": behind("momentum_backbone.", zeroed(s)) | behind("backbone.", s)},
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_wrapped_file_gives_the_same_outputs(case: str, model: nn.Module, state: State, tmp_path: Path) -> None:
    torch.save(WRAPPED[case](state), tmp_path / "f.pth")
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path / "f.pth")(IMAGES), model(IMAGES))


@pytest.mark.parametrize("arrange", [lambda s: {"state_dict": behind("backbone.", s)}, lambda s: s])
def test_backbone_without_head_gives_features(
    arrange: Callable[[State], Any], model: Any, state: State, tmp_path: Path
) -> None:
    torch.save(arrange(trunk(state)), tmp_path / "f.pth")
    with torch.no_grad():
        expected = model.forward_features(IMAGES)[:, 1:].mean(dim=1)
        assert torch.allclose(load_backbone(tmp_path / "f.pth")(IMAGES), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "key", "said"),
    [
        (
            lambda s: {"model": s, "model_ema": s},
            "model",
            "using the weights under 'model_ema'; the file also has model (choose with train.pretrained_weights_key)",
        ),
        (
            lambda s: {"student": behind("backbone.", s), "teacher": behind("backbone.", s)},
            "student",
            "using the weights under 'teacher.backbone'; the file also has student",
        ),
        (
            lambda s: {
                "state_dict": {**behind("backbone.", s), **behind("momentum_backbone.", s), "fc.weight": torch.ones(1)}
            },
            "momentum_backbone",
            "using the weights under 'state_dict.backbone'; the file also has momentum_backbone "
            "(choose with train.pretrained_weights_key); not used: fc",
        ),
    ],
    ids=["ema", "teacher", "momentum"],
)  # fmt: skip
def test_choice_of_weights_is_logged_and_can_be_changed(
    content: Callable[[State], Any], key: str, said: str, state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "f.pth"
    torch.save(content(state), path)
    with caplog.at_level("INFO", "openmae"):
        read_checkpoint(path)
    assert said in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "openmae"):
        chosen = read_checkpoint(path, weights_key=key)
    assert f"the weights under '{key}" in caplog.text or f".{key}';" in caplog.text
    assert chosen.num_classes == 4
    with pytest.raises(CheckpointError, match=r"no weights under 'nothing'.*\n  Fix: It has: "):
        read_checkpoint(path, weights_key="nothing")


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value
