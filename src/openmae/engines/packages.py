"""The optional packages of the ``export`` extra: onnx, onnxscript and onnxruntime.

Modules import onnx and onnxruntime from here, so that a missing package is reported as such.
"""

from __future__ import annotations

from importlib.util import find_spec

from openmae.errors import UserError

try:
    import onnx as onnx
    import onnxruntime as onnxruntime
    from onnx import ModelProto as ModelProto
    from onnx import TensorProto as TensorProto
    from onnxruntime.transformers import float16 as float16

    if find_spec("onnxscript") is None:  # torch's exporter imports it, which takes seconds
        raise ModuleNotFoundError(name="onnxscript")
except ModuleNotFoundError as error:
    raise UserError(
        f"ONNX files and TensorRT engines need onnx, onnxscript and onnxruntime; missing: {error.name}.",
        "pip install 'openmae[export]'",
    ) from error

onnxruntime.set_default_logger_severity(3)  # errors only; its warnings are of no use to users
