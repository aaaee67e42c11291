"""``mae gen_trt_engine``: build a TensorRT engine from ONNX, with or without a GPU."""

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
from openmae.engines.metadata import Precision, file_sha256
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
from openmae.spec.tree import value_of
from openmae.storage.atomic import disk_errors, make_folder, replacing
from openmae.storage.encryption import Key, created, resolve_key

_BF16_SM = 80  # Ampere
_CALIBRATION = "gen_trt_engine.tensorrt.calibration"
_BATCH_SIZES = (
    "gen_trt_engine.tensorrt.min_batch_size",
    "gen_trt_engine.tensorrt.opt_batch_size",
    "gen_trt_engine.tensorrt.max_batch_size",
    "gen_trt_engine.batch_size",
)

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class _Plan:
    """A checked build.

    Attributes:
        precisions: precisions to build; the fastest engine is kept.
        keep: name patterns of the nodes that stay in fp32.
        batches: calibration images; empty without calibration.
    """

    source: Source
    onnx_sha256: str
    backend: Backend
    settings: BuildSettings
    precisions: tuple[Precision, ...]
    keep: list[str]
    batches: Iterable[np.ndarray]


def run(spec: ExperimentSpec) -> Path:
    """Build an engine, write it and its sidecar ``<engine>.json``, and return its path. An error leaves neither file.

    Raises:
        UserError: the spec, the ONNX file or the data are invalid.
        RunError: the builder fails.
    """
    with running(spec, "gen_trt_engine") as this_run:
        spec = this_run.spec
        engine = Path(spec.gen_trt_engine.trt_engine)
        key = resolve_key(spec.encryption_key)
        plan = _plan(spec, engine, key, this_run.folder)
        card = plan.source.card
        begin_results(this_run.folder, resolve_model(spec, card.info) if card else spec)
        built = {precision: _build(plan, precision, engine.parent) for precision in plan.precisions}
        precision = _fastest(plan, built)
        result = built[precision]
        info = _info(plan, precision, result)
        sidecar = sidecar_path(engine)
        with disk_errors(engine), replacing(engine) as temporary, replacing(sidecar) as temporary_sidecar:
            with created(temporary, key) as file:
                file.write(memoryview(result.engine))
            engine_card = card and replace(card, precision=precision)
            temporary_sidecar.write_text(sidecar_text(engine_card, info), encoding="utf-8")
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
        what = "a folder" if engine.is_dir() else "the same file as gen_trt_engine.onnx_file"
        raise SpecError(
            f"gen_trt_engine.trt_engine: {engine} is {what}.", "Give the file to write, such as model.engine."
        )
    if engine.suffix.lower() not in ("", *ENGINE_SUFFIXES):  # NVIDIA's SDK sets a path without a suffix
        raise SpecError(
            f"gen_trt_engine.trt_engine: must end in {', '.join(ENGINE_SUFFIXES)}, got {engine}.",
            f"Set gen_trt_engine.trt_engine={engine.with_suffix('.engine')}.",
        )
    if engine.exists() and not section.overwrite:
        raise SpecError(
            f"gen_trt_engine.trt_engine: {engine} already exists.",
            "Pass gen_trt_engine.overwrite=true to replace it, or give another name.",
        )
    with blaming("gen_trt_engine.onnx_file"):
        source = read_source(onnx_file, key)
    timing_cache = Path(section.timing_cache) if section.timing_cache else None
    settings = BuildSettings(_profile(spec, source), options.workspace_size, timing_cache, section.verbose)
    backend = choose_backend(section.backend, section.compute_capability, section.gpu_id)
    precisions = choose_precision(source, options.data_type, can_time=backend.gpu is not None)
    if "bf16" in precisions and (old := [name for name in backend.targets if int(name.removeprefix("SM")) < _BF16_SM]):
        raise SpecError(
            f"gen_trt_engine.tensorrt.data_type: bf16 needs a GPU of sm_{_BF16_SM} or newer, "
            f"got {', '.join(map(pretty, old))}.",
            "Set gen_trt_engine.tensorrt.data_type=fp16, or build for newer GPUs.",
        )
    calibrated = precisions == ("int8",) and source.precision != "int8"
    batches = _calibration(spec, source, results) if calibrated else ()
    keep = kept_nodes(source, options.layers_precision)
    for notice in _without_effect(spec, source, backend, precisions):
        log.warning(notice)
    make_folder(engine.parent, "gen_trt_engine.trt_engine")
    return _Plan(source, file_sha256(onnx_file), backend, settings, precisions, keep, batches)


def _profile(spec: ExperimentSpec, source: Source) -> Profile:
    """Return the batch sizes: one size if the ONNX file or ``batch_size`` fixes it, otherwise the three of the spec."""
    section, sizes = spec.gen_trt_engine, spec.gen_trt_engine.tensorrt
    if source.batch != -1:
        for key in _BATCH_SIZES:
            value = value_of(spec, key)
            if spec.is_set(key) and value not in (-1, source.batch):
                raise SpecError(
                    f"{key} is {value}, but {source.path} takes batches of {source.batch} only.",
                    f"Remove {key}, or export the model with export.batch_size=-1 for batches of any size.",
                )
        return Profile(source.batch, source.batch, source.batch)
    if section.batch_size != -1:
        return Profile(section.batch_size, section.batch_size, section.batch_size)
    return Profile(sizes.min_batch_size, sizes.opt_batch_size, sizes.max_batch_size)


def _calibration(spec: ExperimentSpec, source: Source, results: Path) -> Iterable[np.ndarray]:
    if source.card is None:
        raise SpecError(
            f"gen_trt_engine.tensorrt.data_type is int8, but {source.path} was not written by mae export: it cannot be "
            "calibrated, since its preprocessing is unknown.",
            "Quantise it with the program that wrote it, or set gen_trt_engine.tensorrt.data_type=fp16.",
        )
    if not spec.gen_trt_engine.tensorrt.calibration.sources:
        raise SpecError(
            f"gen_trt_engine.tensorrt.data_type is int8, but there are no images: {_CALIBRATION}.images is not set.",
            "Set it to a folder or archive of images like those that the model will see, or give an ONNX file that "
            "mae export wrote with export.quantize=int8.",
        )
    return calibration_batches(spec, _CALIBRATION, source.card, results)


def _without_effect(
    spec: ExperimentSpec, source: Source, backend: Backend, precisions: tuple[Precision, ...]
) -> Iterator[str]:
    """Yield notices for options that the user set but that have no effect."""
    section, options = spec.gen_trt_engine, spec.gen_trt_engine.tensorrt
    cast = [precision for precision in precisions if precision != source.precision]
    if section.timing_cache and backend.name == "tensorrt_rtx":
        yield "gen_trt_engine.timing_cache has no effect: tensorrt_rtx does not time kernels during the build."
    if spec.is_set("gen_trt_engine.gpu_id") and backend.gpu is None:
        yield "gen_trt_engine.gpu_id has no effect: the engine is built without a GPU."
    if options.layers_precision and not cast:
        yield "gen_trt_engine.tensorrt.layers_precision has no effect: nodes have the precision of the ONNX file."
    if options.calibration.sources and "int8" not in cast:
        why = "the ONNX file is int8 already" if source.precision == "int8" else f"the engine is {precisions[0]}"
        yield f"gen_trt_engine.tensorrt.calibration has no effect: {why}."
    opt = "gen_trt_engine.tensorrt.opt_batch_size"
    if spec.is_set(opt) and section.batch_size not in (-1, options.opt_batch_size):
        yield f"{opt} has no effect: gen_trt_engine.batch_size={section.batch_size} is the only batch size."


def _build(plan: _Plan, precision: Precision, folder: Path) -> Built:
    log.info("Building the engine in %s with %s %s.", precision, plan.backend.name, plan.backend.version)
    with in_precision(plan.source, precision, plan.keep, plan.batches, folder) as onnx_file:
        return build_engine(onnx_file, plan.backend, plan.settings)


def _fastest(plan: _Plan, built: Mapping[Precision, Built]) -> Precision:
    """Return the precision whose engine takes the least time per batch."""
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
    log.info("Time per batch of %d: %s. The fastest engine is kept.", plan.settings.profile.opt, times)
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


def _rows(engine: Path, info: EngineInfo, result: Built, keep: Sequence[str]) -> Rows:
    kept = f", {', '.join(keep)} in fp32" if keep and info.data_type != "fp32" else ""
    return [
        ("engine", str(engine)),
        ("sidecar", sidecar_path(engine).name),
        ("size", f"{result.megabytes:.1f} MB"),
        ("builder", f"{info.builder} {info.builder_version}"),
        ("precision", f"{info.data_type}{kept}"),
        ("images per batch", str(info.profile)),
        ("compute capability", ", ".join(map(pretty, info.compute_capability))),
        ("build time", f"{result.seconds:.1f} s"),
    ]
