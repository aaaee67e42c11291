"""Export a torch model to an ONNX file, and verify the file against the model."""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from openmae.engines.metadata import INPUT, ModelCard
from openmae.engines.module import DeployedModel, example_input
from openmae.engines.packages import ModelProto, TensorProto, onnx
from openmae.engines.rewriting import rewritten
from openmae.engines.session import open_session
from openmae.errors import CheckpointError, RunError, SpecError
from openmae.storage.encryption import Key, created, unlocked

TOLERANCE = 1e-4  # largest accepted difference from torch, relative to the largest output
_SMALLEST = 1e-6  # the largest output is taken to be at least this
_BATCHES = (1, 3)  # batch sizes to verify a file with a dynamic batch with
_NATIVE_OPSET = 18  # oldest operator set that torch's exporter writes without conversion
LARGEST_PROTOBUF = 2**31 - 2**24  # bytes of weights in a protobuf message; leaves room for the graph
_FLOATS: dict[int, str] = {TensorProto.FLOAT: "<f4", TensorProto.FLOAT16: "<f2", TensorProto.DOUBLE: "<f8"}
_LARGE_TENSOR = 1024  # bytes; constants such as shapes and axes are smaller

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class Parity:
    """The largest difference between ONNX Runtime's outputs and torch's, and torch's largest output."""

    difference: float
    largest: float


def trace(
    model: DeployedModel, card: ModelCard, opset: int, *, device: torch.device, verbose: bool = False
) -> ModelProto:
    """Return the model's graph, with the card as metadata, in the requested operator set if possible.

    Args:
        model: model in eval mode; it is moved to the CPU.
        card: metadata; its batch size is that of the input, -1 for any.
        opset: ONNX operator set. If the graph cannot be converted to it, a warning gives the reason and the set used.
        device: device to trace the model on.
        verbose: show the messages of torch's exporter.

    Raises:
        SpecError: the installed onnx does not support the operator set.
    """
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise SpecError(
            f"export.opset_version: onnx {onnx.__version__} supports operator sets up to {newest}, got {opset}.",
            f"Set export.opset_version to {_NATIVE_OPSET - 1} (widely read) or up to {newest}.",
        )
    dynamic = card.batch_size == -1
    images = example_input(card, 2 if dynamic else card.batch_size).to(device)
    with contextlib.nullcontext() if verbose else _quiet():
        program = torch.onnx.export(
            rewritten(model, opset).to(device),
            (images,),
            dynamo=True,
            opset_version=max(opset, _NATIVE_OPSET),
            input_names=[INPUT],
            output_names=list(card.outputs),
            dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic else None,
            verbose=verbose,
        )
    model.cpu()  # tracing has moved its parameters
    assert program is not None
    proto = program.model_proto
    _rename_nodes(proto)
    proto = _lowered(proto, opset) if opset < _NATIVE_OPSET else proto
    onnx.helper.set_model_props(proto, card.to_metadata())
    proto.producer_name, proto.producer_version = "openmae", card.version
    return proto


def opset_of(proto: ModelProto) -> int:
    """Return the operator set of a graph."""
    return next(entry.version for entry in proto.opset_import if entry.domain == "")


def compare(model: DeployedModel, card: ModelCard, path: Path, key: Key | None = None) -> Parity:
    """Run an ONNX file and torch on random images, and return the largest relative difference.

    Raises:
        RunError: the difference exceeds ``TOLERANCE``.
    """
    worst, share = Parity(0.0, 0.0), -1.0
    for batch, name, found, expected in _outputs(model, card, path, key):
        parity = Parity(float(np.abs(found - expected).max()), float(np.abs(expected).max()))
        relative = parity.difference / max(parity.largest, _SMALLEST)
        if not relative <= TOLERANCE:  # true for NaN
            raise RunError(
                f"ONNX Runtime's {name} differs from torch's by {parity.difference:.2g} of {parity.largest:.2g} (batch "
                f"{batch}); at most {TOLERANCE:g} of the largest output is accepted. The file was removed.",
                "Try another export.opset_version; if that does not help, please report it as a bug.",
            )
        if relative > share:
            worst, share = parity, relative
    return worst


def likeness(model: DeployedModel, card: ModelCard, path: Path, key: Key | None = None) -> float:
    """Return the lowest cosine similarity between a file's outputs and torch's, over random images.

    Raises:
        RunError: an output is not finite.
    """
    cosines = [cosine(found, expected) for _, _, found, expected in _outputs(model, card, path, key)]
    lowest = float(np.min([1.0, *cosines]))  # NaN if one is
    if not np.isfinite(lowest):
        raise RunError(
            "In the lower precision the outputs are not finite: an activation exceeds its range. The file was removed.",
            "Export with export.quantize=none; gen_trt_engine.tensorrt.data_type=bf16 has the range of fp32.",
        )
    return lowest


def _outputs(
    model: DeployedModel, card: ModelCard, path: Path, key: Key | None
) -> Iterator[tuple[int, str, np.ndarray, np.ndarray]]:
    """Yield (batch size, output name, ONNX Runtime's value, torch's value) for random images."""
    session = open_session(path, torch.device("cpu"), key)
    for batch in _BATCHES if card.batch_size == -1 else (card.batch_size,):
        images = example_input(card, batch, seed=batch)
        with torch.no_grad():
            expected = [output.numpy() for output in model(images)]
        found = session.run(list(card.outputs), {INPUT: images.numpy()})
        yield from ((batch, *values) for values in zip(card.outputs, found, expected, strict=True))


def cosine(one_NX: np.ndarray, other_NX: np.ndarray) -> float:
    """Return the lowest cosine similarity over a batch; 1 for two zero vectors, NaN if a value is not finite."""
    one_NX, other_NX = (array.reshape(len(array), -1).astype(np.float64) for array in (one_NX, other_NX))
    length_N, other_length_N = np.linalg.norm(one_NX, axis=1), np.linalg.norm(other_NX, axis=1)
    products_N = (one_NX * other_NX).sum(axis=1) + ((length_N == 0) & (other_length_N == 0))
    lengths_N = length_N * other_length_N
    return float((products_N / np.where(lengths_N == 0, 1.0, lengths_N)).min())


@contextlib.contextmanager
def writing(proto: ModelProto, path: Path, key: Key | None = None) -> Iterator[Path]:
    """Write a graph to a temporary path, yield that for verification, and move it to ``path`` if the block succeeds.

    Weights of about 2 GB and more, which a protobuf message cannot hold, are stored in ``<name>.data`` next to the
    file. With a key, the file is encrypted.

    Raises:
        RunError: onnx rejects the graph.
        SpecError: the weights of an encrypted file would need a second file.
    """
    large = weight_bytes(proto) > LARGEST_PROTOBUF
    if large and key is not None:
        raise SpecError(
            f"encryption_key: the weights take {weight_bytes(proto) / 1e9:.1f} GB; ONNX files of 2 GB and more, which "
            "have their weights in a second file, cannot be encrypted.",
            "Leave encryption_key out, or train a smaller architecture.",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}."
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True) as folder:
        temporary = Path(folder) / path.name
        weights = weights_path(temporary)
        checked: Path | bytes = temporary
        if key is not None:
            checked = data = proto.SerializeToString()
            with created(temporary, key) as file:
                file.write(data)
        elif large:
            onnx.save_model(copy.deepcopy(proto), temporary, save_as_external_data=True, location=weights.name)
        else:
            onnx.save_model(proto, temporary)
        try:
            onnx.checker.check_model(checked, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise RunError(
                f"onnx rejects the graph: {str(error).strip().splitlines()[0]} The file was removed.",
                "Try another export.opset_version; if that does not help, please report it as a bug.",
            ) from error
        yield temporary
        if large:
            weights.replace(weights_path(path))
        temporary.replace(path)
        if not large:
            weights_path(path).unlink(missing_ok=True)  # from an earlier, larger model


def read_onnx(path: Path, key: Key | None = None, *, weights: bool = True) -> ModelProto:
    """Read a graph from a file; weights in a second file are left out unless ``weights`` is set.

    Raises:
        CheckpointError: the file is missing, damaged or not ONNX, or encrypted with another key.
    """
    if not path.is_file():
        raise CheckpointError(f"No ONNX file at {path}.", "Check the path; mae export writes such files.")
    file = unlocked(path, key)
    try:
        proto = onnx.load_from_string(file.read()) if file else onnx.load(path, load_external_data=weights)
        if not proto.graph.node:
            raise ValueError("it has no nodes")
        return proto
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: its weights are missing: {error}.", "Copy its .data file too.") from error
    except Exception as error:  # protobuf fails in many ways on other files
        raise CheckpointError(
            f"{path} is not an ONNX file, or damaged ({type(error).__name__}: {str(error).splitlines()[0]}).",
            "Export it again with mae export.",
        ) from error


def read_card(proto: ModelProto) -> ModelCard | None:
    """Return the metadata of a graph; None if another program wrote it."""
    return ModelCard.from_metadata({entry.key: entry.value for entry in proto.metadata_props})


def read_onnx_card(path: Path, key: Key | None = None) -> ModelCard:
    """Return the metadata of an ONNX file that ``mae export`` wrote.

    Raises:
        CheckpointError: the file cannot be read, its weights are not finite, or another program wrote it.
    """
    proto = read_onnx(path, key, weights=False)
    card = read_card(proto)
    if broken := next(filter(_is_broken, proto.graph.initializer), None):
        raise CheckpointError(
            f"{path}: the weights {broken.name} hold NaN or infinite numbers, so every output would be NaN.",
            "Export a checkpoint from before its training diverged.",
        )
    if card is None:
        raise CheckpointError(
            f"{path} has no OpenMAE metadata (classes, mean, standard deviation): its outputs cannot be interpreted.",
            "Export the checkpoint with mae export.",
        )
    return card


def _is_broken(tensor: TensorProto) -> bool:
    """Return whether weights in the file are not finite; a scalar constant may be infinite on purpose."""
    kind = _FLOATS.get(tensor.data_type)
    if kind is None or not tensor.raw_data:
        return False
    values = np.frombuffer(tensor.raw_data, kind)
    return values.size > 1 and not np.isfinite(values).all()


def _lowered(proto: ModelProto, opset: int) -> ModelProto:
    """Convert the graph to the requested operator set, or, with a warning, to the next one that onnx can convert it to.

    The weights are moved to the result.
    """
    weights = {}  # set aside, since the converter copies its input several times and accepts at most 2 GB
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) > _LARGE_TENSOR:
            weights[tensor.name], tensor.raw_data = tensor.raw_data, b""
    slim = copy.deepcopy(proto)
    for node in slim.graph.node:  # remove an attribute that set 17 lacks; its value is the default
        if node.op_type.startswith("Reduce") and len(node.input) > 1:
            kept = [attribute for attribute in node.attribute if attribute.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
    reason, lowered = "", None
    for wanted in range(opset, _NATIVE_OPSET):
        try:
            lowered = onnx.version_converter.convert_version(slim, wanted)
            break
        except RuntimeError as error:
            reason = reason or str(error).strip().splitlines()[0].split("failed: ")[-1]
    result = proto if lowered is None else lowered
    for tensor in result.graph.initializer:
        if tensor.name in weights:
            tensor.raw_data = weights.pop(tensor.name)
    if reason:
        log.warning(
            "export.opset_version=%d is not possible (%s): %d was written.", opset, reason.rstrip("."), opset_of(result)
        )
    return result


def _rename_nodes(proto: ModelProto) -> None:
    """Name nodes by their modules, and remove the local paths of source files that torch has added."""
    for node in proto.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
        module = next((scope for scope in reversed(ast.literal_eval(scopes)[:-1]) if scope), "")
        node.name = f"{module}/{node.name.removeprefix('node_')}" if module else node.name
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""


def file_bytes(path: Path) -> int:
    """Return the size of an ONNX file with its second file, if any."""
    return sum(part.stat().st_size for part in (path, weights_path(path)) if part.exists())


def weights_path(path: Path) -> Path:
    """Return the path of the second file, which holds weights that are too large for an ONNX file."""
    return path.with_name(f"{path.name}.data")


def weight_bytes(proto: ModelProto) -> int:
    """Return the size of the weights in bytes; unlike ``ByteSize``, this does not fail above 2 GB."""
    return sum(len(tensor.raw_data) for tensor in proto.graph.initializer)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
