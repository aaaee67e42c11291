"""Read the ONNX file that an engine is built from, and convert its graph to the requested precision."""

from __future__ import annotations

import difflib
import logging
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from openmae.engines.metadata import INPUT, ModelCard, Precision
from openmae.engines.module import example_input
from openmae.engines.onnx import cosine, read_card, read_onnx
from openmae.engines.packages import ModelProto, onnx, onnxruntime
from openmae.engines.precision import precision_of, to_half, to_int8
from openmae.errors import CheckpointError, SpecError
from openmae.spec.option import EngineType
from openmae.storage.encryption import Key, is_encrypted, read_bytes, temporaries_in_memory

_TYPE_KEY = "gen_trt_engine.tensorrt.data_type"
_KEEP_KEY = "gen_trt_engine.tensorrt.layers_precision"
_LEAST_COSINE = 0.9  # a lower cosine similarity, or NaN, means that values have overflowed
_WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors")

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class Source:
    """An ONNX file.

    Attributes:
        card: its metadata; None if another program wrote it.
        precision: precision of its weights; int8 if it is quantised.
        batch: batch size of its inputs; -1 for any.
        key: key of an encrypted file; None for a plain one.
    """

    path: Path
    card: ModelCard | None
    precision: Precision
    batch: int
    nodes: tuple[str, ...]
    key: Key | None = None


def read_source(path: Path, key: Key | None = None) -> Source:
    """Read the metadata of an ONNX file; weights in a second file are not read.

    Raises:
        CheckpointError: the file is missing, damaged or not ONNX, its metadata is of another version, or an axis other
            than the batch is dynamic.
    """
    if path.is_file() and (path.suffix.lower() in _WEIGHTS or zipfile.is_zipfile(path)):
        raise CheckpointError(
            f"{path} is a checkpoint, and engines are built from ONNX.",
            f"Export it first: mae export export.checkpoint={path} export.onnx_file={path.with_suffix('.onnx')}",
        )
    proto = read_onnx(path, key, weights=False)
    nodes = tuple(node.name for node in proto.graph.node)
    return Source(
        path, read_card(proto), precision_of(proto), _batch(proto), nodes, key if is_encrypted(path) else None
    )


def choose_precision(source: Source, asked: EngineType, *, can_time: bool) -> tuple[Precision, ...]:
    """Return the precisions to build; the fastest engine is kept.

    A file that is not in fp32 keeps its precision, since lost precision cannot be restored. ``asked`` is
    ``gen_trt_engine.tensorrt.data_type``; ``can_time`` is set if the engine can run on a GPU of this machine.

    Raises:
        SpecError: the file has another precision than the requested one.
    """
    held = source.precision
    if held != "fp32":
        if asked == "fp32,fp16":
            if held != "fp16":
                log.warning("%s=%s has no effect: the ONNX file is %s, so the engine is too.", _TYPE_KEY, asked, held)
        elif asked != held:
            raise SpecError(
                f"{_TYPE_KEY} is {asked}, but the weights or activations of {source.path} are {held} already.",
                f"Set {_TYPE_KEY}={held}, or export the model again with export.quantize=none.",
            )
        return (held,)
    if asked == "fp32,fp16":
        if can_time:
            return ("fp32", "fp16")
        log.warning("%s=%s builds fp16: this machine has no GPU of the target's kind to time both.", _TYPE_KEY, asked)
        return ("fp16",)
    return (asked,)


def kept_nodes(source: Source, layers_precision: Sequence[str]) -> list[str]:
    """Convert entries ``name:fp32``, in which ``*`` matches any characters, to fnmatch patterns of node names.

    Raises:
        SpecError: an entry matches no node.
    """
    names = [entry.rpartition(":")[0] for entry in layers_precision]
    patterns = [name.replace("[", "[[]").replace("?", "[?]") for name in names]
    for pattern in patterns:
        if not any(fnmatchcase(node, pattern) for node in source.nodes):
            nearest = difflib.get_close_matches(pattern.replace("*", ""), source.nodes, n=3, cutoff=0.0)
            raise SpecError(
                f"{_KEEP_KEY}: No node of {source.path} matches {pattern!r}.",
                f"The nearest names are {', '.join(nearest)}; * stands for any characters.",
            )
    return patterns


@contextmanager
def in_precision(
    source: Source, precision: Precision, keep: Sequence[str], batches: Iterable[np.ndarray], folder: Path
) -> Iterator[Path | bytes]:
    """Yield the model in a precision: a path, or the serialized graph if the source is encrypted.

    ``keep`` is the result of ``kept_nodes``, ``batches`` are inputs to calibrate int8 with, and ``folder`` is for a
    temporary file.
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
        # weights in a second file may exceed the size of a protobuf message
        onnx.save_model(proto, path, save_as_external_data=True, location="model.data")
        del proto
        yield path


def _check_range(plain: ModelProto, half: ModelProto, source: Source) -> None:
    """Run both graphs on random images, and raise a SpecError if activations exceed the range of fp16."""
    assert source.card is not None
    image = example_input(source.card, max(1, source.batch)).numpy()
    graphs = [proto.SerializeToString() for proto in (half, plain)]
    sessions = [onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]) for graph in graphs]
    found = [session.run(None, {INPUT: image}) for session in sessions]
    if not all(cosine(one, other) > _LEAST_COSINE for one, other in zip(*found, strict=True)):  # false for NaN
        raise SpecError(
            f"{_TYPE_KEY}: in fp16 the outputs of {source.path} are no longer those of fp32.",
            f"Set {_TYPE_KEY}=bf16, which has the range of fp32, or fp32; or keep nodes in fp32 with {_KEEP_KEY}.",
        )


def _batch(proto: ModelProto) -> int:
    """Return the batch size of the inputs; -1 for any. The other axes must be fixed."""
    weights = {tensor.name for tensor in proto.graph.initializer}  # old exporters list them among the inputs
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
