"""``mae gen_trt_engine``: from ONNX to a TensorRT engine, with or without a GPU."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from openmae.actions.calibration import calibration_batches
from openmae.actions.load_model import resolve_model
from openmae.actions.run import Rows, begin_results, running, show_table
from openmae.actions.sections import engine_report
from openmae.engines.metadata import ModelCard, Precision, file_sha256
from openmae.engines.tensorrt.backend import Backend, choose_backend, pretty
from openmae.engines.tensorrt.builder import BuildSettings, Built, build_engine
from openmae.engines.tensorrt.runtime import ENGINE_SUFFIXES, LoadedEngine
from openmae.engines.tensorrt.sidecar import EngineInfo, Profile, sidecar_path, sidecar_text
from openmae.engines.tensorrt.source import (
    Source,
    choose_precision,
    in_precision,
    kept_nodes,
    read_source,
)
from openmae.errors import SpecError, blaming
from openmae.spec.schema import ExperimentSpec
from openmae.storage.atomic import disk_errors, make_folder, replacing
from openmae.storage.encryption import Key, created, resolve_key

_SECTION = "gen_trt_engine"
_BF16_SM = 80  # Ampere
_TENSORRT = f"{_SECTION}.tensorrt"
_CALIBRATION = f"{_TENSORRT}.calibration"
_SIZES = ("min_batch_size", "opt_batch_size", "max_batch_size")

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class _Plan:
    """A request that has proved right.

    Attributes:
        source: the ONNX file.
        onnx_sha256: of the file.
        backend: builds it.
        settings: what it is told.
        precisions: to build; the fastest is kept.
        keep: patterns of the nodes that stay in fp32.
        batches: to calibrate with; empty where nothing is to be calibrated.
    """

    source: Source
    onnx_sha256: str
    backend: Backend
    settings: BuildSettings
    precisions: tuple[Precision, ...]
    keep: list[str]
    batches: Iterable[np.ndarray]


def run(spec: ExperimentSpec) -> Path:
    """Build an engine, and write it with its sidecar ``<engine>.json``, both whole or not at all.

    Args:
        spec: as ``load_spec`` gives it for ``gen_trt_engine``.

    Returns:
        The engine's path.

    Raises:
        UserError: the request is wrong.
        RunError: the builder fails.
    """
    with running(spec, _SECTION) as this_run:
        spec = this_run.spec
        engine = Path(spec.gen_trt_engine.trt_engine)
        key = resolve_key(spec.encryption_key)
        plan = _plan(spec, engine, key, this_run.folder)
        card = plan.source.card
        begin_results(this_run.folder, resolve_model(spec, card.info) if card else spec)
        built = {precision: _build(plan, precision, engine.parent) for precision in plan.precisions}
        precision = _fastest(plan, built)
        result, info = built[precision], _info(plan, precision, built[precision])
        sidecar = sidecar_path(engine)
        with disk_errors(engine), replacing(engine) as temporary, replacing(sidecar) as temporary_sidecar:
            with created(temporary, key) as file:
                file.write(memoryview(result.engine))
            temporary_sidecar.write_text(sidecar_text(_card(plan, precision), info), encoding="utf-8")
        kpi = {"engine_mb": round(result.megabytes, 3), "build_seconds": round(result.seconds, 3)}
        this_run.status.write("RUNNING", f"Built {engine.name}", kpi=kpi)
        rows = _rows(engine, info, result, plan.keep)
        show_table(f"TensorRT engine of {plan.source.path.name}", rows)
        engine_report(this_run.folder, plan.source.path.name, kpi, rows)
    return engine


def _plan(spec: ExperimentSpec, engine: Path, key: Key | None, results: Path) -> _Plan:
    section, options = spec.gen_trt_engine, spec.gen_trt_engine.tensorrt
    onnx_file = Path(section.onnx_file)
    if engine.is_dir() or engine.resolve() == onnx_file.resolve():
        what = "a folder" if engine.is_dir() else f"the same file as {_SECTION}.onnx_file"
        raise SpecError(f"{_SECTION}.trt_engine: {engine} is {what}.", "Give the file to write, such as model.engine.")
    if engine.suffix.lower() not in ("", *ENGINE_SUFFIXES):  # NVIDIA's SDK sets a path without a suffix
        raise SpecError(
            f"{_SECTION}.trt_engine: must end in {', '.join(ENGINE_SUFFIXES)}, got {engine}.",
            f"Set {_SECTION}.trt_engine={engine.with_suffix('.engine')}.",
        )
    if engine.exists() and not section.overwrite:
        raise SpecError(
            f"{_SECTION}.trt_engine: {engine} exists, and is not replaced unasked.",
            f"Give another name, or set {_SECTION}.overwrite=true.",
        )
    with blaming(f"{_SECTION}.onnx_file"):
        source = read_source(onnx_file, key)
    timing_cache = Path(section.timing_cache) if section.timing_cache else None
    settings = BuildSettings(_profile(spec, source), options.workspace_size, timing_cache, section.verbose)
    backend = choose_backend(section.backend, section.compute_capability, section.gpu_id)
    precisions = choose_precision(source, options.data_type, can_time=backend.gpu is not None)
    if "bf16" in precisions and (old := [name for name in backend.targets if int(name.removeprefix("SM")) < _BF16_SM]):
        raise SpecError(
            f"{_TENSORRT}.data_type: bf16 needs a GPU of sm_{_BF16_SM} or newer, got {', '.join(map(pretty, old))}.",
            f"Set {_TENSORRT}.data_type=fp16, or build for newer GPUs.",
        )
    calibrated = precisions == ("int8",) and source.precision != "int8"
    batches = _calibration(spec, source, results) if calibrated else ()
    keep = kept_nodes(source, options.layers_precision)
    for notice in _without_effect(spec, source, backend, precisions):
        log.warning(notice)
    make_folder(engine.parent, f"{_SECTION}.trt_engine")
    return _Plan(source, file_sha256(onnx_file), backend, settings, precisions, keep, batches)


def _profile(spec: ExperimentSpec, source: Source) -> Profile:
    """The batches of the engine: one size where the file or batch_size says so, else the three sizes of the spec."""
    section, sizes = spec.gen_trt_engine, spec.gen_trt_engine.tensorrt
    asked = {f"{_TENSORRT}.{name}": getattr(sizes, name) for name in _SIZES}
    if section.batch_size != -1:
        asked[f"{_SECTION}.batch_size"] = section.batch_size
    if source.batch != -1:
        for key, value in asked.items():
            if spec.is_set(key) and value != source.batch:
                raise SpecError(
                    f"{key} is {value}, but {source.path} takes batches of {source.batch} alone.",
                    f"Remove {key}, or export the model with export.batch_size=-1 for batches of any size.",
                )
        return Profile(source.batch, source.batch, source.batch)
    if section.batch_size != -1:
        return Profile(section.batch_size, section.batch_size, section.batch_size)
    return Profile(sizes.min_batch_size, sizes.opt_batch_size, sizes.max_batch_size)


def _calibration(spec: ExperimentSpec, source: Source, results: Path) -> Iterable[np.ndarray]:
    calibration = spec.gen_trt_engine.tensorrt.calibration
    if source.card is None:
        raise SpecError(
            f"{_TENSORRT}.data_type is int8, but {source.path} is not of mae export: how images are prepared for it is "
            "not known, so it cannot be calibrated.",
            f"Quantise it with the program that wrote it, or set {_TENSORRT}.data_type to fp16.",
        )
    if not calibration.sources:
        raise SpecError(
            f"{_TENSORRT}.data_type is int8, but there are no images to calibrate with: {_CALIBRATION}.images is not "
            "set.",
            "Set it to a folder or archive of images like those that the model will see, or give an ONNX file that "
            "mae export wrote with export.quantize=int8.",
        )
    return calibration_batches(calibration, _CALIBRATION, source.card, results, spec.dataset.max_megapixels)


def _without_effect(
    spec: ExperimentSpec, source: Source, backend: Backend, precisions: tuple[Precision, ...]
) -> Iterator[str]:
    """Notices of options that were set and do not act."""
    section, options = spec.gen_trt_engine, spec.gen_trt_engine.tensorrt
    cast = [precision for precision in precisions if precision != source.precision]
    if section.timing_cache and backend.name == "tensorrt_rtx":
        yield f"{_SECTION}.timing_cache does not act: tensorrt_rtx times nothing while it builds."
    if spec.is_set(f"{_SECTION}.gpu_id") and backend.gpu is None:
        yield f"{_SECTION}.gpu_id does not act: the engine is built ahead of time, without a GPU."
    if options.layers_precision and not cast:
        yield f"{_TENSORRT}.layers_precision does not act: every node has the precision that the ONNX file gives it."
    if options.calibration.sources and "int8" not in cast:
        why = "the ONNX file is int8 already" if source.precision == "int8" else f"the engine is {precisions[0]}"
        yield f"{_CALIBRATION} does not act: {why}."
    if section.batch_size not in (-1, options.opt_batch_size) and spec.is_set(f"{_TENSORRT}.opt_batch_size"):
        yield f"{_TENSORRT}.opt_batch_size does not act: {_SECTION}.batch_size={section.batch_size} is the only batch."


def _build(plan: _Plan, precision: Precision, folder: Path) -> Built:
    log.info("Building the engine in %s with %s %s.", precision, plan.backend.name, plan.backend.version)
    with in_precision(plan.source, precision, plan.keep, plan.batches, folder) as onnx_file:
        return build_engine(onnx_file, plan.backend, plan.settings)


def _fastest(plan: _Plan, built: Mapping[Precision, Built]) -> Precision:
    """The one precision, or the one whose engine takes least for a batch on the GPU."""
    if len(built) == 1:
        return next(iter(built))
    device = torch.device(f"cuda:{plan.backend.gpu}")
    seconds = {}
    for precision, result in built.items():
        loaded = LoadedEngine(
            memoryview(result.engine), _info(plan, precision, result), device, f"The {precision} engine"
        )
        seconds[precision] = loaded.seconds_per_batch()
    times = ", ".join(f"{precision} {1000 * taken:.3g} ms" for precision, taken in seconds.items())
    log.info("A batch of %d takes: %s. The fastest is kept.", plan.settings.profile.opt, times)
    return min(seconds, key=lambda precision: seconds[precision])


def _info(plan: _Plan, precision: Precision, result: Built) -> EngineInfo:
    return EngineInfo(
        builder=plan.backend.name,
        builder_version=plan.backend.version,
        data_type=precision,
        compute_capability=plan.backend.targets,
        profile=plan.settings.profile,
        inputs=result.inputs,
        outputs=result.outputs,
        onnx_sha256=plan.onnx_sha256,
        engine_sha256=hashlib.sha256(memoryview(result.engine)).hexdigest(),
    )


def _card(plan: _Plan, precision: Precision) -> ModelCard | None:
    return plan.source.card and replace(plan.source.card, precision=precision)


def _rows(engine: Path, info: EngineInfo, result: Built, keep: Sequence[str]) -> Rows:
    kept = f", {', '.join(keep)} in fp32" if keep and info.data_type != "fp32" else ""
    return [
        ("engine", str(engine)),
        ("described by", sidecar_path(engine).name),
        ("size", f"{result.megabytes:.1f} MB"),
        ("builder", f"{info.builder} {info.builder_version}"),
        ("precision", f"{info.data_type}{kept}"),
        ("images per batch", str(info.profile)),
        ("compute capability", ", ".join(map(pretty, info.compute_capability))),
        ("build time", f"{result.seconds:.1f} s"),
    ]
