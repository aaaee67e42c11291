"""Engines are really built with tensorrt_rtx, which needs no GPU; classic tensorrt: test_tensorrt_backend."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from openmae.engines.metadata import ModelCard
from openmae.engines.module import DeployedModel, example_input
from openmae.engines.onnx import trace
from openmae.engines.tensorrt.backend import Backend, choose_backend
from openmae.engines.tensorrt.builder import BuildSettings, build_engine, get_logger
from openmae.engines.tensorrt.sidecar import Profile
from openmae.engines.tensorrt.source import choose_precision, in_precision, kept_nodes, read_source
from openmae.errors import CheckpointError, RunError, SpecError
from openmae.models.build import ModelConfig, build_classifier

pytestmark = pytest.mark.xdist_group("trt")

SIZES = {"vit_tiny_patch16": (32, 48), "convnextv2_atto": (64, 64), "hiera_tiny_224": (64, 64)}
DYNAMIC = BuildSettings(Profile(1, 2, 4))


def rtx(*targets: str) -> Backend:
    return choose_backend("tensorrt_rtx", targets or ("sm_89",), 0)


def thinned(backbone: Any) -> Any:
    """Without blocks that are like the one before them: tracing takes most of the time here."""
    for blocks in [stage.blocks for stage in backbone.stages] if hasattr(backbone, "stages") else [backbone.blocks]:
        shapes = [[parameter.shape for parameter in block.parameters()] for block in blocks]
        for place in range(len(blocks) - 1, 0, -1):
            if shapes[place] == shapes[place - 1]:
                del blocks[place]
    return backbone


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """ONNX files as mae export writes them, each made once; convnextv2_atto's normalises bytes itself."""
    folder, cards = tmp_path_factory.mktemp("onnx"), {}

    def make(arch: str) -> tuple[Path, ModelCard]:
        path = folder / f"{arch}.onnx"
        if path not in cards:
            torch.manual_seed(0)
            card = ModelCard(
                "finetune",
                ModelConfig(arch, SIZES[arch], num_classes=3),
                (0.5,) * 3,
                (0.25,) * 3,
                ("a", "b", "c"),
                preprocessing=arch == "convnextv2_atto",
            )
            model = DeployedModel(thinned(build_classifier(card.model)), card).eval()
            onnx.save(trace(model, card, 17, device=torch.device("cpu")), path)
            cards[path] = card
        return path, cards[path]

    return make


def write_graph(path: Path, *nodes: Any, shape: tuple[Any, ...] = ("batch", 3, 8, 8), weights: Any = ()) -> Path:
    """A graph of a few nodes from ``x`` to ``y``."""
    nodes = nodes or (helper.make_node("Relu", ["x"], ["y"], name="act/relu"),)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    graph = helper.make_graph(nodes, "graph", [x], [y], list(weights))
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def is_malformed(engine: bytes) -> bool:
    """Its header, that is; more of an engine cannot be read without a GPU."""
    import tensorrt_rtx

    runtime = tensorrt_rtx.Runtime(get_logger(tensorrt_rtx, "tensorrt_rtx"))
    return bool(runtime.get_engine_validity(engine)[1] & int(tensorrt_rtx.EngineInvalidityDiagnostics.MALFORMED_ENGINE))


# -------------------------------------------------------------------------------- real engines of tensorrt_rtx


@pytest.mark.parametrize(
    ("arch", "precision", "share"),
    [
        ("convnextv2_atto", "fp32", (1.0, 2.0)),
        ("convnextv2_atto", "fp16", (0.5, 1.5)),
        ("vit_tiny_patch16", "bf16", (0.5, 2.0)),
        ("vit_tiny_patch16", "int8", (0.25, 2.0)),
        pytest.param("hiera_tiny_224", "fp16", (0.5, 0.6), marks=pytest.mark.slow),  # ten seconds
    ],
)
def test_an_engine_is_built_without_a_gpu(exported, tmp_path, arch, precision, share):
    path, card = exported(arch)
    source = read_source(path)
    assert source.card == card, "the ONNX file's metadata did not come through"
    assert (source.precision, source.batch) == ("fp32", -1)
    batches = [example_input(card, 2).numpy()]
    with in_precision(source, precision, (), batches, tmp_path) as onnx_file:
        assert (onnx_file == path) is (precision == "fp32")
        built = build_engine(onnx_file, rtx("sm_80", "8.9"), DYNAMIC)
    taken = ((-1, *SIZES[arch], 3), "uint8") if card.preprocessing else ((-1, 3, *SIZES[arch]), "float32")
    assert [(t.name, t.shape, t.dtype) for t in built.inputs] == [("input", *taken)]
    assert [(t.name, t.shape, t.dtype) for t in built.outputs] == [("logits", (-1, 3), "float32")]
    assert not is_malformed(bytes(built.engine)), "TensorRT does not know its own engine"
    least, most = (part * path.stat().st_size / 1e6 for part in share)
    assert least < built.megabytes < most, "the weights are not in the engine, or not in this precision"
    assert list(tmp_path.iterdir()) == [], "the cast graph was left behind"


def test_a_fixed_batch_needs_no_profile(tmp_path):
    path = write_graph(tmp_path / "a.onnx", shape=(4, 3, 8, 8))
    assert read_source(path).batch == 4
    assert build_engine(path, rtx(), BuildSettings(Profile(4, 4, 4))).inputs[0].shape == (4, 3, 8, 8)


def test_weights_in_a_second_file_are_found(tmp_path):
    bias = helper.make_tensor("bias", TensorProto.FLOAT, (3, 8, 8), np.zeros(192, np.float32).tobytes(), raw=True)
    path = write_graph(tmp_path / "a.onnx", helper.make_node("Add", ["x", "bias"], ["y"], name="add"), weights=[bias])
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="a.data", size_threshold=0)
    source = read_source(path)
    with in_precision(source, "fp32", (), (), tmp_path) as onnx_file:
        assert build_engine(onnx_file, rtx(), DYNAMIC).megabytes > 0
    (tmp_path / "a.data").unlink()
    with pytest.raises(CheckpointError, match="rejects the graph"):
        build_engine(path, rtx(), DYNAMIC)


def test_an_operator_that_the_parser_rejects_is_named(tmp_path):
    path = write_graph(tmp_path / "a.onnx", helper.make_node("Bernoulli", ["x"], ["y"], name="head/draw"))
    with pytest.raises(CheckpointError) as caught:
        build_engine(path, rtx(), DYNAMIC)
    assert "rejects the graph: Bernoulli node 'head/draw': UNSUPPORTED_NODE" in str(caught.value)
    assert "Fix: Export the model with another export.opset_version" in str(caught.value)


def test_messages_of_a_failed_build(tmp_path):
    weight = helper.make_tensor("w", TensorProto.FLOAT, (3, 3), np.eye(3, dtype=np.float32).tobytes(), raw=True)
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="fc")
    path = write_graph(tmp_path / "a.onnx", node, shape=("batch", 3), weights=[weight])
    with pytest.raises(RunError) as caught:
        build_engine(path, rtx("sm_75", "sm_89"), DYNAMIC)
    assert "could not build the engine" in str(caught.value)
    assert "FP32 GEMM is not supported" in str(caught.value), "the builder's own words are missing"
    assert "Fix: Try another gen_trt_engine.tensorrt.data_type" in str(caught.value)


def test_verbose_prints_the_messages_of_the_builder(tmp_path, caplog):
    path = write_graph(tmp_path / "a.onnx")
    with caplog.at_level(logging.INFO, "openmae"):
        build_engine(path, rtx(), DYNAMIC)
        assert caplog.messages == []
        build_engine(path, rtx(), BuildSettings(Profile(1, 2, 4), verbose=True))
    assert any("[tensorrt_rtx] " in message and "act/relu" in message for message in caplog.messages)


def test_ctrl_c_is_not_lost_in_the_builder(exported):
    path, _ = exported("vit_tiny_patch16")
    handler = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engine(path, rtx(), DYNAMIC)
    finally:
        timer.join()
    assert signal.getsignal(signal.SIGINT) is handler


# -------------------------------------------------------------------------------- the file and its precision


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.onnx", None, "No ONNX file at"),
        ("empty.onnx", b"", "is not an ONNX file, or damaged"),
        ("text.onnx", b"hello world " * 10, "is not an ONNX file, or damaged"),
        (
            "model.pth",
            b"PK\x03\x04",
            "is a checkpoint, and engines are built from ONNX.\n  Fix: Export it first: mae export",
        ),
    ],
)
def test_files_that_are_not_onnx(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_source(tmp_path / name)
    assert message in str(caught.value)


def test_a_truncated_file(exported, tmp_path):
    content = exported("convnextv2_atto")[0].read_bytes()
    (tmp_path / "half.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is not an ONNX file, or damaged"):
        read_source(tmp_path / "half.onnx")


def test_only_the_batch_may_be_dynamic(tmp_path):
    path = write_graph(tmp_path / "a.onnx", shape=("batch", 3, "height", 8))
    with pytest.raises(CheckpointError, match=r"'x' has the shape \[batch, 3, height, 8\]"):
        read_source(path)


def source_in(kind: int, tmp_path: Path) -> Any:
    weights = [helper.make_tensor("unused", kind, (1,), [0.0])]
    return read_source(write_graph(tmp_path / f"{kind}.onnx", weights=weights))


def test_the_precisions_to_build(tmp_path, caplog):
    plain = source_in(TensorProto.FLOAT, tmp_path)
    for asked in ("fp32", "fp16", "bf16", "int8"):
        assert choose_precision(plain, asked, can_time=False) == (asked,)
    assert choose_precision(plain, "fp32,fp16", can_time=True) == ("fp32", "fp16")
    assert caplog.messages == []
    assert choose_precision(plain, "fp32,fp16", can_time=False) == ("fp16",)
    assert "data_type=fp32,fp16 builds fp16: this machine has no GPU of the target's kind" in caplog.text


def test_a_file_in_lower_precision_keeps_its_precision(tmp_path, caplog):
    half = source_in(TensorProto.FLOAT16, tmp_path)
    assert choose_precision(half, "fp16", can_time=False) == ("fp16",)
    assert choose_precision(half, "fp32,fp16", can_time=True) == ("fp16",)
    assert caplog.messages == []
    with pytest.raises(SpecError) as caught:
        choose_precision(half, "fp32", can_time=False)
    assert "data_type is fp32, but the weights or activations of" in str(caught.value)
    assert "are fp16 already.\n  Fix: Set gen_trt_engine.tensorrt.data_type=fp16, or export" in str(caught.value)
    brain = source_in(TensorProto.BFLOAT16, tmp_path)
    assert choose_precision(brain, "fp32,fp16", can_time=True) == ("bf16",)
    assert "data_type=fp32,fp16 has no effect: the ONNX file is bf16, so the engine is too" in caplog.text


def test_a_quantised_file_is_built_unchanged(exported, tmp_path):
    path, card = exported("convnextv2_atto")
    with in_precision(read_source(path), "int8", (), [example_input(card, 2).numpy()], tmp_path) as quantised:
        source = read_source(quantised)
        assert source.precision == "int8"
        with in_precision(source, "int8", (), (), tmp_path) as same:
            assert same == quantised


def test_nodes_that_stay_in_fp32(tmp_path):
    source = read_source(write_graph(tmp_path / "a.onnx"))
    assert kept_nodes(source, ["act/*:fp32", "act/relu:fp32"]) == ["act/*", "act/relu"]
    with pytest.raises(SpecError, match=r"No node of .* matches 'act/rleu'"):
        kept_nodes(source, ["act/rleu:fp32"])
    with pytest.raises(SpecError, match=r"matches 'act/rel\[\?\]'.\n  Fix: The nearest names are act/relu"):
        kept_nodes(source, ["act/rel?:fp32"])


def test_kept_nodes_reach_the_graph(exported, tmp_path):
    path, _ = exported("convnextv2_atto")
    source = read_source(path)
    convs = [node.name for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    with in_precision(source, "fp16", kept_nodes(source, [f"{convs[0]}:fp32"]), (), tmp_path) as half:
        graph = onnx.load(half).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    found = {node.name: kinds.get(node.input[1]) for node in graph.node if node.op_type == "Conv"}
    assert found[convs[0]] == TensorProto.FLOAT, "the node that was to be kept was cast"
    assert found[convs[1]] == TensorProto.FLOAT16
