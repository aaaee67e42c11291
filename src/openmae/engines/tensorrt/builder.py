"""Build a serialized engine from ONNX, with either builder."""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmae.distributed.signals import InterruptNote
from openmae.engines.tensorrt.backend import Backend
from openmae.engines.tensorrt.sidecar import Profile, TensorInfo
from openmae.errors import CheckpointError, RunError
from openmae.storage.atomic import replacing

_DTYPES = {
    **{"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"UINT8": "uint8", "INT8": "int8", "INT32": "int32", "INT64": "int64"},
}
_MIB = 2**20
_MOST_LINES = 3  # of a builder's errors, which are repetitive

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class BuildSettings:
    """Settings of a builder.

    Attributes:
        workspace_mib: memory that the builder may use; 0 for no limit.
        timing_cache: file of the timing cache; only used by tensorrt.
    """

    profile: Profile
    workspace_mib: int = 0
    timing_cache: Path | None = None
    verbose: bool = False


@dataclass(frozen=True)
class Built:
    """A serialized engine, its inputs and outputs, and the duration of the build in seconds."""

    engine: Any
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    seconds: float

    @property
    def megabytes(self) -> float:
        """Size of the engine in MB."""
        return self.engine.nbytes / 1e6


def build_engine(graph: Path | bytes, backend: Backend, settings: BuildSettings) -> Built:
    """Build an engine from ONNX. The graph determines the precision, since networks are strongly typed.

    Raises:
        CheckpointError: the parser rejects the graph.
        RunError: the builder fails; the error includes its messages.
        KeyboardInterrupt: Ctrl-C was pressed; raised at the builder's next progress report.
    """
    trt, began = backend.module, time.perf_counter()
    logger = get_logger(backend.module, backend.name, verbose=settings.verbose)
    with backend.on_gpu(), InterruptNote() as interrupt:
        builder = trt.Builder(logger)
        # has to be requested up to TensorRT 10; later versions build no other networks
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not (parser.parse(graph) if isinstance(graph, bytes) else parser.parse_from_file(str(graph))):
            raise _refused(parser, backend)
        config = _configure(builder, network, backend, settings)
        config.progress_monitor = _make_monitor(trt, interrupt)
        engine = builder.build_serialized_network(network, config)
        if interrupt.reason:
            raise interrupt.reason
        if engine is None:
            raise RunError(
                f"{backend.name} {backend.version} could not build the engine: {' '.join(logger.errors)}",
                "Try another gen_trt_engine.tensorrt.data_type or gen_trt_engine.compute_capability, or more "
                "gen_trt_engine.tensorrt.workspace_size; gen_trt_engine.verbose=true shows all its messages.",
            )
        if backend.name == "tensorrt" and settings.timing_cache:
            with replacing(settings.timing_cache) as temporary:
                temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
        inputs = tuple(_describe(network.get_input(place)) for place in range(network.num_inputs))
        outputs = tuple(_describe(network.get_output(place)) for place in range(network.num_outputs))
    return Built(engine, inputs, outputs, time.perf_counter() - began)


def get_logger(trt: Any, name: str, *, verbose: bool = False) -> Any:
    """Return the process's ``ILogger`` for a builder, with ``errors`` cleared.

    There is one per process, since TensorRT keeps the first logger that it is given and ignores all others. It logs
    warnings, or everything if ``verbose`` is set.
    """
    logger = _make_logger(trt, name)
    logger.errors.clear()
    logger.verbose = verbose
    return logger


@functools.cache
def _make_logger(trt: Any, name: str) -> Any:
    class EngineLogger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.verbose = False

        def log(self, severity: Any, message: str) -> None:
            level = int(severity)
            if level <= int(trt.ILogger.ERROR) and len(self.errors) < _MOST_LINES and "catchCudaError" not in message:
                self.errors.append(message)
            if self.verbose:
                log.info("[%s] %s", name, message)
            elif level == int(trt.ILogger.WARNING):
                log.warning("[%s] %s", name, message)

    return EngineLogger()


def _configure(builder: Any, network: Any, backend: Backend, settings: BuildSettings) -> Any:
    trt, config = backend.module, builder.create_builder_config()
    if settings.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib * _MIB)
    if backend.name == "tensorrt_rtx":
        config.num_compute_capabilities = len(backend.targets)
        for place, name in enumerate(backend.targets):
            config.set_compute_capability(trt.ComputeCapability.__members__[name], place)
    elif settings.timing_cache:
        _set_timing_cache(config, settings.timing_cache)
    dynamic = [t for t in map(network.get_input, range(network.num_inputs)) if t.shape[0] == -1]
    if dynamic:
        profile, sizes = builder.create_optimization_profile(), settings.profile
        for tensor in dynamic:
            rest = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, *((batch, *rest) for batch in (sizes.min, sizes.opt, sizes.max)))
        config.add_optimization_profile(profile)
    return config


def _set_timing_cache(config: Any, path: Path) -> None:
    """Load the timing cache from its file, unless the file is damaged or of another version or GPU."""
    held = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(held)
    if cache is None or not config.set_timing_cache(cache, False):
        log.warning("gen_trt_engine.timing_cache: %s is damaged or of another TensorRT or GPU; it is replaced.", path)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _make_monitor(trt: Any, interrupt: InterruptNote) -> Any:
    """Return an ``IProgressMonitor`` that cancels the build, since an exception in a callback would be lost."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            return interrupt.reason is None

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def _refused(parser: Any, backend: Backend) -> CheckpointError:
    reasons = [_reason(parser.get_error(place)) for place in range(min(parser.num_errors, _MOST_LINES))]
    return CheckpointError(
        f"{backend.name} {backend.version} rejects the graph: {'; '.join(reasons) or 'no reason given'}.",
        "Export the model with another export.opset_version, or build with another gen_trt_engine.backend.",
    )


def _reason(error: Any) -> str:
    where = f"{error.node_operator()} node {error.node_name()!r}: " if error.node_operator() else ""
    lines = [line for line in error.desc().splitlines() if "catchCudaError" not in line]
    return f"{where}{error.code().name}, {' '.join(lines)}"


def _describe(tensor: Any) -> TensorInfo:
    return TensorInfo(tensor.name, tuple(tensor.shape), _DTYPES[tensor.dtype.name])
