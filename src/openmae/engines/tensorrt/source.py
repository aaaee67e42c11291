"""The ONNX file that an engine is built from: what it holds, and its graph in the precision asked for."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from openmae.engines.metadata import INPUT, ModelCard, Precision
from openmae.engines.module import example_input
from openmae.engines.onnx import cosine, read_card, read_onnx
from openmae.engines.precision import is_quantized, to_half, to_int8
from openmae.engines.session import run_once
from openmae.errors import CheckpointError, SpecError
from openmae.storage.encryption import Key, is_encrypted, read_bytes, temporaries_in_memory

_TYPE_KEY = "gen_trt_engine.tensorrt.data_type"
_KEEP_KEY = "gen_trt_engine.tensorrt.layers_precision"
_LEAST_COSINE = 0.9  # what overflows is not finite; what is lower than this is another model
_WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors")

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class Source:
    """An ONNX file.

    Attributes:
        path: of the file.
        card: what it says of itself; None where another program wrote it.
        precision: of its arithmetic; int8 where it is quantised.
        batch: N of its inputs; -1 for any.
        nodes: names of its nodes.
        key: opens it; None for a plain file.
    """

    path: Path
    card: ModelCard | None
    precision: Precision
    batch: int
    nodes: tuple[str, ...]
    key: Key | None = None


def read_source(path: Path, key: Key | None = None) -> Source:
    """Look at an ONNX file; weights beside it are not read. ``key`` opens an encrypted one.

    Raises:
        CheckpointError: it is missing, damaged or no ONNX, its card is of another version, or an axis other than the
            batch is dynamic.
    """
    if path.is_file() and (path.suffix.lower() in _WEIGHTS or zipfile.is_zipfile(path)):
        raise CheckpointError(
            f"{path} is a checkpoint, and engines are built from ONNX.",
            f"Export it first: mae export export.checkpoint={path} export.onnx_file={path.with_suffix('.onnx')}",
        )
    proto = read_onnx(path, key, weights=False)
    nodes = tuple(node.name for node in proto.graph.node)
    return Source(path, read_card(proto), _precision(proto), _batch(proto), nodes, key if is_encrypted(path) else None)


def choose_precision(source: Source, asked: str, *, can_time: bool) -> tuple[Precision, ...]:
    """The precisions to build, of which the fastest is kept.

    A file that is fp16 or quantised keeps its precision: what its weights have lost does not come back.

    Args:
        source: the ONNX file.
        asked: ``gen_trt_engine.tensorrt.data_type``.
        can_time: the engine runs on the GPU that is here.

    Raises:
        SpecError: the file has another precision than the one asked for.
    """
    held = source.precision
    if held != "fp32":
        if asked == "fp32,fp16":
            if held != "fp16":
                log.warning(
                    "%s=%s does not act: the ONNX file is %s, and so will be the engine.", _TYPE_KEY, asked, held
                )
        elif asked != held:
            raise SpecError(
                f"{_TYPE_KEY} is {asked}, but the weights or activations of {source.path} are {held} already.",
                f"Set {_TYPE_KEY}={held}, or export the model anew with export.quantize=none.",
            )
        return (held,)
    if asked == "fp32,fp16":
        if can_time:
            return ("fp32", "fp16")
        log.warning(
            "%s=%s is built as fp16: no GPU of the kind that it is for is here to time both on.", _TYPE_KEY, asked
        )
        return ("fp16",)
    assert asked in ("fp32", "fp16", "bf16", "int8")
    return (asked,)  # type: ignore[return-value]


def kept_nodes(source: Source, layers_precision: Sequence[str]) -> list[str]:
    """The fnmatch patterns of the nodes that stay in fp32.

    Args:
        source: the ONNX file.
        layers_precision: ``name:fp32`` each, where ``*`` stands for any characters.

    Raises:
        SpecError: no node has such a name.
    """
    patterns = []
    for entry in layers_precision:
        name = entry.rpartition(":")[0]
        pattern = name.replace("[", "[[]").replace("?", "[?]")
        if not any(fnmatchcase(node, pattern) for node in source.nodes):
            near = get_close_matches(name, source.nodes, n=3, cutoff=0) or source.nodes[:3]
            raise SpecError(
                f"{_KEEP_KEY}: no node of {source.path} is called {name!r}.",
                f"Names there are such as {', '.join(near)}; * stands for any characters.",
            )
        patterns.append(pattern)
    return patterns


@contextmanager
def in_precision(
    source: Source, precision: Precision, keep: Sequence[str], batches: Iterable[np.ndarray], folder: Path
) -> Iterator[Path | bytes]:
    """ONNX in a precision: the file itself where it has it, else a temporary one; of an encrypted file its content.

    Args:
        source: the ONNX file.
        precision: as ``choose_precision`` gives it.
        keep: patterns of nodes that stay in fp32.
        batches: inputs as the model takes them, to calibrate int8 with.
        folder: that has room for the temporary file.
    """
    if precision == source.precision:
        yield read_bytes(source.path, source.key) if source.key else source.path
        return
    proto = read_onnx(source.path, source.key)
    if precision == "int8":
        with temporaries_in_memory(source.key):
            proto = to_int8(proto, batches, keep)
    else:
        assert precision != "fp32"
        half = to_half(proto, precision, keep)
        if precision == "fp16" and source.card is not None:
            _check_range(proto, half, source)
        proto = half
    if source.key:
        yield proto.SerializeToString()
        return
    with TemporaryDirectory(prefix=f".{source.path.stem}.", dir=folder) as temporary:
        path = Path(temporary) / "model.onnx"
        # beside the graph, so that no size is too large for a protobuf message
        onnx.save_model(proto, path, save_as_external_data=True, location="model.data")
        del proto
        yield path


def _check_range(plain: ModelProto, half: ModelProto, source: Source) -> None:
    """Run both on a random image: an activation beyond fp16 makes everything after it infinite, and nobody would say.

    Raises:
        SpecError: that happens.
    """
    assert source.card is not None
    image = example_input(source.card, max(1, source.batch)).numpy()
    found = [run_once(proto, {INPUT: image}) for proto in (half, plain)]
    if not all(cosine(ours, theirs) > _LEAST_COSINE for ours, theirs in zip(*found, strict=True)):  # NaN as well
        raise SpecError(
            f"{_TYPE_KEY}: in fp16 the outputs of {source.path} are no longer those of fp32.",
            f"Set {_TYPE_KEY}=bf16, which has the range of fp32, or fp32; or keep nodes in fp32 by {_KEEP_KEY}.",
        )


def _precision(proto: ModelProto) -> Precision:
    if is_quantized(proto):
        return "int8"
    types = {tensor.data_type for tensor in proto.graph.initializer}
    if TensorProto.FLOAT16 in types:
        return "fp16"
    return "bf16" if TensorProto.BFLOAT16 in types else "fp32"


def _batch(proto: ModelProto) -> int:
    """N of the inputs; the other axes must be fixed."""
    weights = {tensor.name for tensor in proto.graph.initializer}  # old files list them among the inputs
    batches = set()
    for value in proto.graph.input:
        if value.name in weights:
            continue
        axes = value.type.tensor_type.shape.dim
        sizes = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in axes]
        if not sizes or min(sizes[1:], default=0) < 0:
            shape = ", ".join(
                axis.dim_param or str(axis.dim_value) if axis.WhichOneof("value") else "?" for axis in axes
            )
            raise CheckpointError(
                f"Only the first axis of an input may be dynamic, but {value.name!r} has the shape [{shape}].",
                "Export the model with a fixed image size.",
            )
        batches.add(sizes[0])
    if len(batches) != 1:
        raise CheckpointError(
            f"The inputs' batch sizes differ: {sorted(batches)}.", "Export the model with one batch size for all."
        )
    return batches.pop()
