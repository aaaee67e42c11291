"""Torch and ONNX Runtime give the same outputs for the same images, however many there are."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
import torch

from openmae.checkpoints.format import CheckpointInfo, save_backbone
from openmae.engines.module import DeployedModel
from openmae.engines.onnx import trace, writing
from openmae.engines.predictor import OnnxPredictor, TorchPredictor, card_of, open_predictor
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig, build_classifier

CPU = torch.device("cpu")


def pixels(count: int, channels: int = 3) -> torch.Tensor:
    """uint8 images as a data set gives them."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, 32, 48), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def pair(deployed, tmp_path_factory):
    """A model in torch, and the ONNX file of the settings in ONNX Runtime."""

    def make(stage: str, **settings) -> tuple[TorchPredictor, OnnxPredictor]:
        model, card = deployed("vit_tiny_patch16", stage, **settings)
        path = tmp_path_factory.mktemp("onnx") / "model.onnx"
        with writing(trace(model, card, 17, device=CPU), path):
            pass
        plain = DeployedModel(model.backbone, replace(card, preprocessing=False)).eval()
        return TorchPredictor(plain, card, CPU), OnnxPredictor(path, CPU)

    return make


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("finetune", {}),
        ("finetune", {"batch_size": 4}),
        ("pretrain", {"batch_size": 2, "preprocessing": True}),
    ],
)
def test_torch_and_onnx_runtime_agree(pair, stage, settings):
    ours, theirs = pair(stage, **settings)
    assert theirs.card == ours.card
    for count in (1, 2, 5):
        images = pixels(count)
        expected, found = ours(images), theirs(images)
        assert list(found) == list(expected) == list(ours.card.outputs)
        for name, output in found.items():
            assert output.dtype == torch.float32
            torch.testing.assert_close(output, expected[name], atol=2e-5, rtol=1e-5, msg=f"{name} of {count} images")


def test_16_bit_images_are_rounded_only_where_the_model_takes_bytes(pair):
    ours, theirs = pair("finetune", preprocessing=True, in_chans=1)
    images = pixels(2, 1).float() + 0.3
    torch.testing.assert_close(theirs(images)["logits"], ours(images.round())["logits"], atol=2e-5, rtol=1e-5)
    brighter = torch.full((1, 1, 32, 48), 255.4)
    torch.testing.assert_close(
        theirs(brighter)["logits"], ours(brighter.clamp(max=255))["logits"], atol=2e-5, rtol=1e-5
    )


def test_runtime_is_described(pair):
    ours, theirs = pair("finetune")
    assert ours.runtime == f"torch {torch.__version__}, CPU"
    assert theirs.runtime.startswith("ONNX Runtime 1.")
    assert theirs.runtime.endswith(", CPU")


def test_a_file_is_opened_by_its_suffix(tmp_path):
    config = ModelConfig("convnextv2_atto", (64, 64), num_classes=3)
    spec = {"dataset": {"augmentation": {"interpolation": "random"}}}
    info = CheckpointInfo("finetune", config, ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3, spec)
    model = build_classifier(config).eval()
    path = save_backbone(tmp_path / "backbone.safetensors", model.state_dict(), info)
    predictor = open_predictor(path)
    assert isinstance(predictor, TorchPredictor)
    assert predictor.card == card_of(info, path)
    assert predictor.card.interpolation == "bicubic", "random is bicubic in evaluation"
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = model((images / 255 - 0.5) / 0.25)
    torch.testing.assert_close(predictor(images)["logits"], expected, atol=1e-5, rtol=1e-5)


def test_a_file_that_onnx_runtime_cannot_run_is_an_error(pair, tmp_path):
    _, theirs = pair("finetune")
    node = onnx.helper.make_node("Identity", ["input"], ["logits"], domain="of.nobody")
    value = onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "g", [value], [onnx.helper.make_tensor_value_info("logits", 1, [1])])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("of.nobody", 1)])
    onnx.helper.set_model_props(proto, theirs.card.to_metadata())
    onnx.save_model(proto, tmp_path / "model.onnx")
    with pytest.raises(CheckpointError) as error:
        open_predictor(tmp_path / "model.onnx")
    assert "cannot run" in str(error.value)
    assert "Export it again with mae export" in str(error.value)
