"""Inference with a TensorRT engine and its sidecar file."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from openmae.engines.batching import as_input, device_name, run_split
from openmae.engines.tensorrt.backend import gpu_capability, load_module, pretty
from openmae.engines.tensorrt.builder import get_logger
from openmae.engines.tensorrt.sidecar import EngineInfo, TensorInfo, check_sidecar, read_sidecar
from openmae.errors import CheckpointError, RunError, SpecError
from openmae.storage.encryption import Key, read_bytes

ENGINE_SUFFIXES = (".engine", ".plan", ".trt")

_AGAIN = "Build the engine again with mae gen_trt_engine"
_WARM_UP, _RUNS = 5, 20  # batches before timing, and timed batches


class TensorRTPredictor:
    """An engine that ``mae gen_trt_engine`` built from an ONNX file of ``mae export``; see ``Predictor``.

    The sidecar is next to the engine, and ``device`` is a GPU of the kind that the engine was built for.

    Raises:
        CheckpointError: the engine or its sidecar cannot be used here.
        SpecError: there is no GPU, or the builder of the engine is not installed.
    """

    def __init__(self, path: Path, device: torch.device | str = "cuda", key: Key | None = None) -> None:
        self.card, info = read_sidecar(path)
        data = read_bytes(path, key)
        check_sidecar(path, data, info)
        self.device = _open_device(torch.device(device), info, path)
        self._engine = LoadedEngine(data, info, self.device, str(path))
        self._profile = info.profile
        self.runtime = f"{info.builder} {info.builder_version} {info.data_type}, {device_name(self.device)}"

    def __call__(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """See ``Predictor``."""
        images = as_input(images_BCHW.to(self.device), self.card)
        return run_split(self._engine, images, self._profile.min, self._profile.max)


class LoadedEngine:
    """A deserialized engine with one input, and its execution context.

    Args:
        data: the serialized engine.
        info: engine part of the sidecar.
        name: name of the engine, for messages.

    Raises:
        SpecError: the builder of the engine is not installed.
        CheckpointError: another version of the builder is installed, or it rejects the engine.
    """

    def __init__(self, data: bytes | memoryview, info: EngineInfo, device: torch.device, name: str) -> None:
        trt = load_module(info.builder)
        if trt.__version__ != info.builder_version:
            raise CheckpointError(
                f"{name} was built with {info.builder} {info.builder_version} and runs with that version only; "
                f"{trt.__version__} is installed.",
                f"{_AGAIN}, or install {info.builder} {info.builder_version}.",
            )
        self.info, self.device = info, device
        self._logger = get_logger(trt, info.builder)
        with torch.cuda.device(device):
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(data)
            self._context = self._engine and self._engine.create_execution_context()
        if self._context is None:
            raise CheckpointError(
                f"{info.builder} {trt.__version__} cannot load {name}: {' '.join(self._logger.errors)}", f"{_AGAIN}."
            )

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return the float32 outputs of one batch, whose size must be within the profile.

        Raises:
            RunError: TensorRT fails.
        """
        (source,) = self.info.inputs
        context = self._context
        self._logger.errors.clear()
        images = images.to(self.device, getattr(torch, source.dtype)).contiguous()
        context.set_input_shape(source.name, tuple(images.shape))
        context.set_tensor_address(source.name, images.data_ptr())
        outputs = {output.name: self._allocate(output) for output in self.info.outputs}
        for name, output in outputs.items():
            context.set_tensor_address(name, output.data_ptr())
        if not _execute(context, self.device):
            raise RunError(
                f"{self.info.builder} failed on a batch of {len(images)}: {' '.join(self._logger.errors)}",
                "Use a smaller batch if the GPU's memory is full; else build the engine again.",
            )
        return {name: output.float() for name, output in outputs.items()}

    def seconds_per_batch(self) -> float:
        """Return the median time of a batch of the optimal size."""
        (source,) = self.info.inputs
        images = torch.zeros(
            self.info.profile.opt, *source.shape[1:], dtype=getattr(torch, source.dtype), device=self.device
        )
        seconds = []
        for _ in range(_WARM_UP + _RUNS):
            began = time.perf_counter()
            self(images)
            torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - began)
        return median(seconds[_WARM_UP:])

    def _allocate(self, output: TensorInfo) -> Tensor:
        shape = tuple(self._context.get_tensor_shape(output.name))
        return torch.empty(shape, dtype=getattr(torch, output.dtype), device=self.device)


def _open_device(device: torch.device, info: EngineInfo, path: Path) -> torch.device:
    """Return the device with its index; raise an error if the engine cannot run on it."""
    if not torch.cuda.is_available():
        raise SpecError(
            f"{path} is a TensorRT engine, which needs a CUDA GPU; none was found.",
            "Use the ONNX file or the checkpoint that it was built from: they run on a CPU too.",
        )
    if device.type != "cuda":
        raise SpecError(f"{path} is a TensorRT engine, which cannot run on {device}.", "Use the device cuda.")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    here = gpu_capability(device.index)
    if here not in info.compute_capability:
        built = ", ".join(map(pretty, info.compute_capability))
        option = f"compute_capability=[{pretty(here)}]" if info.builder == "tensorrt_rtx" else "backend=tensorrt here"
        raise CheckpointError(
            f"{path} was built for {built}, and {torch.cuda.get_device_name(device)} is {pretty(here)}.",
            f"{_AGAIN} and gen_trt_engine.{option}.",
        )
    return device


def _execute(context: Any, device: torch.device) -> bool:
    """Run on a separate stream, since TensorRT synchronizes at every call on the default stream."""
    with torch.cuda.device(device):
        current, own = torch.cuda.current_stream(), torch.cuda.Stream()
        own.wait_stream(current)
        done = context.execute_async_v3(own.cuda_stream)
        current.wait_stream(own)
    return bool(done)
