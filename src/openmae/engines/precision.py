"""Convert an ONNX model to lower precision: half precision by casting, int8 by calibration."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from openmae.engines.metadata import Precision
from openmae.engines.onnx import LARGEST_PROTOBUF, weight_bytes
from openmae.engines.packages import ModelProto, TensorProto, float16, onnx
from openmae.errors import SpecError

if TYPE_CHECKING:
    from onnx import NodeProto

Half = Literal["fp16", "bf16"]

_FP16_MAX = float(np.finfo(np.float16).max)
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})
# Squares and sums over many values: in fp16 they exceed 65504, in bf16 small values are lost. ONNX defines that
# LayerNormalization computes in fp32 whatever its input type, but TensorRT uses the input type.
_SUMS = frozenset(
    {"ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "Pow", "CumSum"}
    | {"LayerNormalization", "InstanceNormalization", "GroupNormalization"}
)
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Sqrt", "ReduceMean", "ReduceSum"})
_PREPROCESSING = frozenset({"Cast", "Add", "Sub", "Mul", "Div", "Transpose"})


def to_half(model: ModelProto, kind: Half, keep: Sequence[str] = ()) -> ModelProto:
    """Return the model with fp16 or bf16 weights and arithmetic; inputs and outputs keep their types.

    Sums over many values (normalisation, GRN, pooling) stay in fp32, and so do the normalisation of a uint8 input and,
    for fp16, nodes that read a constant above 65504. ``keep`` are name patterns (``*`` matches any characters) of other
    nodes that stay in fp32. The given model, in fp32, is not changed.

    Raises:
        SpecError: the model is larger than 2 GB.
    """
    from onnxruntime.transformers.onnx_model import OnnxModel

    source = _named_copy(model)
    blocked = _matching(source, keep) | _unsafe(source, kind)
    _split_constants(source, blocked)
    del source.graph.value_info[:]  # exporters list constants there, and the converter would treat them as activations
    half = float16.convert_float_to_float16(
        source, keep_io_types=True, op_block_list=[], node_block_list=sorted(blocked)
    )
    _drop_round_trips(half)
    if kind == "bf16":
        _retype(half, source)
    OnnxModel(half).topological_sort()
    del half.graph.value_info[:]  # the converter leaves incorrect types there
    return _with_graph(model, onnx.shape_inference.infer_shapes(half, strict_mode=True))


def to_int8(model: ModelProto, batches: Iterable[NDArray[np.generic]], keep: Sequence[str] = ()) -> ModelProto:
    """Return the model with quantised matrix products and convolutions (QuantizeLinear, DequantizeLinear).

    Weights are int8 per output channel; activations are int8 per tensor, with the range seen in ``batches``. All zero
    points are 0, as TensorRT requires; in ONNX Runtime on x86, uint8 activations were at most 17 % faster. Depthwise
    convolutions and products of two activations (attention) stay in fp32: quantised, they were less accurate and, in
    ONNX Runtime, no faster. ``keep`` are name patterns (``*`` matches any characters) of other nodes that stay in fp32.
    ``batches`` are inputs of the model, read once, one at a time. The given model, in fp32, is not changed.

    Raises:
        SpecError: nothing is left to quantise, or the model is larger than 2 GB.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization import quant_utils

    source = _named_copy(model)
    nodes = sorted(_worth_int8(source) - _matching(source, keep))
    if not nodes:
        raise SpecError(
            "Nothing is left to quantise to int8: every MatMul, Gemm or Conv with constant weights is kept in fp32 "
            f"(kept: {', '.join(keep) or 'none'}).",
            "Keep fewer nodes in fp32, or choose another precision.",
        )
    quant_utils.add_pre_process_metadata(source)  # avoids a warning about an optimization that loading applies
    with tempfile.TemporaryDirectory(prefix="openmae-int8-") as folder:
        path = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            source,
            path,
            _Reader(source.graph.input[0].name, batches),
            op_types_to_quantize=sorted(_PRODUCTS),
            nodes_to_quantize=nodes,
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,  # TensorRT does not support int32 biases
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],  # GELU, softmax and norms take floats
            },
        )
        quantised = onnx.load(path)
    return _with_graph(model, quantised)


def precision_of(model: ModelProto) -> Precision:
    """Return the precision of a model's weights, or int8 if the model is quantised."""
    if any(node.op_type in _QUANTIZERS for node in model.graph.node):
        return "int8"
    types = {tensor.data_type for tensor in model.graph.initializer}
    if TensorProto.FLOAT16 in types:
        return "fp16"
    return "bf16" if TensorProto.BFLOAT16 in types else "fp32"


class _Reader:
    """Calibration batches as an ``onnxruntime.quantization.CalibrationDataReader``."""

    def __init__(self, input_name: str, batches: Iterable[NDArray[np.generic]]) -> None:
        self._inputs = ({input_name: batch} for batch in batches)

    def get_next(self) -> dict[str, NDArray[np.generic]] | None:
        return next(self._inputs, None)


def _named_copy(model: ModelProto) -> ModelProto:
    """Return a copy in which all nodes have names; reject a model that is too large for the converters."""
    size = weight_bytes(model)
    if size > LARGEST_PROTOBUF:
        raise SpecError(
            f"Only models of up to {LARGEST_PROTOBUF:,} bytes can be converted to half precision or int8; this one has "
            f"{size:,}.",
            "Use fp32, or a smaller architecture.",
        )
    named = copy.deepcopy(model)
    for number, node in enumerate(named.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    return named


def _with_graph(model: ModelProto, converted: ModelProto) -> ModelProto:
    """Return a copy of the model (metadata, opsets, producer) with the converted graph."""
    result = copy.deepcopy(model)
    result.graph.CopyFrom(converted.graph)
    return result


def _matching(model: ModelProto, patterns: Sequence[str]) -> set[str]:
    """Return the names of the nodes that match any of the patterns."""
    return {node.name for node in model.graph.node if any(fnmatchcase(node.name, pattern) for pattern in patterns)}


def _unsafe(model: ModelProto, kind: Half) -> set[str]:
    """Return the names of nodes that must stay in fp32 (see ``to_half``)."""
    graph = model.graph
    floats = [tensor for tensor in graph.initializer if kind == "fp16" and tensor.data_type == TensorProto.FLOAT]
    large = {tensor.name for tensor in floats if np.abs(onnx.numpy_helper.to_array(tensor)).max(initial=0) > _FP16_MAX}
    raw = {value.name for value in graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8}
    norms: set[str] = set()  # GRN: values computed from a norm, up to the next matrix product
    names = set()
    for node in graph.node:  # in topological order
        inputs = set(node.input)
        if node.op_type == "ReduceL2" or _is_square(node) or (node.op_type in _ELEMENTWISE and inputs & norms):
            norms.update(node.output)
            names.add(node.name)
        if node.op_type in _PREPROCESSING and inputs & raw:
            raw.update(node.output)
            names.add(node.name)
        if node.op_type in _SUMS or node.op_type in float16.DEFAULT_OP_BLOCK_LIST or inputs & large:
            names.add(node.name)
    return names


def _is_square(node: NodeProto) -> bool:
    return node.op_type == "Mul" and node.input[0] == node.input[1]


def _split_constants(model: ModelProto, blocked: set[str]) -> None:
    """Give nodes that stay in fp32 separate copies of shared constants, which the converter would round."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    shared = {name for node in model.graph.node if node.name not in blocked for name in node.input if name in constants}
    copies = set()
    for node in model.graph.node:
        if node.name not in blocked:
            continue
        for place, name in enumerate(node.input):
            if name in shared:
                node.input[place] = f"{name}_fp32"
                copies.add(name)
    for name in sorted(copies):
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(constants[name])
        tensor.name = f"{name}_fp32"


def _drop_round_trips(model: ModelProto) -> None:
    """Remove casts to fp16 and back between fp32 nodes, which the converter adds and which lose accuracy."""
    graph = model.graph
    fp32 = {
        value.name
        for value in chain(graph.input, graph.value_info)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    down = [node for node in graph.node if _casts_to(node, TensorProto.FLOAT16) and node.input[0] in fp32]
    wide = {node.output[0]: node.input[0] for node in down}
    up = [node for node in graph.node if _casts_to(node, TensorProto.FLOAT)]
    for node in up:
        node.input[0] = wide.get(node.input[0], node.input[0])
    back = {node.output[0]: node.input[0] for node in up if node.input[0] in fp32}
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = back.get(name, name)
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    nodes = [node for node in graph.node if node.op_type != "Cast" or node.output[0] in used]
    del graph.node[:]
    graph.node.extend(nodes)


def _casts_to(node: NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and any(item.name == "to" and item.i == kind for item in node.attribute)


def _retype(model: ModelProto, source: ModelProto) -> None:
    """Convert fp16 to bf16 in place; constants are rounded once, from fp32."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in source.graph.initializer}
    attributes = {
        (node.name, item.name): item.t for node in source.graph.node for item in node.attribute if item.HasField("t")
    }
    for tensor in graph.initializer:
        _to_bf16(tensor, constants[tensor.name])
    for node in graph.node:
        for item in node.attribute:
            if item.name in ("to", "dtype") and item.i == TensorProto.FLOAT16:
                item.i = TensorProto.BFLOAT16
            if item.HasField("t"):
                _to_bf16(item.t, attributes[node.name, item.name])


def _to_bf16(tensor: TensorProto, exact: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT16:
        values = torch.from_numpy(onnx.numpy_helper.to_array(exact).copy()).to(torch.bfloat16)
        raw = values.view(torch.int16).numpy().astype("<i2").tobytes()
        tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, TensorProto.BFLOAT16, exact.dims, raw, raw=True))


def _worth_int8(model: ModelProto) -> set[str]:
    """Return the names of MatMul, Gemm and Conv nodes with constant weights, except grouped convolutions."""
    constants = {tensor.name for tensor in model.graph.initializer}
    names = set()
    for node in model.graph.node:
        groups = next((item.i for item in node.attribute if item.name == "group"), 1)
        if node.op_type in _PRODUCTS and node.input[1] in constants and groups == 1:
            names.add(node.name)
    return names
