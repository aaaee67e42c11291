"""Tests of the messages for files that are not checkpoints."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.checkpoints import State
from torch import nn

from openmae.checkpoints.format import read_checkpoint
from openmae.checkpoints.weights import load_backbone
from openmae.errors import CheckpointError


def cut(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


BAD_FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("f.pth", lambda p: None, "No checkpoint at .*f.pth"),
    "empty": ("f.pth", lambda p: p.touch(), r"is empty \(0 bytes\)"),
    "cut": ("f.pth", cut, r"is truncated or damaged \(2000 bytes\)"),
    "text of several lines": (
        "f.pth",
        lambda p: p.write_text("[build-system]\nrequires = []\n"),
        "text '.build-system.'",
    ),
    "web page": (
        "f.pth",
        lambda p: p.write_text("<!DOCTYPE html><html>x</html>"),
        "begins with the text '<!DOC",
    ),
    "noise": (
        "f.pt",
        lambda p: p.write_bytes(bytes(range(129, 256)) * 9),
        "is not a PyTorch checkpoint, or damaged",
    ),
    "list": ("f.ckpt", lambda p: torch.save([1], p), "holds a list, not a state dict"),
    "no weights": (
        "f.pth.tar",
        lambda p: torch.save({"epoch": 1}, p),
        "holds no weights; its first keys: epoch",
    ),
    "safetensors": ("f.safetensors", lambda p: p.write_bytes(b"\x00\xff" * 99), "is not a safetensors file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_file_that_is_not_a_checkpoint_is_explained(case: str, tmp_path: Path) -> None:
    name, make, text = BAD_FILES[case]
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=text) as caught:
        read_checkpoint(tmp_path / name)
    assert caught.value.fix


def test_error_for_a_folder_names_its_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder, not a checkpoint.*\n.*it holds no checkpoint"):
        read_checkpoint(tmp_path)
    (tmp_path / "train").mkdir()
    for name in ("backbone.safetensors", "model_best.pth", "report.html"):
        (tmp_path / "train" / name).touch()
    with pytest.raises(CheckpointError) as caught:  # a results folder, in which `mae train` has a folder
        read_checkpoint(tmp_path)
    below = tmp_path / "train"
    assert caught.value.fix == f"Name one of its files: {below}/model_best.pth, {below}/backbone.safetensors."
    (tmp_path / "model.pth").touch()
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path)
    assert caught.value.fix == f"Name one of its files: {tmp_path}/model.pth."


def scripted(path: Path) -> None:
    module = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    module.save(str(path))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("weights/readme.txt", "hello")


REFUSED: dict[str, tuple[Callable[[Path, nn.Module, State], Any], str]] = {
    "whole model": (lambda p, m, s: torch.save(m, p), r"holds a pickled model \(timm\.\S+VisionTransformer\)"),
    "Git LFS": (lambda p, m, s: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "web page": (lambda p, m, s: p.write_text("<html><body>Sign in</body></html>"), "is a web page, not a checkpoint"),
    "TorchScript": (lambda p, m, s: scripted(p), "is a TorchScript archive"),
    "ZIP": (lambda p, m, s: zipped(p), "is a ZIP archive that torch.save did not write"),
    "TAO encrypted": (
        lambda p, m, s: torch.save({"state_dict": b"..", "state_dict_encrypted": True}, p),
        "TAO has encrypted the weights",
    ),
    "ZeRO-3": (
        lambda p, m, s: torch.save({"module": {n: torch.empty(0) for n in s}}, p),
        r"one process's part of a sharded model",
    ),
    "quantized": (
        lambda p, m, s: torch.save(
            {**s, "patch_embed.proj.weight": torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)}, p
        ),
        r"is not a dense tensor \(quantized\)",
    ),
    "optimizer only": (lambda p, m, s: torch.save({"optimizer": {"state": {}}}, p), "holds no weights; its first keys"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_files_that_cannot_be_loaded_are_explained(case: str, model: nn.Module, state: State, tmp_path: Path) -> None:
    make, said = REFUSED[case]
    make(tmp_path / "f.pth", model, state)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_backbone(tmp_path / "f.pth")
    assert caught.value.fix
