"""Tests of the checkpoint format: reading, writing, versions and damaged headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.helpers.checkpoints import CONFIGS, IMAGES, INFO, SMALL, State, behind, classifier_payload, save_model
from torch import nn

from openmae.checkpoints.format import (
    CheckpointInfo,
    read_checkpoint,
    read_training_state,
    save_backbone,
    write_checkpoint,
)
from openmae.checkpoints.weights import load_backbone
from openmae.errors import CheckpointError, RunError
from openmae.models.build import ModelConfig, build_classifier
from openmae.models.mae import MaskedAutoencoder


def test_saved_backbone_loads_into_timm(
    tmp_path: Path, pretrained: dict[str, MaskedAutoencoder], files: dict[str, Path]
) -> None:
    state = pretrained["vit"].encoder.backbone.state_dict()
    path = save_backbone(tmp_path / "backbone.safetensors", state, INFO)
    assert [file.name for file in tmp_path.iterdir()] == ["backbone.safetensors"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # safetensors would let only its owner read it
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), num_classes=0).load_state_dict(tensors)
    images = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        assert torch.equal(load_backbone(path)(images), load_backbone(files["vit"])(images))


def test_averaged_weights_are_preferred(
    tmp_path: Path, randomise: Callable[..., None], built: Callable[..., Any]
) -> None:
    config = replace(CONFIGS["convnextv2"], num_classes=2)
    model, average = built(build_classifier, config), built(build_classifier, config)
    randomise(average)
    info = replace(INFO, stage="finetune", model=config)
    loaded = load_backbone(save_model(tmp_path / "model.pth", model, info, ema=average))
    assert torch.equal(loaded.state_dict()["stem.0.weight"], average.state_dict()["stem.0.weight"])


def test_failed_write_leaves_previous_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, {"a": torch.ones(1)}, INFO)
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("openmae.checkpoints.format.save_file", full)
    with pytest.raises(RunError, match=r"The results could not be written \(No space left on device\)"):
        save_backbone(path, {"a": torch.zeros(1)}, INFO)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_without_decoder_attention_entry_has_self_attention(
    tmp_path: Path, pretrained: dict[str, MaskedAutoencoder]
) -> None:
    values = INFO.to_dict()
    assert values["model"].pop("decoder_attention") == "self"
    content = {"openmae": values, "state_dict": {f"model.{n}": v for n, v in pretrained["vit"].state_dict().items()}}
    torch.save(content, tmp_path / "old.pth")
    assert read_checkpoint(tmp_path / "old.pth").info == INFO


@pytest.mark.parametrize("name", ["model.safetensors", "renamed.pth"])
def test_safetensors_file_is_recognised_by_its_content(
    name: str, model: nn.Module, state: State, tmp_path: Path
) -> None:
    save_file(dict(state), tmp_path / name)
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path / name)(IMAGES), model(IMAGES))


def test_plain_weights_can_be_chosen_instead_of_averaged_ones(tmp_path: Path) -> None:
    config = ModelConfig("convnextv2_atto", (32, 32), num_classes=2)
    plain, average = build_classifier(config), build_classifier(config)
    info = CheckpointInfo("finetune", config, mean=(0.5,) * 3, std=(0.2,) * 3)
    states = {"state_dict": plain, "ema_state_dict": average}
    content = {"openmae": info.to_dict(), **{key: behind("model.", m.state_dict()) for key, m in states.items()}}
    torch.save(content, tmp_path / "f.pth")
    for key, expected in (("", average), ("state_dict", plain), ("ema_state_dict", average)):
        loaded = load_backbone(tmp_path / "f.pth", weights_key=key)
        assert torch.equal(loaded.get_parameter("stem.0.weight"), expected.get_parameter("stem.0.weight"))
    with pytest.raises(CheckpointError, match="no weights under 'model'"):
        load_backbone(tmp_path / "f.pth", weights_key="model")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(bad: float, state: State, tmp_path: Path) -> None:
    broken = state["blocks.3.mlp.fc1.weight"].clone()
    broken[0, 0] = bad
    torch.save({**state, "blocks.3.mlp.fc1.weight": broken}, tmp_path / "f.pth")
    text = r"1 of \d+ tensors hold NaN or infinite values, the first is blocks.3.mlp.fc1.weight"
    with pytest.raises(CheckpointError, match=text):
        load_backbone(tmp_path / "f.pth")


def test_tensor_cannot_claim_values_that_the_file_lacks(state: State, tmp_path: Path) -> None:
    torch.save({**state, "head.weight": torch.zeros(1, 192).expand(8_000_000, 192)}, tmp_path / "f.pth")
    with pytest.raises(
        CheckpointError, match=r"head.weight claims the shape \[8000000, 192\], but the file holds fewer"
    ):
        load_backbone(tmp_path / "f.pth")
    torch.save({**state, "head.weight": torch.zeros(8_000_000, 0)}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError):
        load_backbone(tmp_path / "f.pth")
    with torch.device("meta"):
        meta = timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict()
    torch.save(meta, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match="cls_token has a shape, but no values"):
        load_backbone(tmp_path / "f.pth")


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "[1", '"x"', json.dumps({"format": 1})])
def test_invalid_metadata_of_safetensors_is_explained(text: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "f.safetensors", {"openmae": text})
    with pytest.raises(CheckpointError, match=r"damaged|is not a safetensors file|of another version"):
        read_checkpoint(tmp_path / "f.safetensors")


def test_safetensors_header_that_claims_too_much_is_explained(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    (tmp_path / "f.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match="is not a safetensors file, or damaged"):
        read_checkpoint(tmp_path / "f.safetensors")
    (tmp_path / "g.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{")
    with pytest.raises(CheckpointError, match="is not a safetensors file, or damaged"):
        read_checkpoint(tmp_path / "g.safetensors")


@pytest.mark.parametrize("spec", [nested(60), {"a": nested(300)}, {"a": [0] * 200_000}], ids=["60", "300", "wide"])
def test_spec_that_is_too_deep_or_too_large_is_explained(spec: Any, tmp_path: Path) -> None:
    content = classifier_payload(ModelConfig("convnextv2_atto", (32, 32), num_classes=2))
    content["openmae"]["spec"] = spec
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match="damaged or of another version"):
        read_checkpoint(tmp_path / "f.pth")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": 2, "version": "9.0"}, r"has format 2 \(OpenMAE 9.0\)"),
        ({"model": {}}, "is damaged or of another version: model.arch is missing"),
        ({"model": SMALL.to_dict() | {"colour": 1}}, "is damaged or of another version: model.colour is unknown"),
    ],
)
def test_header_of_another_version_is_explained(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    header = INFO.to_dict() | change
    torch.save({"openmae": header, "state_dict": {"model.x": torch.ones(1)}}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=text):
        read_checkpoint(tmp_path / "f.pth")


def test_checkpoint_without_weights_is_explained(tmp_path: Path) -> None:
    torch.save({"openmae": INFO.to_dict()}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match="the checkpoint holds no weights"):
        read_checkpoint(tmp_path / "f.pth")


PAYLOAD = {"openmae": {"stage": "pretrain"}, "progress": {"epoch": 1}, "optimizer": {}, "x": torch.arange(3)}


def test_training_state_of_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"No checkpoint at .*/no\.pth"):
        read_training_state(tmp_path / "no.pth")


@pytest.mark.parametrize("lazily", [False, True])
def test_training_state_of_a_truncated_file(tmp_path, lazily):
    path = tmp_path / "model_epoch_001_step_00001.pth"
    write_checkpoint(PAYLOAD, path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(CheckpointError, match=r"step_00001\.pth is truncated or damaged \(700 bytes\)"):
        read_training_state(path, lazily=lazily)


def test_training_state_of_a_file_with_weights_only(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no training state") as caught:
        read_training_state(tmp_path / "w.pth")
    assert "train.pretrained_model_path" in caught.value.fix


def test_training_state_is_read(tmp_path):
    write_checkpoint(PAYLOAD, tmp_path / "a.pth")
    state = read_training_state(tmp_path / "a.pth")
    assert torch.equal(state["x"], torch.arange(3))
    assert state["progress"] == {"epoch": 1}
