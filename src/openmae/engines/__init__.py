"""Deployed models: export to ONNX, lower precision, TensorRT engines, and predictors that run them."""
