"""Half precision and int8 keep what the model says and what it is: names, metadata, opset, outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from openmae.engines import precision
from openmae.engines.precision import Half, precision_of, to_half, to_int8
from openmae.engines.rewriting import rewritten
from openmae.errors import SpecError

# shallow and narrow, with every kind of node that the whole architectures have
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2, "embed_dim": 48, "global_pool": "avg"}),
    "convnextv2": ("convnextv2_atto", 64, {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": 64, "stages": (1, 1, 1, 1), "embed_dim": 16}),
}
FAMILIES = tuple(MODELS)
OPSET = 18
METADATA = {"arch": '"tiny"', "class_names": '["cat", "dog"]'}
Array = np.ndarray[Any, np.dtype[Any]]


def _export(family: str) -> ModelProto:
    """A classifier in which nothing starts at zero: GRN does, where nothing could go wrong."""
    name, size, options = MODELS[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    for label, parameter in model.named_parameters():
        if "grn" in label or "head.fc" in label or "head.weight" in label:
            nn.init.normal_(parameter, std=0.5)
    program = torch.onnx.export(
        rewritten(model, OPSET),
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    exported = program.model_proto
    helper.set_model_props(exported, METADATA)
    return exported


def _with_uint8_input_and_tokens(classifier: ModelProto) -> ModelProto:
    """The same graph with uint8 [N, H, W, C] in, normalised inside, and the feature map as a second output."""
    model = ModelProto()
    model.CopyFrom(classifier)
    graph = model.graph
    size = graph.input[0].type.tensor_type.shape.dim[2].dim_value
    for node in graph.node:
        node.input[:] = ["normal" if name == "input" else name for name in node.input]
    front = [
        helper.make_node("Transpose", ["input"], ["pixels"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["pixels"], ["pixels_float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Sub", ["pixels_float", "pixel_mean"], ["pixels_centred"], "subtract"),
        helper.make_node("Div", ["pixels_centred", "pixel_std"], ["normal"], "divide"),
    ]
    nodes = [*front, *graph.node]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info("input", TensorProto.UINT8, ["batch", size, size, 3]))
    graph.initializer.extend(
        numpy_helper.from_array(np.full((1, 3, 1, 1), value, np.float32), name)
        for name, value in {"pixel_mean": 118.0, "pixel_std": 62.0}.items()
    )
    pooling = [node for node in nodes if node.op_type == "ReduceMean"][-1]  # so the output is read inside too
    graph.output.append(helper.make_tensor_value_info(pooling.input[0], TensorProto.FLOAT, ["batch", 48, 2, 2]))
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, ModelProto]:
    """A classifier of each family, and one with a uint8 input and two outputs."""
    fused = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    built = {family: _export(family) for family in FAMILIES}
    timm.layers.set_fused_attn(bool(fused))
    built["uint8 input"] = _with_uint8_input_and_tokens(built["convnextv2"])
    return built


def _images(model: ModelProto, count: int, seed: int) -> Array:
    tensor = model.graph.input[0].type.tensor_type
    shape = (count, *(size.dim_value for size in tensor.shape.dim[1:]))
    random = np.random.default_rng(seed)
    if tensor.elem_type == TensorProto.UINT8:
        return random.integers(0, 256, shape, dtype=np.uint8)
    return random.standard_normal(shape).astype(np.float32)


def _run(model: ModelProto, images: Array) -> list[Array]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, {"input": images})]


def _quantise(model: ModelProto, keep: tuple[str, ...] = ()) -> ModelProto:
    return to_int8(model, (_images(model, 4, seed) for seed in range(4)), keep)


def _convert(model: ModelProto, kind: str, keep: tuple[str, ...] = ()) -> ModelProto:
    if kind in ("fp16", "bf16"):
        return to_half(model, "fp16" if kind == "fp16" else "bf16", keep)
    return _quantise(model, keep)


def _weights(model: ModelProto, node_name: str) -> Array:
    """The second input of a node, where it is a constant."""
    node = next(node for node in model.graph.node if node.name == node_name)
    return numpy_helper.to_array(next(item for item in model.graph.initializer if item.name == node.input[1]))


def _names(model: ModelProto, *op_types: str) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type in op_types]


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("name", [*FAMILIES, "uint8 input"])
def test_inputs_outputs_and_metadata_are_kept(models: dict[str, ModelProto], name: str, kind: str) -> None:
    model = models[name]
    before = model.SerializeToString(deterministic=True)
    converted = _convert(model, kind)
    assert model.SerializeToString(deterministic=True) == before, "the caller's model was changed"
    assert {item.key: item.value for item in converted.metadata_props} == METADATA
    assert [(item.domain, item.version) for item in converted.opset_import] == [("", OPSET)]
    assert converted.ir_version == model.ir_version
    assert list(converted.graph.input) == list(model.graph.input), "the input changed its name, type or shape"
    assert list(converted.graph.output) == list(model.graph.output), "an output changed its name, type or shape"
    if kind == "bf16":  # ONNX has Conv in bf16 since opset 22, TensorRT takes it in any
        converted.opset_import[0].version = 22
    onnx.checker.check_model(converted, full_check=True)


@pytest.mark.parametrize("name", [*FAMILIES, "uint8 input"])
def test_fp16_gives_the_outputs_of_fp32(models: dict[str, ModelProto], name: str) -> None:
    model = models[name]
    half = to_half(model, "fp16")
    for count in (1, 3):
        images = _images(model, count, seed=9)
        for exact, rounded in zip(_run(model, images), _run(half, images), strict=True):
            assert rounded.dtype == np.float32
            np.testing.assert_allclose(rounded, exact, atol=5e-3 * np.abs(exact).max(), rtol=0)


def test_bf16_gives_the_outputs_of_fp32_in_the_reference_implementation(models: dict[str, ModelProto]) -> None:
    model = models["vit"]
    images = _images(model, 2, seed=9)
    exact = _run(model, images)[0]
    rounded = np.asarray(ReferenceEvaluator(to_half(model, "bf16")).run(None, {"input": images})[0])
    assert rounded.dtype == np.float32
    difference = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-4 < difference < 5e-2, f"bf16 has 8 bits, so about 1 % was expected; the difference is {difference:.2%}"


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_in_every_product_and_in_no_sum(models: dict[str, ModelProto], family: str) -> None:
    types: dict[Half, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
    for kind, narrow in types.items():
        half = to_half(models[family], kind)
        found = {item.name: item.type.tensor_type.elem_type for item in half.graph.value_info}
        found |= {item.name: item.data_type for item in half.graph.initializer}
        for node in half.graph.node:
            if node.op_type in ("MatMul", "Gemm", "Conv"):
                assert {found[name] for name in node.input} == {narrow}, f"{node.name} is not in {kind}"
            if node.op_type in ("LayerNormalization", "ReduceL2", "ReduceMean"):
                assert found[node.input[0]] == TensorProto.FLOAT, f"{node.name} is not in fp32"


def _grn(size: int, root: bool) -> ModelProto:
    """ConvNeXt V2's GRN behind a 1x1 convolution: as we export it, the root of a sum of squares, or with ReduceL2."""
    constants = {
        "weight": np.ones((1, 1, 1, 1), np.float32),
        "eps": np.float32(1e-6),
        "gamma": np.full((1, 1, 1, 1), 0.5, np.float32),
        "spatial": np.array([2, 3]),
        "channel": np.array([1]),
    }
    norm = [helper.make_node("ReduceL2", ["x", "spatial"], ["norm"], "norm")]
    if root:
        norm = [
            helper.make_node("Mul", ["x", "x"], ["squares"], "squares"),
            helper.make_node("ReduceSum", ["squares", "spatial"], ["total"], "total"),
            helper.make_node("Sqrt", ["total"], ["norm"], "norm"),
        ]
    nodes = [
        helper.make_node("Conv", ["input", "weight"], ["x"], "conv"),
        *norm,
        helper.make_node("ReduceMean", ["norm", "channel"], ["mean"], "mean"),
        helper.make_node("Add", ["mean", "eps"], ["sum"], "sum"),
        helper.make_node("Div", ["norm", "sum"], ["ratio"], "ratio"),
        helper.make_node("Mul", ["x", "ratio"], ["scaled"], "scaled"),
        helper.make_node("Mul", ["gamma", "scaled"], ["weighted"], "weighted"),
        helper.make_node("Conv", ["weighted", "weight"], ["logits"], "last"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "grn",
        [value("input", TensorProto.FLOAT, ["batch", 1, size, size])],
        [value("logits", TensorProto.FLOAT, ["batch", 1, size, size])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


@pytest.mark.parametrize("root", [True, False])
def test_fp16_norm_of_large_activations_does_not_overflow(root: bool) -> None:
    """In the reference implementation: ONNX Runtime has no such kernels for the CPU, and computes in fp32."""
    model = _grn(28, root)
    images = np.full((1, 1, 28, 28), 3000.0, np.float32)  # the norm is 84,000, its square 7e9; fp16 ends at 65504
    exact = _run(model, images)[0]
    assert exact.max() == pytest.approx(1500)
    rounded = np.asarray(ReferenceEvaluator(to_half(model, "fp16")).run(None, {"input": images})[0])
    np.testing.assert_allclose(rounded, exact, rtol=1e-3)


def _there_and_back(constant: float) -> ModelProto:
    """x * constant / constant: nodes ``product`` and ``quotient`` share the constant."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["input", "constant"], ["scaled"], "product"),
            helper.make_node("Div", ["scaled", "constant"], ["logits"], "quotient"),
        ],
        "constants",
        [value("input", TensorProto.FLOAT, ["batch", 4])],
        [value("logits", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.float32(constant), "constant")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def test_nodes_with_constants_beyond_fp16_stay_in_fp32() -> None:
    images = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    half = to_half(_there_and_back(1e6), "fp16")
    assert _weights(half, "product") == np.float32(1e6)
    np.testing.assert_allclose(_run(half, images)[0], images, rtol=1e-3)  # through 4e6, which fp16 cannot hold


def test_kept_node_reads_a_shared_constant_unrounded() -> None:
    model = _there_and_back(0.1)
    half = to_half(model, "fp16", keep=["prod*"])
    assert _weights(half, "product").dtype == np.float32
    assert _weights(half, "product") == np.float32(0.1)
    assert _weights(half, "quotient").dtype == np.float16


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8"])
def test_kept_nodes_stay_in_fp32(models: dict[str, ModelProto], kind: str) -> None:
    model = models["vit"]
    products = _names(model, "MatMul", "Gemm")
    kept, other = products[0], products[-1]
    converted = _convert(model, kind, (kept[:-1] + "[" + kept[-1] + "]",))
    assert _weights(converted, kept).dtype == np.float32, f"{kept} was kept in fp32"
    changed = next(node for node in converted.graph.node if node.name == other)
    floats = {item.name for item in converted.graph.initializer if item.data_type == TensorProto.FLOAT}
    assert changed.input[1] not in floats, f"{other} was not to be kept"


@pytest.mark.parametrize("name", [*FAMILIES, "uint8 input"])
def test_int8_is_close_to_fp32(models: dict[str, ModelProto], name: str) -> None:
    model = models[name]
    quantised = _quantise(model)
    assert precision_of(quantised) == "int8"
    assert precision_of(model) == "fp32"
    images = _images(model, 64, seed=9)
    exact, rounded = (output.reshape(64, -1) for output in (_run(model, images)[0], _run(quantised, images)[0]))
    cosines = (exact * rounded).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert cosines.min() > 0.98, f"smallest cosine similarity {cosines.min():.4f}"
    ordered = np.sort(exact, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 0.1 * np.ptp(exact, axis=1)
    assert clear.sum() > 16, "too few images with a clear class to compare"
    assert (exact.argmax(1) == rounded.argmax(1))[clear].all(), "int8 changed a clear class"
    assert _run(quantised, images[:1])[0].shape[0] == 1, "the batch is not dynamic any more"


@pytest.mark.parametrize("family", FAMILIES)
def test_symmetric_int8_has_zero_points_of_zero_and_weights_per_channel(
    models: dict[str, ModelProto], family: str
) -> None:
    quantised = _quantise(models[family])
    constants = {item.name: numpy_helper.to_array(item) for item in quantised.graph.initializer}
    makers = {node.output[0]: node for node in quantised.graph.node}
    for node in quantised.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = constants[node.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any(), f"{node.name}: zero point {zero}"
    weights = [
        makers[node.input[1]]
        for node in quantised.graph.node
        if node.op_type in ("Gemm", "Conv") and node.input[1] in makers
    ]
    assert weights, "no Gemm and no Conv was quantised"
    for dequantise in weights:
        assert constants[dequantise.input[0]].dtype == np.int8
        assert constants[dequantise.input[1]].shape == constants[dequantise.input[0]].shape[:1]


def test_depthwise_convolutions_and_attention_products_stay_in_fp32(models: dict[str, ModelProto]) -> None:
    quantised = _quantise(models["convnextv2"])
    floats = {item.name for item in quantised.graph.initializer if item.data_type == TensorProto.FLOAT}
    convolutions = [node for node in quantised.graph.node if node.op_type == "Conv"]
    grouped = {node.name: any(item.name == "group" and item.i > 1 for item in node.attribute) for node in convolutions}
    assert sum(grouped.values()) == 4, "one depthwise convolution in each of four blocks"
    assert {node.name: node.input[1] in floats for node in convolutions} == grouped
    quantised = _quantise(models["vit"])
    makers = {output: node.op_type for node in quantised.graph.node for output in node.output}
    products = [node for node in quantised.graph.node if node.op_type == "MatMul"]
    plain = [node for node in products if makers[node.input[1]] != "DequantizeLinear"]
    assert len(plain) == 4, "two products of activations in each of two blocks"
    assert all(makers[node.input[0]] != "DequantizeLinear" for node in plain)


def test_keeping_everything_leaves_nothing_to_quantise(models: dict[str, ModelProto]) -> None:
    with pytest.raises(SpecError, match=r"Nothing is left to quantise to int8.*\(kept: \*\)"):
        _quantise(models["vit"], keep=("*",))


def test_models_that_are_too_large_are_refused(models: dict[str, ModelProto], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models["vit"]
    monkeypatch.setattr(precision, "LARGEST_PROTOBUF", 1000)
    with pytest.raises(SpecError, match=r"up to 1,000 bytes .* this one has [0-9,]+"):
        to_half(model, "fp16")
    with pytest.raises(SpecError, match="up to 1,000 bytes"):
        to_int8(model, [_images(model, 1, seed=0)])


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensorrt_builds_an_engine(models: dict[str, ModelProto], family: str, kind: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(_convert(models[family], kind).SerializeToString())
    assert parsed, [str(parser.get_error(number)) for number in range(parser.num_errors)]
    types = {"fp16": trt.DataType.HALF, "bf16": trt.DataType.BF16, "int8": trt.DataType.INT8}
    found = {network.get_layer(number).get_output(0).dtype for number in range(network.num_layers)}
    assert types[kind] in found, f"the network has no {kind}"
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM80, 0)
    profile = builder.create_optimization_profile()
    shape = tuple(network.get_input(0).shape)[1:]
    profile.set_shape("input", (1, *shape), (4, *shape), (8, *shape))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None, "TensorRT refused the network"
