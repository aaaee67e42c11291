"""Choice of NVIDIA's builder, tensorrt or tensorrt_rtx, and of the GPUs to build for."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch

from openmae.errors import SpecError
from openmae.storage.printable import counted

BackendName = Literal["tensorrt", "tensorrt_rtx"]

CURRENT = "CURRENT"
_KEY = "gen_trt_engine.compute_capability"
_OLDEST = 10  # first major version of tensorrt whose strongly typed networks are sufficient
_INSTALL: dict[BackendName, str] = {
    "tensorrt": "Install TensorRT by NVIDIA's installation guide (docs.nvidia.com/deeplearning/tensorrt: "
    "pip install tensorrt, which gets its libraries from NVIDIA's index)",
    "tensorrt_rtx": "Run pip install 'openmae[tensorrt-rtx]'",
}

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class Backend:
    """An installed builder that can build the requested engine.

    Attributes:
        targets: compute capabilities of the GPUs that the engine is for, such as ``("SM86", "SM89")``.
        gpu: number of the GPU to build on; None to build without a GPU.
    """

    name: BackendName
    module: Any
    targets: tuple[str, ...]
    gpu: int | None

    @property
    def version(self) -> str:
        """Version of the builder."""
        return str(self.module.__version__)

    def on_gpu(self) -> AbstractContextManager[object]:
        """Return a context in which CUDA uses ``gpu``."""
        return nullcontext() if self.gpu is None else torch.cuda.device(self.gpu)


def choose_backend(
    asked: Literal["auto", "tensorrt", "tensorrt_rtx"], capabilities: Sequence[str], gpu_id: int
) -> Backend:
    """Choose the builder.

    ``auto`` means tensorrt if it is installed and the engine is for the GPU of this machine, else tensorrt_rtx.

    Args:
        asked: ``gen_trt_engine.backend``.
        capabilities: ``gen_trt_engine.compute_capability``: ``sm_89``, ``SM89``, ``8.9`` or ``current``; empty for
            current.
        gpu_id: number of the GPU to build on, which ``current`` refers to.

    Raises:
        SpecError: the builder is not installed, a GPU is missing, or the builder does not support a capability.
    """
    names = [_name(text) for text in capabilities or (CURRENT,)]
    here = _present(gpu_id)
    wanted = tuple(dict.fromkeys(here or CURRENT if name == CURRENT else name for name in names))
    if asked == "auto":
        asked = "tensorrt" if here is not None and wanted == (here,) and _classic_loads() else "tensorrt_rtx"
    module = load_module(asked)
    return (_classic if asked == "tensorrt" else _rtx)(module, wanted, here, gpu_id)


def gpu_capability(gpu: int) -> str:
    """Return the compute capability of a GPU of this machine, such as ``SM89``."""
    major, minor = torch.cuda.get_device_capability(gpu)
    return f"SM{major}{minor}"


def pretty(capability: str) -> str:
    """Return a capability as written in a spec, such as ``sm_89``."""
    return f"sm_{capability.removeprefix('SM')}"


def load_module(name: BackendName) -> ModuleType:
    """Import the module of a builder.

    Raises:
        SpecError: it is not installed, cannot be loaded, or is too old.
    """
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise SpecError(f"{name} is not installed.", f"{_INSTALL[name]}.") from error
        # one of its libraries, or the driver, is missing
        raise SpecError(f"{name} is installed but cannot be loaded: {error}.", f"{_INSTALL[name]} again.") from error
    version = str(module.__version__)
    if name == "tensorrt" and int(version.split(".")[0]) < _OLDEST:
        raise SpecError(f"tensorrt {version} is too old; {_OLDEST}.0 or later is required.", f"{_INSTALL[name]}.")
    return module


def _classic_loads() -> bool:
    try:
        load_module("tensorrt")
    except SpecError as error:
        log.info("%s Building with tensorrt_rtx.", error.problem)
        return False
    return True


def _present(gpu_id: int) -> str | None:
    """Return the capability of the requested GPU; None if there is no GPU at all."""
    if not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    if gpu_id >= count:
        raise SpecError(
            f"gen_trt_engine.gpu_id: this machine has {counted(count, 'GPU')}, counted from 0, got {gpu_id}.",
            f"Set gen_trt_engine.gpu_id to {count - 1} or less.",
        )
    return gpu_capability(gpu_id)


def _classic(module: ModuleType, wanted: tuple[str, ...], here: str | None, gpu_id: int) -> Backend:
    if here is None:
        raise SpecError(
            "gen_trt_engine.backend: tensorrt builds on the GPU that the engine is for, and no GPU was found.",
            f"Set gen_trt_engine.backend=tensorrt_rtx, which needs no GPU, and {_KEY}=[sm_89] or that of your GPU.",
        )
    if wanted != (here,):
        raise SpecError(
            f"{_KEY}: tensorrt builds for the GPU it runs on, {pretty(here)}, got {', '.join(map(pretty, wanted))}.",
            f"Remove {_KEY}, or set gen_trt_engine.backend=tensorrt_rtx.",
        )
    return Backend("tensorrt", module, (here,), gpu_id)


def _rtx(module: ModuleType, wanted: tuple[str, ...], here: str | None, gpu_id: int) -> Backend:
    known = [name for name in module.ComputeCapability.__members__ if name not in (CURRENT, "NONE")]
    listed = ", ".join(map(pretty, sorted(known, key=lambda name: int(name.removeprefix("SM")))))
    if CURRENT in wanted:
        raise SpecError(
            f"{_KEY}: current, or unset, means the GPU that is present, and no GPU was found.",
            f"Name the GPUs that the engine is for, as in {_KEY}=[sm_89]. tensorrt_rtx {module.__version__} supports "
            f"{listed}.",
        )
    if unknown := [name for name in wanted if name not in known]:
        raise SpecError(
            f"{_KEY}: tensorrt_rtx {module.__version__} cannot build for {', '.join(map(pretty, unknown))}.",
            f"It supports {listed}. For a data centre GPU (sm_90, sm_100), build on it with "
            "gen_trt_engine.backend=tensorrt.",
        )
    return Backend("tensorrt_rtx", module, wanted, gpu_id if wanted == (here,) else None)


def _name(text: str) -> str:
    """Convert ``sm_89``, ``SM89`` or ``8.9`` to ``SM89``."""
    if text.lower() == "current":
        return CURRENT
    match = re.fullmatch(r"(?:sm_?(\d{2,3})|(\d{1,2})\.(\d))", text.strip().lower())
    if match is None:
        raise SpecError(
            f"{_KEY}: {text!r} is not a compute capability.",
            "Write it as sm_89, SM89 or 8.9 (in quotes in YAML), or current; NVIDIA lists them at "
            "developer.nvidia.com/cuda-gpus.",
        )
    return f"SM{match[1] or match[2] + match[3]}"
