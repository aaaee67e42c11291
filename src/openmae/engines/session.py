"""ONNX Runtime sessions."""

from __future__ import annotations

from pathlib import Path

import torch

from openmae.engines.packages import onnxruntime
from openmae.errors import CheckpointError
from openmae.storage.encryption import Key, unlocked


def open_session(path: Path, device: torch.device, key: Key | None = None) -> onnxruntime.InferenceSession:
    """Open a session on the CPU with as many threads as torch uses, or on a GPU if onnxruntime-gpu is installed.

    Raises:
        CheckpointError: ONNX Runtime cannot read or run the file, or it is encrypted with another key.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    providers: list[str | tuple[str, dict[str, int]]] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    file = unlocked(path, key)
    try:
        return onnxruntime.InferenceSession(file.read() if file else path, options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors have no common base class
        raise CheckpointError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run {path}: {str(error).splitlines()[0]}",
            "Export it again with mae export; if an operator is missing, with an older export.opset_version.",
        ) from error
