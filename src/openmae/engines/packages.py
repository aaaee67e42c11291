"""The optional packages of the ``export`` extra: onnx, onnxscript and onnxruntime."""

from __future__ import annotations

import importlib
from types import ModuleType

from openmae.errors import UserError


def require(module: str) -> ModuleType:
    """Import a module of the ``export`` extra.

    Raises:
        UserError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"ONNX files and TensorRT engines need onnx, onnxscript and onnxruntime; missing: {error.name}.",
            "pip install 'openmae[export]'",
        ) from error
