"""Files that are no checkpoint, or not one of this version: every complaint by its text, and nothing executed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from openmae.checkpoints.format import CheckpointInfo, read_checkpoint
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig

SMALL = ModelConfig("vit_tiny_patch16", input_size=(32, 64), decoder_depth=1, decoder_embed_dim=32)
INFO = CheckpointInfo("pretrain", SMALL)


class Malicious:
    """Its pickle would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


class Harmless:
    pass


@pytest.mark.parametrize("writer", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2))])
def test_a_pickle_that_runs_code_is_refused_unrun(writer: Callable[..., Any], tmp_path: Path) -> None:
    writer({"state_dict": {}, "extra": Malicious(tmp_path / "made")}, tmp_path / "f.pth")
    with pytest.raises(
        CheckpointError, match=r"holds \S*mkdir in addition to weights; it was not loaded|is no PyTorch"
    ):
        read_checkpoint(tmp_path / "f.pth")
    assert not (tmp_path / "made").exists()


def test_a_pickled_class_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "config": Harmless()}, tmp_path / "f.pth")
    with pytest.raises(
        CheckpointError, match=r"holds \S*Harmless in addition to weights.*\n  Fix: If you trust its source"
    ):
        read_checkpoint(tmp_path / "f.pth")


def cut(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


BAD_FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("f.pth", lambda p: None, "No checkpoint at .*f.pth"),
    "empty": ("f.pth", lambda p: p.touch(), r"is empty \(0 bytes\)"),
    "cut": ("f.pth", cut, r"is cut off or damaged \(2000 bytes\)"),
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
        "is no PyTorch checkpoint, or damaged",
    ),
    "list": ("f.ckpt", lambda p: torch.save([1], p), "holds a list, not a state dict"),
    "no weights": (
        "f.pth.tar",
        lambda p: torch.save({"epoch": 1}, p),
        "holds no weights; its first keys: epoch",
    ),
    "safetensors": ("f.safetensors", lambda p: p.write_bytes(b"\x00\xff" * 99), "is no safetensors file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_checkpoint_is_explained(case: str, tmp_path: Path) -> None:
    name, make, text = BAD_FILES[case]
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=text) as caught:
        read_checkpoint(tmp_path / name)
    assert caught.value.fix


def test_a_folder_is_answered_with_the_files_in_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder, not a checkpoint.*\n.*it holds no checkpoint"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.pth").touch()
    with pytest.raises(CheckpointError, match=r"Name one of its files: model\.pth"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": 2, "version": "9.0"}, r"has format 2 \(OpenMAE 9.0\)"),
        ({"model": {"arch": "vit_tiny_patch16"}}, "is damaged or of another version: KeyError"),
        ({"model": SMALL.to_dict() | {"colour": 1}}, "is damaged or of another version: TypeError"),
    ],
)
def test_a_header_of_another_version_is_explained(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    header = INFO.to_dict() | change
    torch.save({"openmae": header, "state_dict": {"model.x": torch.ones(1)}}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=text):
        read_checkpoint(tmp_path / "f.pth")


def test_a_checkpoint_without_weights_is_explained(tmp_path: Path) -> None:
    torch.save({"openmae": INFO.to_dict()}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match="checkpoint of OpenMAE without its weights"):
        read_checkpoint(tmp_path / "f.pth")
