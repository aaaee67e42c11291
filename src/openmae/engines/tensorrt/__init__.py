"""TensorRT engines: choosing a builder, building from ONNX, the sidecar file, and inference."""
