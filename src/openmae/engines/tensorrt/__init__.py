"""TensorRT engines: choice of the builder, building from ONNX, the sidecar file, and running them."""
