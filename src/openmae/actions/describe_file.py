"""Describe a file for ``mae info``: its kind and its content. Nothing in it is executed."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from openmae.checkpoints.damage import SUFFIXES, advice_for_folder, first_bytes
from openmae.checkpoints.folder import list_checkpoints
from openmae.checkpoints.format import Checkpoint, CheckpointInfo, read_checkpoint
from openmae.checkpoints.shapes import foreign_parts, likely_arch, patch_size_of
from openmae.data.index import ImageIndex
from openmae.data.open import open_index
from openmae.data.shards.indexing import index_shards
from openmae.engines.metadata import ONNX_SUFFIXES, ModelCard
from openmae.engines.predictor import exported_kind
from openmae.engines.tensorrt.backend import pretty
from openmae.engines.tensorrt.runtime import ENGINE_SUFFIXES
from openmae.engines.tensorrt.sidecar import TensorInfo, check_sidecar, read_engine_info
from openmae.errors import CheckpointError, UserError
from openmae.inputs import irregular, open_regular
from openmae.models.build import validate
from openmae.results.status import read_status
from openmae.spec.actions import ROWS
from openmae.spec.tree import get
from openmae.storage import cache, layout
from openmae.storage.download import fetch_with, local_copy
from openmae.storage.encryption import Key, is_encrypted, read_bytes, resolve_key
from openmae.storage.listing import Found
from openmae.storage.printable import counted, listed, printable_name
from openmae.storage.urls import is_remote, name_of, redact
from openmae.training.state import Progress

Rows = Iterator[tuple[str, str]]

_READABLE = (
    f"mae info reads checkpoints ({', '.join(SUFFIXES)}), ONNX files ({', '.join(ONNX_SUFFIXES)}), TensorRT engines "
    f"({', '.join(ENGINE_SUFFIXES)}), shards (.tar, or their folder), and results folders."
)
_SHOWN = 8  # classes
_STARTS = (b"PK\x03\x04", b"\x80")  # ZIP and pickle: what torch.save writes
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257


def describe_file(source: str, encryption_key: str = "") -> list[tuple[str, str]]:
    """Return pairs of label and value about a file or a folder of results or shards.

    Args:
        source: a path, or the URL of a file, which is downloaded into the cache.
        encryption_key: key of an encrypted file: ``env:NAME``, ``file:PATH``, or the key itself.

    Raises:
        UserError: the file is missing, damaged, of an unknown kind, or encrypted with another key.
    """
    key = resolve_key(encryption_key)
    with cache.holding():
        path, shown = _local(source), redact(source) if is_remote(source) else source
        try:
            rows = [("path", shown), *(_describe_folder(path) if path.is_dir() else _describe_any(path, key))]
        except OSError as error:
            raise UserError(f"{shown} cannot be read: {error.strerror or error}.", "Check its permissions.") from error
    return [(label, printable_name(value.replace(str(path), shown))) for label, value in rows]


def _local(source: str) -> Path:
    if not is_remote(source):
        return Path(source).expanduser()
    suffix = Path(name_of(source)).suffix.lower()
    return fetch_with(source, _copy_of_file, layout.COMPANIONS.get(suffix, ()))


def _copy_of_file(found: Found) -> Path:
    if found.folder:
        raise UserError(f"{redact(found.url)} is a folder.", f"Name a file in it. {_READABLE}")
    return local_copy(found)


def _describe_any(path: Path, key: Key | None) -> Rows:
    if not path.exists():
        raise UserError(f"No file at {path}.", "Check the path; relative paths start at the working directory.")
    if kind := irregular(path):
        raise UserError(f"{path} is {kind}, not a file.", "Name a regular file.")
    yield "size", cache.gigabytes(path.stat().st_size)
    encrypted, exported = is_encrypted(path), exported_kind(path)
    if encrypted:
        yield "encrypted", "yes, with encryption_key"
    if exported == "engine":
        yield from _engine_rows(path, key, readable=not encrypted or key is not None)
    elif encrypted and key is None:
        yield "kind", "unknown without the key"
        yield "to read it", "pass --encryption-key: env:NAME, file:PATH, or the key that it was written with"
    elif exported == "onnx":
        yield from _onnx_rows(path, key)
    elif _is_tar(path):
        yield "kind", "shard: a tar file of images"
        yield from _index_rows(index_shards([str(path)], None, str(path)), path)
    elif encrypted or _may_be_checkpoint(path):
        yield from _checkpoint_rows(path, read_checkpoint(path, key))
    else:
        raise UserError(
            f"{path} is of an unknown kind.",
            f"{_READABLE} For images use mae dataset check, for a spec mae spec check.",
        )


def _may_be_checkpoint(path: Path) -> bool:
    """Return whether ``read_checkpoint`` should read a file, or explain why it is not a checkpoint."""
    start = first_bytes(path)
    return path.suffix.lower() in SUFFIXES or start.startswith(_STARTS) or start[8:9] == b"{"


def _is_tar(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(_TAR_MAGIC_AT + len(_TAR_MAGIC)).endswith(_TAR_MAGIC) and path.suffix == ".tar"


def _checkpoint_rows(path: Path, checkpoint: Checkpoint) -> Rows:
    info, weights = checkpoint.info, checkpoint.weights
    if info is None:
        yield from _foreign_rows(path, checkpoint)
        return
    progress = None
    if checkpoint.progress is not None:
        try:
            progress = validate(Progress, checkpoint.progress)
        except ValueError as error:
            raise CheckpointError(f"{path}: its progress is damaged: {error}.", "Use another checkpoint.") from error
    yield "kind", "training checkpoint of OpenMAE" if progress else "weights of OpenMAE"
    yield from _model_rows(info)
    yield "parameters", _millions(weights.backbone.values())
    if weights.rest:
        blocks = counted(info.model.decoder_depth, "block")
        yield "decoder", f"{_millions(weights.rest.values())}; {blocks}, width {info.model.decoder_embed_dim}"
    if progress:
        epochs = get(info.spec, "train.num_epochs")
        yield "epochs finished", f"{progress.epoch} of {epochs}" if epochs else str(progress.epoch)
        yield "steps", f"{progress.step:,}"
        metric = str(get(info.spec, "train.optim.monitor_name", "not recorded"))
        yield "monitored metric", metric if progress.best is None else f"{metric}, best so far {progress.best:.4g}"
        yield "can resume", "yes, it holds the state of the optimizer"


def _foreign_rows(path: Path, checkpoint: Checkpoint) -> Rows:
    weights = checkpoint.weights
    parts = foreign_parts(weights.backbone)
    arch, options = None if parts else likely_arch(weights), ""
    yield "kind", "weights of another program"
    yield "layout", weights.layout
    yield "family", weights.family
    if arch is None:
        reason = f"they do not have {', '.join(parts)}" if parts else "the shapes of the blocks fit none"
        yield "model.arch", f"none of `mae models`: {reason}"
    else:
        config = checkpoint.config()
        yield "model.arch", f"{arch}, by the shapes of its blocks"
        size = "any size" if weights.family == "convnextv2" else _pixels(config.input_size)
        yield "images", f"{size}, {counted(config.in_chans, 'channel')}"
        if patch := patch_size_of(weights):
            yield "patch size", f"{patch} px"
        options = f"model.arch={arch}"
        options += f" model.patch_size={config.patch_size}" if config.patch_size else ""
        options += f" model.in_chans={config.in_chans}" if config.in_chans != 3 else ""
    yield "parameters", _millions(weights.backbone.values())
    yield "decoder", _millions(weights.rest.values()) if weights.rest else "none in the file"
    yield "classes", str(checkpoint.num_classes) if checkpoint.num_classes else "none: there is no classifier"
    if options:
        yield "to use it", f"mae train {options} train.pretrained_model_path={shlex.quote(str(path))} ..."


def _model_rows(info: CheckpointInfo) -> Rows:
    """Yield what checkpoints, ONNX files and engines of OpenMAE have in common."""
    yield "stage", info.stage
    yield "model.arch", info.model.arch
    if info.model.patch_size:
        yield "patch size", f"{info.model.patch_size} px"
    yield "images", f"{_pixels(info.model.input_size)}, {counted(info.model.in_chans, 'channel')}"
    if info.stage == "finetune":
        names = f": {listed(info.class_names, _SHOWN)}" if info.class_names else ", without names"
        yield "classes", f"{info.model.num_classes}{names}"
    for label, values in (("mean", info.mean), ("std", info.std)):
        yield label, ", ".join(f"{value:g}" for value in values) or "not recorded"
    yield "written by", f"OpenMAE {info.version}"


def _card_rows(card: ModelCard) -> Rows:
    yield from _model_rows(card.info)
    yield "preprocessing", "included: uint8 images" if card.preprocessing else "not included: normalized float images"
    yield "crop", f"{card.crop_pct:g} of the shorter side, {card.interpolation}"
    if card.checkpoint_sha256:
        yield "checkpoint", f"SHA-256 {card.checkpoint_sha256}"


def _onnx_rows(path: Path, key: Key | None) -> Rows:
    from openmae.engines.onnx import read_card, read_onnx
    from openmae.engines.precision import precision_of

    proto = read_onnx(path, key, weights=False)
    card = read_card(proto)
    program = " ".join(filter(None, map(_text, (proto.producer_name, proto.producer_version)))) or "another program"
    yield "kind", "ONNX file of OpenMAE" if card else f"ONNX file of {program}, without OpenMAE's metadata"
    yield "precision", card.precision if card else precision_of(proto)
    yield "operator set", ", ".join(f"{_text(entry.domain)} {entry.version}".strip() for entry in proto.opset_import)
    weights = {tensor.name for tensor in proto.graph.initializer}  # old exporters list them among the inputs
    inputs = [value for value in proto.graph.input if value.name not in weights]
    yield from _tensor_rows(map(_tensor_info, inputs), map(_tensor_info, proto.graph.output))
    if card:
        yield from _card_rows(card)


def _engine_rows(path: Path, key: Key | None, *, readable: bool) -> Rows:
    card, info = read_engine_info(path)
    if readable:
        check_sidecar(path, read_bytes(path, key), info)
    yield "kind", "TensorRT engine of OpenMAE" if card else "TensorRT engine from an ONNX file of another program"
    yield "precision", info.data_type
    yield "runs with", f"{info.builder} {info.builder_version}, no other version"
    yield "runs on", f"GPUs of compute capability {', '.join(map(pretty, info.compute_capability))}"
    yield "batch size", str(info.profile)
    yield from _tensor_rows(info.inputs, info.outputs)
    if card:
        yield from _card_rows(card)


def _text(value: str | bytes) -> str:
    """Return a text of a protobuf message, which is bytes if it is not valid UTF-8."""
    return value if isinstance(value, str) else value.decode(errors="replace")


def _tensor_info(value: Any) -> TensorInfo:
    """Return the name, shape and type of an input or output of an ONNX graph."""
    from openmae.engines.packages import TensorProto

    tensor = value.type.tensor_type
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in tensor.shape.dim)
    types = {number: name.lower() for name, number in TensorProto.DataType.items()}
    return TensorInfo(_text(value.name), shape, types.get(tensor.elem_type, f"type {tensor.elem_type}"))


def _tensor_rows(inputs: Iterable[TensorInfo], outputs: Iterable[TensorInfo]) -> Rows:
    for label, tensors in (("input", inputs), ("output", outputs)):
        for tensor in tensors:
            axes = ", ".join("N" if axis < 0 else str(axis) for axis in tensor.shape)
            yield label, f"{tensor.name}: {tensor.dtype} [{axes}]"


def _describe_folder(folder: Path) -> Rows:
    runs = [path for path in (folder, *(folder / name for name in ROWS)) if (path / layout.STATUS).is_file()]
    if runs:
        yield "kind", "results folder"
        for run in runs:
            yield from _run_rows(run)
    elif any(folder.glob("*.tar")):
        yield "kind", "folder of shards"
        yield from _index_rows(open_index(str(folder), None), folder)
    else:
        raise UserError(
            f"{folder} is a folder without shards or results of OpenMAE.", f"{advice_for_folder(folder)} {_READABLE}"
        )


def _run_rows(folder: Path) -> Rows:
    """Yield how an action ended, its last metrics, and the models in its folder."""
    entries = read_status(folder / layout.STATUS)
    last = entries[-1] if entries else {}
    yield folder.name, f"{last.get('status', 'not started')}: {last.get('message', '')}".rstrip(": ")
    metrics: Mapping[str, Any] = next((e["kpi"] for e in reversed(entries) if isinstance(e.get("kpi"), dict)), {})
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    if numbers:
        yield "last metrics", ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    models = [folder / name for name in (layout.BEST, layout.BACKBONE) if (folder / name).is_file()]
    yield from (("model", str(path)) for path in (*models, *list_checkpoints(folder)))
    if (folder / layout.REPORT).is_file():
        yield "report", str(folder / layout.REPORT)


def _index_rows(index: ImageIndex, source: Path) -> Rows:
    yield "images", f"{len(index):,}"
    yield "classes", f"{len(index.class_names)}: {listed(index.class_names, _SHOWN)}" if index.class_names else "none"
    yield "to use it", f"mae train dataset.train_data_sources={shlex.quote(str(source))} ..."


def _millions(tensors: Iterable[Any]) -> str:
    return f"{sum(tensor.numel() for tensor in tensors) / 1e6:.1f} million"


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} px"
