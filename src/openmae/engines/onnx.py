"""From a torch model to an ONNX file that is proven equal to it."""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, version_converter

from openmae.engines.metadata import INPUT, ModelCard
from openmae.engines.module import DeployedModel, example_input
from openmae.engines.rewriting import rewritten
from openmae.engines.session import open_session
from openmae.errors import CheckpointError, RunError, SpecError
from openmae.storage.encryption import Key, created, unlocked

ONNX_SUFFIXES = (".onnx",)

#: Largest difference to torch that is borne, as a share of the largest output.
TOLERANCE = 1e-4
_SMALLEST = 1e-6  # output that counts as one
_BATCHES = (1, 3)  # that a file with a dynamic batch is tried with
_NATIVE_OPSET = 18  # the oldest that torch's exporter writes by itself
LARGEST_PROTOBUF = 2**31 - 2**24  # bytes of weights in a message, which leaves room for the graph around them
_FLOATS: dict[int, str] = {TensorProto.FLOAT: "<f4", TensorProto.FLOAT16: "<f2", TensorProto.DOUBLE: "<f8"}
_LARGE_TENSOR = 1024  # bytes from which a tensor is no shape or axis

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime is from torch.

    Attributes:
        difference: the largest.
        largest: the largest output of torch.
    """

    difference: float
    largest: float


def trace(
    model: DeployedModel, card: ModelCard, opset: int, *, device: torch.device, verbose: bool = False
) -> ModelProto:
    """The model's graph with the card as metadata, in the opset asked for where that can be had.

    Args:
        model: in eval mode; left on the CPU.
        card: its batch size is the input's, -1 for any.
        opset: ONNX operator set. Where the graph cannot be written in it, a notice says why and which one it is.
        device: that the tracing runs on.
        verbose: let torch's exporter speak.

    Raises:
        SpecError: a newer opset than this onnx knows.
    """
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise SpecError(
            f"export.opset_version: onnx {onnx.__version__} knows operator sets up to {newest}, got {opset}.",
            f"Set export.opset_version to {_NATIVE_OPSET - 1} (widely read) or up to {newest}.",
        )
    dynamic = card.batch_size == -1
    images = example_input(card, 2 if dynamic else card.batch_size).to(device)
    with _quiet(verbose):
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
    model.cpu()  # whose parameters were traced
    assert program is not None
    proto = program.model_proto
    _forget_the_machine(proto)
    proto = _lowered(proto, opset) if opset < _NATIVE_OPSET else proto
    onnx.helper.set_model_props(proto, card.to_metadata())
    proto.producer_name, proto.producer_version = "openmae", card.version
    return proto


def opset_of(proto: ModelProto) -> int:
    """The operator set of a graph."""
    return next(entry.version for entry in proto.opset_import if entry.domain == "")


def compare(model: DeployedModel, card: ModelCard, path: Path, key: Key | None = None) -> Parity:
    """Run an ONNX file beside torch on random images, and return the largest difference.

    Raises:
        RunError: it is above ``TOLERANCE``.
    """
    session = open_session(path, torch.device("cpu"), key)
    worst, share = Parity(0.0, 0.0), -1.0
    for batch in _BATCHES if card.batch_size == -1 else (card.batch_size,):
        images = example_input(card, batch, seed=batch)
        with torch.no_grad():
            expected = [output.numpy() for output in model(images)]
        found = session.run(list(card.outputs), {INPUT: images.numpy()})
        for name, ours, theirs in zip(card.outputs, found, expected, strict=True):
            largest = float(np.abs(theirs).max())
            parity = Parity(float(np.abs(ours - theirs).max()), largest)
            relative = parity.difference / max(largest, _SMALLEST)
            if not relative <= TOLERANCE:  # NaN as well
                raise RunError(
                    f"ONNX Runtime's {name} differs from torch's by {parity.difference:.2g} of {largest:.2g} (batch "
                    f"{batch}); at most {TOLERANCE:g} of the largest output is borne. The file was removed.",
                    "Try another export.opset_version; if that does not help, it is a fault of ours: please report it.",
                )
            if relative > share:
                worst, share = parity, relative
    return worst


def likeness(model: DeployedModel, card: ModelCard, path: Path, key: Key | None = None) -> float:
    """The lowest cosine between the outputs of a file in lower precision and torch's, over some random images.

    Raises:
        RunError: an output is not finite.
    """
    session = open_session(path, torch.device("cpu"), key)
    lowest = 1.0
    for batch in _BATCHES if card.batch_size == -1 else (card.batch_size,):
        images = example_input(card, batch, seed=batch)
        with torch.no_grad():
            expected = [output.numpy() for output in model(images)]
        found = session.run(list(card.outputs), {INPUT: images.numpy()})
        lowest = float(np.min([lowest, *map(cosine, found, expected)]))  # which passes NaN on
    if not np.isfinite(lowest):
        raise RunError(
            "In the lower precision the outputs are not finite: an activation is larger than it can hold. The file was "
            "removed.",
            "Export with export.quantize=none; gen_trt_engine.tensorrt.data_type=bf16 has the range of fp32.",
        )
    return lowest


def cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The lowest cosine between two models' outputs ``[N, ...]`` for an image; 1 for two zeros, NaN if not finite."""
    ours, theirs = (array.reshape(len(array), -1).astype(np.float64) for array in (ours, theirs))
    length, other = np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1)
    products = (ours * theirs).sum(axis=1) + ((length == 0) & (other == 0))
    return float((products / np.where(length * other == 0, 1.0, length * other)).min())


@contextlib.contextmanager
def writing(proto: ModelProto, path: Path, key: Key | None = None) -> Iterator[Path]:
    """Write a graph beside ``path``, give that place for checks, and move it to ``path`` if they raise nothing.

    Weights of 2 GB and more, which a protobuf message cannot hold, go into ``<name>.data`` beside the file.

    Args:
        proto: the graph.
        path: the file.
        key: encrypts it.

    Raises:
        RunError: onnx finds the graph faulty.
        SpecError: an encrypted file would need weights beside it.
    """
    large = weight_bytes(proto) > LARGEST_PROTOBUF
    if large and key is not None:
        raise SpecError(
            f"encryption_key: the weights take {weight_bytes(proto) / 1e9:.1f} GB; ONNX files of 2 GB and more, which "
            "have their weights beside them, cannot be encrypted.",
            "Leave encryption_key out, or train a smaller architecture.",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        weights = weights_path(folder / path.name)
        checked: Path | bytes = folder / path.name
        if key is not None:
            checked = data = proto.SerializeToString()
            with created(folder / path.name, key) as file:
                file.write(data)
        elif large:
            onnx.save_model(copy.deepcopy(proto), folder / path.name, save_as_external_data=True, location=weights.name)
        else:
            onnx.save_model(proto, folder / path.name)
        try:
            onnx.checker.check_model(checked, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise RunError(
                f"onnx finds the graph faulty: {str(error).strip().splitlines()[0]} The file was removed.",
                "Try another export.opset_version; if that does not help, it is a fault of ours: please report it.",
            ) from error
        yield folder / path.name
        if weights.exists():
            weights.replace(weights_path(path))
        (folder / path.name).replace(path)
        if not large:
            weights_path(path).unlink(missing_ok=True)  # of an earlier, larger model
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_onnx(path: Path, key: Key | None = None, *, weights: bool = True) -> ModelProto:
    """A graph from a file.

    Raises:
        CheckpointError: missing, empty, truncated, no ONNX, or encrypted with another key.
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
        raise CheckpointError(f"{path}: its weights are missing: {error}.", "Copy the .data file beside it.") from error
    except Exception as error:  # foreign bytes break protobuf's reader in every way there is
        raise CheckpointError(
            f"{path} is no ONNX file, or damaged ({type(error).__name__}: {str(error).splitlines()[0]}).",
            "Export it again with mae export.",
        ) from error


def read_card(proto: ModelProto) -> ModelCard | None:
    """The metadata of a graph that we wrote; None for another program's."""
    return ModelCard.from_metadata({entry.key: entry.value for entry in proto.metadata_props})


def read_onnx_card(path: Path, key: Key | None = None) -> ModelCard:
    """The metadata of an ONNX file that ``mae export`` wrote.

    Raises:
        CheckpointError: the file cannot be read, or another program wrote it.
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
            f"{path} carries no metadata of OpenMAE (classes, mean, deviation), so nothing can be said of its outputs.",
            "Export the checkpoint with mae export.",
        )
    return card


def _is_broken(tensor: TensorProto) -> bool:
    """Whether weights inside the file are not finite; a single number may be meant to be infinite."""
    kind = _FLOATS.get(tensor.data_type)
    if kind is None or not tensor.raw_data:
        return False
    values = np.frombuffer(tensor.raw_data, kind)
    return values.size > 1 and not np.isfinite(values).all()


def _lowered(proto: ModelProto, opset: int) -> ModelProto:
    """The graph in the operator set asked for, or with a notice in the next one that onnx's converter can write.

    The weights move on to the result.
    """
    weights = {}  # aside, since the converter copies what it is given several times, and takes no more than 2 GB
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) > _LARGE_TENSOR:
            weights[tensor.name], tensor.raw_data = tensor.raw_data, b""
    slim = copy.deepcopy(proto)
    for node in slim.graph.node:  # an attribute that set 17 lacks, at its default
        if node.op_type.startswith("Reduce") and len(node.input) > 1:
            kept = [attribute for attribute in node.attribute if attribute.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
    reason, lowered = "", None
    for wanted in range(opset, _NATIVE_OPSET):
        try:
            lowered = version_converter.convert_version(slim, wanted)
            break
        except RuntimeError as error:
            reason = reason or str(error).strip().splitlines()[0].split("failed: ")[-1]
    result = proto if lowered is None else lowered
    for tensor in result.graph.initializer:
        if tensor.name in weights:
            tensor.raw_data = weights.pop(tensor.name)
    if reason:
        log.warning(
            "export.opset_version=%d cannot be had (%s): %d was written.", opset, reason.rstrip("."), opset_of(result)
        )
    return result


def _forget_the_machine(proto: ModelProto) -> None:
    """Torch notes at every node in which file of this machine it was made; only the module goes into its name."""
    for node in proto.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
        module = next((scope for scope in reversed(ast.literal_eval(scopes)[:-1]) if scope), "")
        node.name = f"{module}/{node.name.removeprefix('node_')}" if module else node.name
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        if hasattr(value, "metadata_props"):
            del value.metadata_props[:]
        value.doc_string = ""


def file_bytes(path: Path) -> int:
    """Of an ONNX file, with the weights beside it."""
    return sum(part.stat().st_size for part in (path, weights_path(path)) if part.exists())


def weights_path(path: Path) -> Path:
    """Where the weights of an ONNX file lie that are too large for it."""
    return path.with_name(f"{path.name}.data")


def weight_bytes(proto: ModelProto) -> int:
    """Of the weights, which are nearly all of a file. (``ByteSize`` fails for more than 2 GB.)"""
    return sum(len(tensor.raw_data) for tensor in proto.graph.initializer)


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Keep the exporter's chatter off the terminal."""
    if verbose:
        yield
        return
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
