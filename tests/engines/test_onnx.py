"""The ONNX file is equal to torch, says what it is, and is written whole or not at all."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from openmae.engines import onnx as onnx_module
from openmae.engines.metadata import INPUT
from openmae.engines.module import example_input
from openmae.engines.onnx import (
    compare,
    file_bytes,
    likeness,
    opset_of,
    read_card,
    read_onnx,
    read_onnx_card,
    trace,
    writing,
)
from openmae.engines.precision import to_half
from openmae.errors import CheckpointError, RunError, SpecError

CPU = torch.device("cpu")
CASES = [  # every family and stage, and in the rest every opset, batch, preprocessing and number of channels
    ("vit_tiny_patch16", "finetune", 17, {"batch_size": -1, "preprocessing": True, "in_chans": 4}),
    ("vit_tiny_patch16", "pretrain", 20, {"batch_size": 2}),
    ("convnextv2_atto", "finetune", 17, {"batch_size": 2, "in_chans": 1}),
    ("convnextv2_atto", "pretrain", 17, {"batch_size": -1}),
    pytest.param("hiera_tiny_224", "finetune", 18, {"batch_size": -1}, marks=pytest.mark.slow),  # six seconds
    ("hiera_tiny_224", "pretrain", 17, {"batch_size": -1, "preprocessing": True}),
]


@pytest.fixture(scope="module")
def small(deployed):
    """A traced model."""
    model, card = deployed("vit_tiny_patch16", "finetune")
    return model, card, trace(model, card, 17, device=CPU)


@pytest.mark.parametrize(("arch", "stage", "opset", "settings"), CASES)
def test_outputs_equal_torch(deployed, tmp_path, arch, stage, opset, settings):
    model, card = deployed(arch, stage, **settings)
    proto = trace(model, card, opset, device=CPU)
    with writing(proto, tmp_path / "model.onnx") as file:
        parity = compare(model, card, file)
    assert parity.difference < 1e-5 * max(1, parity.largest)
    assert parity.largest > 1e-3, "outputs of nearly zero prove nothing"
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [output.name for output in session.get_outputs()] == list(card.outputs)
    (tensor,) = session.get_inputs()
    assert (tensor.name, tensor.type) == (INPUT, "tensor(uint8)" if card.preprocessing else "tensor(float)")
    assert tensor.shape[0] == ("batch" if card.batch_size == -1 else card.batch_size)
    images = example_input(card, 5 if card.batch_size == -1 else card.batch_size, seed=7)
    with torch.no_grad():
        for found, expected in zip(session.run(None, {INPUT: images.numpy()}), model(images), strict=True):
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-5 * max(1, expected.abs().max()))
    written = read_onnx(tmp_path / "model.onnx")
    assert opset_of(written) == opset
    assert read_card(written) == card


def test_an_opset_that_is_not_possible_is_reported(small, caplog):
    with caplog.at_level(logging.WARNING, "openmae"):
        proto = onnx_module._lowered(copy.deepcopy(small[2]), 15)
    assert opset_of(proto) == 17
    assert caplog.messages == [
        "export.opset_version=15 is not possible (No Previous Version of LayerNormalization exists): 17 was written."
    ]


def test_an_unknown_opset_is_an_error(deployed):
    newest = onnx.defs.onnx_opset_version()
    with pytest.raises(SpecError) as error:
        trace(*deployed("vit_tiny_patch16", "finetune"), newest + 1, device=CPU)
    assert f"supports operator sets up to {newest}, got {newest + 1}" in str(error.value)
    assert f"Set export.opset_version to 17 (widely read) or up to {newest}." in str(error.value)


def test_the_file_holds_no_paths_of_this_machine(small):
    _, _, proto = small
    content = proto.SerializeToString()
    for secret in (str(Path(torch.__file__).parent), str(Path(onnx_module.__file__).parent), "stack_trace"):
        assert secret.encode() not in content, f"{secret} stands in the file"
    assert (proto.producer_name, proto.producer_version) == ("openmae", "0.1.0")


def test_a_difference_to_torch_fails_and_removes_the_file(small, tmp_path, monkeypatch):
    model, card, proto = small
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    weights = next(tensor for tensor in changed.graph.initializer if tensor.name.endswith("head.weight"))
    values = onnx.numpy_helper.to_array(weights) + np.float32(0.01)
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    with pytest.raises(RunError) as error, writing(changed, tmp_path / "model.onnx") as file:
        compare(model, card, file)
    assert "ONNX Runtime's logits differs from torch's by" in str(error.value)
    assert "at most 0.0001 of the largest output is accepted. The file was removed." in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_small_outputs_are_compared_too(deployed, tmp_path):
    """A fresh head's logits are tiny: a file without a head would be within an absolute tolerance."""
    model, card = deployed("vit_tiny_patch16", "finetune")
    small = copy.deepcopy(model)
    with torch.no_grad():
        small.backbone.head.weight *= 1e-5
        small.backbone.head.bias *= 0
        without = copy.deepcopy(small)
        without.backbone.head.weight *= 0
        assert small(example_input(card, 2))[0].abs().max() < 1e-4
    with writing(trace(without, card, 17, device=CPU), tmp_path / "model.onnx"):
        pass
    with pytest.raises(RunError, match="ONNX Runtime's logits differs from torch's"):
        compare(small, card, tmp_path / "model.onnx")


def test_outputs_that_are_not_finite_fail_in_lower_precision(small, tmp_path):
    model, card, proto = small
    large = copy.deepcopy(model)
    with torch.no_grad():
        large.backbone.blocks[0].mlp.fc1.weight *= 1e3
        large.backbone.blocks[0].mlp.fc2.weight *= 1e3
    half = to_half(trace(large, card, 17, device=CPU), "fp16")
    text = "In the lower precision the outputs are not finite"
    with pytest.raises(RunError, match=text), writing(half, tmp_path / "model.onnx") as file:
        likeness(large, card, file)
    assert list(tmp_path.iterdir()) == []
    with writing(to_half(proto, "fp16"), tmp_path / "model.onnx") as file:
        assert 0.99 < likeness(model, card, file) <= 1


def test_nodes_are_named_after_their_modules(small):
    names = {node.name for node in small[2].graph.node}
    assert any(name.startswith("backbone.blocks.1.mlp.fc1/") for name in names), sorted(names)[:20]
    assert len(names) == len(small[2].graph.node), "names are not unique"


def test_an_invalid_graph_fails_and_leaves_the_old_file(small, tmp_path):
    _, _, proto = small
    (tmp_path / "model.onnx").write_bytes(b"the old one")
    faulty = onnx.ModelProto()
    faulty.CopyFrom(proto)
    faulty.graph.node[0].op_type = "NoSuchOperator"
    text = "onnx rejects the graph: No Op registered for NoSuchOperator"
    with pytest.raises(RunError, match=text), writing(faulty, tmp_path / "model.onnx"):
        pytest.fail("a faulty graph was given out")
    assert (tmp_path / "model.onnx").read_bytes() == b"the old one"
    assert len(list(tmp_path.iterdir())) == 1


def test_weights_too_large_for_one_file_are_in_a_second_file(small, tmp_path, monkeypatch):
    model, card, proto = small
    monkeypatch.setattr(onnx_module, "LARGEST_PROTOBUF", 1_000_000)
    path = tmp_path / "model.onnx"
    with writing(proto, path) as file:
        compare(model, card, file)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < 1_000_000 < file_bytes(path)
    compare(model, card, path)
    assert read_onnx_card(path) == card
    monkeypatch.undo()
    with writing(proto, path):
        pass
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"], "the old weights were left behind"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "No ONNX file at"),
        (b"", "model.onnx is not an ONNX file, or damaged (ValueError: it has no nodes)"),
        (b"hello, I am a text", "model.onnx is not an ONNX file, or damaged"),
        (b"PK\x03\x04", "model.onnx is not an ONNX file, or damaged"),
    ],
)
def test_other_files_are_an_error(tmp_path, content, text):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_onnx_card(path)
    assert text in str(error.value)


def test_a_truncated_file_is_an_error(small, tmp_path):
    _, _, proto = small
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString()[:-5000])
    with pytest.raises(CheckpointError, match="is not an ONNX file, or damaged"):
        read_onnx(tmp_path / "model.onnx")


def test_missing_weights_are_named(small, tmp_path, monkeypatch):
    _, _, proto = small
    monkeypatch.setattr(onnx_module, "LARGEST_PROTOBUF", 1000)
    with writing(proto, tmp_path / "model.onnx"):
        pass
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(CheckpointError) as error:
        read_onnx(tmp_path / "model.onnx")
    assert "model.onnx.data" in str(error.value)


def test_a_file_of_another_program_is_an_error(small, tmp_path):
    _, _, proto = small
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    del other.metadata_props[:]
    onnx.save_model(other, tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="has no OpenMAE metadata"):
        read_onnx_card(tmp_path / "model.onnx")
