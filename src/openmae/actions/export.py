"""``mae export``: write a checkpoint as an ONNX file, and verify the file against the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from openmae.actions.calibration import calibration_batches
from openmae.actions.load_model import check_request, number_classes, read_trained, resolve_model
from openmae.actions.run import Rows, begin_results, running, show_table
from openmae.actions.sections import export_report
from openmae.actions.sources import loader_settings, match_classes, open_images
from openmae.checkpoints.format import CheckpointInfo, save_backbone
from openmae.checkpoints.weights import check_size
from openmae.data.loaders import EvaluationLoader
from openmae.engines.batching import eval_transform
from openmae.engines.metadata import FEATURES, LOGITS, ONNX_SUFFIXES, ModelCard, Precision
from openmae.engines.module import DeployedModel, build_deployed
from openmae.engines.onnx import (
    LARGEST_PROTOBUF,
    compare,
    cosine,
    file_bytes,
    likeness,
    opset_of,
    trace,
    weights_path,
    writing,
)
from openmae.engines.packages import ModelProto, onnx
from openmae.engines.precision import to_half, to_int8
from openmae.engines.predictor import OnnxPredictor, TorchPredictor, card_of
from openmae.errors import SpecError, blaming
from openmae.spec.schema import ExperimentSpec
from openmae.storage import layout
from openmae.storage.atomic import disk_errors, make_folder
from openmae.storage.encryption import Key, resolve_key, temporaries_in_memory
from openmae.storage.printable import counted

_TOLERATED_LOSS = 0.01  # of accuracy, in a lower precision
_ADVICE = {
    "int8": "Calibrate with more images like those in dataset.val_data_sources, or set export.quantize=fp16.",
    "fp16": "Set export.quantize=none.",
}

log = logging.getLogger("openmae")


def run(spec: ExperimentSpec) -> Path:
    """Write the model of a checkpoint as ONNX, and its backbone with timm's parameter names; return the ONNX file.

    The output of a fine-tuned model is ``logits``. A pretrained model has ``features``, the pooled embedding, and
    ``tokens``, the last feature map. The file is checked by onnx and compared with torch in ONNX Runtime; it is removed
    if the outputs differ.

    Raises:
        UserError: the spec, the checkpoint or the data are invalid.
        RunError: the outputs of the file differ from those of the checkpoint.
    """
    with running(spec, "export") as this_run:
        job = _prepare(this_run.spec, this_run.folder)
        begin_results(this_run.folder, job.spec)
        log.info("Tracing %s.", job.card.model.arch)
        options = job.spec.export
        proto = trace(job.model, job.card, options.opset_version, device=job.device, verbose=options.verbose)
        with disk_errors(job.target):
            rows, kpi = _write(job, proto)
        if job.validation is not None:
            more_rows, more_kpi = _fidelity(job, job.validation)
            rows, kpi = [*rows, *more_rows], kpi | more_kpi
        backbone = save_backbone(this_run.folder / layout.BACKBONE, job.model.backbone.state_dict(), job.info, job.key)
        this_run.status.write("RUNNING", f"Exported to {job.target}", kpi=kpi)
        rows = [*rows, ("written", str(job.target)), ("backbone for timm", str(backbone))]
        show_table(f"{job.card.model.arch} ({job.card.stage}) as ONNX", rows)
        export_report(this_run.folder, job.card, job.target, rows, encrypted=job.key is not None)
    return job.target


@dataclass(frozen=True)
class _Job:
    """A checked export."""

    spec: ExperimentSpec
    info: CheckpointInfo
    card: ModelCard
    model: DeployedModel
    target: Path
    device: torch.device
    key: Key | None
    calibration: Iterator[np.ndarray] | None
    validation: EvaluationLoader | None


def _prepare(spec: ExperimentSpec, folder: Path) -> _Job:
    """Check the spec, the checkpoint and the data before the model is traced."""
    key, target, device = resolve_key(spec.encryption_key), _target(spec), _device(spec)
    with blaming("export.checkpoint"):
        checkpoint, info = read_trained(spec, Path(spec.export.checkpoint), key)
        info = number_classes(info)
    card = _card(spec, info)
    _log_notices(spec, info, card)
    with blaming("export.checkpoint"):
        model = build_deployed(checkpoint, card)
    quantize = spec.export.quantize
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    if quantize != "none" and size > LARGEST_PROTOBUF:
        raise SpecError(
            f"export.quantize: {quantize} supports models of up to 2 GB, but {card.model.arch} has {size / 1e9:.1f}.",
            "Set export.quantize=none, or train a smaller architecture.",
        )
    calibration = None
    if quantize == "int8":
        calibration = calibration_batches(spec, "export.calibration", card, folder)
    info = replace(info, model=card.model)
    spec = resolve_model(spec, info)
    validation = _validation(spec, card, folder)
    make_folder(target.parent, "export.onnx_file")
    return _Job(spec, info, card, model, target, device, key, calibration, validation)


def _log_notices(spec: ExperimentSpec, info: CheckpointInfo, card: ModelCard) -> None:
    size, trained = card.model.input_size, info.model.input_size
    if size != trained:
        log.warning(
            "The model was trained at %dx%d and is exported for %dx%d: measure its accuracy with mae evaluate.",
            *trained,
            *size,
        )
    if spec.is_set("dataset.augmentation.input_size") and spec.dataset.augmentation.size != size:
        log.warning(
            "dataset.augmentation.input_size has no effect on `mae export`, and the file takes %dx%d: set "
            "export.input_height and export.input_width.",
            *size,
        )
    if spec.is_set("dataset.augmentation.interpolation"):
        log.warning("dataset.augmentation.interpolation has no effect on `mae export`: images are resized bicubically.")


def _target(spec: ExperimentSpec) -> Path:
    target = Path(spec.export.onnx_file)
    # NVIDIA's SDK names the file after the key, without a suffix
    if target.suffix.lower() not in ("", *ONNX_SUFFIXES) or target.is_dir():
        raise SpecError(
            f"export.onnx_file: must be a file name that ends in .onnx, got {target}.",
            f"Set export.onnx_file={target / 'model.onnx' if target.is_dir() else target.with_suffix('.onnx')}.",
        )
    for path in (target, weights_path(target)):
        if path.exists() and not spec.export.overwrite:
            raise SpecError(
                f"export.onnx_file: {path} already exists.",
                "Pass export.overwrite=true to replace it, or give another name.",
            )
    return target


def _device(spec: ExperimentSpec) -> torch.device:
    export = spec.export
    if export.on_cpu or not torch.cuda.is_available():
        if export.gpu_id:
            log.warning("export.gpu_id has no effect: the export runs on the CPU.")
        return torch.device("cpu")
    if export.gpu_id >= torch.cuda.device_count():
        raise SpecError(
            f"export.gpu_id: this machine has {counted(torch.cuda.device_count(), 'GPU')}, counted from 0, got "
            f"{export.gpu_id}.",
            "Set export.gpu_id=0, or export.on_cpu=true.",
        )
    return torch.device("cuda", export.gpu_id)


def _card(spec: ExperimentSpec, info: CheckpointInfo) -> ModelCard:
    export, path, wrong = spec.export, Path(spec.export.checkpoint), []
    if export.input_channel not in (None, info.model.in_chans):
        wrong.append(
            SpecError(
                f"export.input_channel is {export.input_channel}, but {path} takes "
                f"{counted(info.model.in_chans, 'channel')}.",
                "Remove export.input_channel: the checkpoint has its own.",
            )
        )
    height, width = info.model.input_size
    config = replace(info.model, input_size=(export.input_height or height, export.input_width or width))
    try:
        with blaming("export.input_height, input_width"):
            check_size(config)
    except SpecError as error:
        wrong.append(error)
    check_request(spec, "export.checkpoint", path, info, wrong)
    return replace(
        card_of(replace(info, model=config), path),
        preprocessing=export.include_preprocessing,
        batch_size=export.batch_size,
    )


def _validation(spec: ExperimentSpec, card: ModelCard, folder: Path) -> EvaluationLoader | None:
    """Return the images on which the reduced precision is compared with fp32; None if it is not compared."""
    if spec.export.quantize == "none":
        return None
    if not spec.dataset.val_data_sources:
        log.warning("dataset.val_data_sources is not set: the accuracy in %s is not measured.", spec.export.quantize)
        return None
    classifies = card.stage == "finetune"
    index = open_images(spec, "dataset.val_data_sources", labelled=classifies)
    if classifies:
        index = match_classes(index, card.class_names)
    settings = loader_settings(spec, spec.dataset.batch_size, folder)
    return EvaluationLoader(index, eval_transform(card), settings)


def _write(job: _Job, proto: ModelProto) -> tuple[Rows, dict[str, float]]:
    """Verify the graph against torch, then write it in the requested precision."""
    card, target, precision = job.card, job.target, job.spec.export.quantize
    log.info("Comparing the graph with torch in ONNX Runtime.")
    like: Rows = []
    if precision == "none":
        with writing(proto, target, job.key) as file:
            parity = compare(job.model, card, file, job.key)
    else:
        with TemporaryDirectory() as scratch, writing(proto, Path(scratch) / target.name, job.key) as file:
            parity = compare(job.model, card, file, job.key)
        lowest = _write_reduced(job, proto)
        like = [(f"{precision} to fp32, lowest cosine", f"{lowest:.5f} on random images")]
    megabytes = file_bytes(target) / 1e6
    images = {-1: "any number of images", 1: "1 image"}.get(card.batch_size, f"{card.batch_size} images")
    kpi = {"max_difference": parity.difference, "onnx_mb": megabytes, "opset": float(opset_of(proto))}
    shown = "" if precision == "none" else ", in fp32"
    return [
        ("largest difference to torch", f"{parity.difference:.1e} of outputs up to {parity.largest:.3g}{shown}"),
        *like,
        ("input", f"{images}, {_layout(card)}"),
        ("outputs", ", ".join(card.outputs)),
        ("precision", "fp32" if precision == "none" else precision),
        ("operator set", str(opset_of(proto))),
        ("size", f"{megabytes:.1f} MB"),
    ], kpi


def _layout(card: ModelCard) -> str:
    (height, width), channels = card.model.input_size, card.model.in_chans
    return f"uint8 {height}x{width}x{channels}" if card.preprocessing else f"float32 {channels}x{height}x{width}"


def _write_reduced(job: _Job, proto: ModelProto) -> float:
    """Write the graph in fp16 or int8; return the lowest cosine similarity to torch's outputs, on random images."""
    precision: Precision = "fp16" if job.calibration is None else "int8"
    if job.calibration is None:
        reduced = to_half(proto, "fp16")
    else:
        with blaming("export.calibration"), temporaries_in_memory(job.key):
            reduced = to_int8(proto, job.calibration)
    onnx.helper.set_model_props(reduced, replace(job.card, precision=precision).to_metadata())
    with writing(reduced, job.target, job.key) as file:
        return likeness(job.model, job.card, file, job.key)


def _fidelity(job: _Job, loader: EvaluationLoader) -> tuple[Rows, dict[str, float]]:
    """Compare the exported model with the fp32 model on the validation images."""
    card, cpu = job.card, torch.device("cpu")
    exported = OnnxPredictor(job.target, cpu, job.key)
    plain = TorchPredictor(DeployedModel(job.model.backbone, replace(card, preprocessing=False)).eval(), card, cpu)
    name = LOGITS if card.stage == "finetune" else FEATURES
    batches = [(exported(batch.images)[name], plain(batch.images)[name], batch.labels) for batch in loader]
    exported_NC, plain_NC, labels_N = (torch.cat(part).numpy() for part in zip(*batches, strict=True))
    count = f"{len(labels_N):,} images"
    if card.stage == "pretrain":
        lowest = cosine(exported_NC, plain_NC)
        return [("features, lowest cosine to fp32", f"{lowest:.5f} on {count}")], {"cosine": lowest}
    accuracy, reference = (float((x_NC.argmax(axis=1) == labels_N).mean()) for x_NC in (exported_NC, plain_NC))
    agreement = float((exported_NC.argmax(axis=1) == plain_NC.argmax(axis=1)).mean())
    if accuracy < reference - _TOLERATED_LOSS:
        log.warning(
            "Accuracy fell from %.1f %% to %.1f %%. %s",
            100 * reference,
            100 * accuracy,
            _ADVICE[job.spec.export.quantize],
        )
    return [
        ("accuracy", f"{accuracy:.2%}, in fp32 {reference:.2%}, on {count}"),
        ("same class as fp32", f"{agreement:.2%}"),
    ], {"ACC_all": accuracy, "ACC_all_fp32": reference, "agreement": agreement}
