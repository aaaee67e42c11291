"""The sections ``evaluate``, ``inference``, ``export`` and ``gen_trt_engine``, which use a trained model."""

from __future__ import annotations

import os
from typing import Literal

from openmae.spec.option import (
    BatchOrAuto,
    Count,
    EngineType,
    GpuIds,
    InputPath,
    LocalFile,
    OutputPath,
    Section,
    Texts,
    option,
)

_ONNX_DECIDES = "the ONNX file decides"


class EvaluateSpec(Section):
    """``evaluate``."""

    checkpoint: InputPath = option("", "checkpoint to evaluate", popular=True)
    trt_engine: InputPath = option("", "TensorRT engine or ONNX file to evaluate instead of a checkpoint")
    batch_size: BatchOrAuto = option(-1, "images per batch; -1: dataset.batch_size", ge=-1)
    num_gpus: Count = option(1, "GPUs per node")
    gpu_ids: GpuIds = option((0,), "GPUs of a node to use, by number", automl=False)
    num_nodes: Count = option(1, "nodes")
    results_dir: OutputPath = option("", "folder for results of evaluate; unset: <results_dir>/evaluate")


class InferenceSpec(Section):
    """``inference``."""

    checkpoint: InputPath = option("", "checkpoint to run", popular=True)
    trt_engine: InputPath = option("", "TensorRT engine or ONNX file to run instead of a checkpoint")
    batch_size: BatchOrAuto = option(-1, "images per batch; -1: dataset.batch_size", ge=-1)
    num_gpus: Count = option(1, "GPUs per node")
    gpu_ids: GpuIds = option((0,), "GPUs of a node to use, by number", automl=False)
    num_nodes: Count = option(1, "nodes")
    results_dir: OutputPath = option("", "folder for results of inference; unset: <results_dir>/inference")


class CalibrationSpec(Section):
    """Images from which the ranges of the activations are measured for int8."""

    images: InputPath = option("", "folder or archive of images like those that the model will see", tao="lacks")
    count: Count = option(256, "number of images to use, spread evenly over the set", tao="lacks")
    batch: Count = option(8, "images per batch during calibration", tao="lacks")

    @property
    def sources(self) -> tuple[str, ...]:
        """The data sources."""
        return (self.images,) if self.images else ()


class EngineCalibrationSpec(CalibrationSpec):
    """``gen_trt_engine.tensorrt.calibration``: the same options, also under TAO's names."""

    cal_image_dir: Texts = option((), "TAO's name for images: one folder or several", automl=False, compat=True)
    cal_cache_file: str = option(
        "",
        "accepted; the ranges are part of the engine, and no cache is written",
        no_effect="the ranges are part of the engine, and no cache is written",
        compat=True,
    )
    cal_batch_size: int | None = option(None, "TAO's name for batch", ge=1, compat=True)
    cal_batches: int | None = option(
        None, "TAO's name for count, in batches of cal_batch_size images (unset: 1)", ge=1, compat=True
    )

    @property
    def sources(self) -> tuple[str, ...]:
        """The data sources."""
        return tuple(map(os.path.expanduser, self.cal_image_dir)) or super().sources


class ExportSpec(Section):
    """``export``: from a checkpoint to ONNX."""

    checkpoint: InputPath = option("", "checkpoint to export", popular=True)
    onnx_file: OutputPath = option("", "ONNX file to write", popular=True)
    format: Literal["onnx", "xdl"] = option("onnx", "format to write; only onnx is supported")
    batch_size: BatchOrAuto = option(-1, "images per batch; -1: any number", ge=-1)
    input_channel: Literal[1, 3, 4] | None = option(None, "image channels; unset: the checkpoint's")
    input_height: int | None = option(None, "image height in pixels; unset: the checkpoint's", ge=32)
    input_width: int | None = option(None, "image width in pixels; unset: the checkpoint's", ge=32)
    include_preprocessing: bool = option(
        False, "take uint8 images [N, H, W, C] and normalise them in the model", tao="lacks"
    )
    quantize: Literal["none", "fp16", "int8"] = option("none", "precision of weights and arithmetic", tao="lacks")
    calibration: CalibrationSpec = option(CalibrationSpec(), "images for int8 calibration")
    overwrite: bool = option(False, "replace onnx_file if it exists", tao="lacks")
    opset_version: Count = option(17, "ONNX operator set")
    on_cpu: bool = option(False, "export on the CPU")
    gpu_id: int = option(0, "GPU to export on", ge=0)
    verbose: bool = option(False, "print the exporter's messages")
    results_dir: OutputPath = option("", "folder for results of export; unset: <results_dir>/export")


class TensorRTSpec(Section):
    """``gen_trt_engine.tensorrt``: precision, batch sizes and calibration of the engine."""

    data_type: EngineType = option(
        "fp32,fp16", "precision of the engine; fp32,fp16: fp16 where it is faster", popular=True
    )
    workspace_size: int = option(1024, "memory that the builder may use, in MiB; 0: no limit", ge=0)
    min_batch_size: Count = option(1, "smallest batch")
    opt_batch_size: Count = option(1, "batch that the engine is optimised for")
    max_batch_size: Count = option(1, "largest batch")
    layers_precision: tuple[str, ...] = option(
        (), "nodes that keep another precision, as name:fp32, where * matches any characters", automl=False
    )
    calibration: EngineCalibrationSpec = option(EngineCalibrationSpec(), "images for int8 calibration")


class GenTrtEngineSpec(Section):
    """``gen_trt_engine``: from ONNX to a TensorRT engine."""

    onnx_file: InputPath = option("", "ONNX file to build from", popular=True)
    trt_engine: OutputPath = option("", "engine to write", popular=True)
    backend: Literal["auto", "tensorrt", "tensorrt_rtx"] = option(
        "auto",
        "builder; auto: tensorrt if it is installed and there is a GPU, else tensorrt_rtx, which needs no GPU",
        tao="lacks",
    )
    compute_capability: Texts = option(
        (), "GPUs that tensorrt_rtx builds for, such as sm_89, or current; unset: current", tao="lacks", automl=False
    )
    batch_size: BatchOrAuto = option(-1, "images per batch; -1: min_batch_size to max_batch_size", ge=-1)
    input_channel: int | None = option(None, "accepted; the ONNX file decides", ge=1, no_effect=_ONNX_DECIDES)
    input_height: int | None = option(None, "accepted; the ONNX file decides", ge=1, no_effect=_ONNX_DECIDES)
    input_width: int | None = option(None, "accepted; the ONNX file decides", ge=1, no_effect=_ONNX_DECIDES)
    overwrite: bool = option(False, "replace trt_engine if it exists", tao="lacks")
    gpu_id: int = option(0, "GPU to build on", ge=0)
    timing_cache: LocalFile = option("", "file of TensorRT's timing cache, read and written")
    verbose: bool = option(False, "print the builder's messages")
    results_dir: OutputPath = option("", "folder for results of gen_trt_engine; unset: <results_dir>/gen_trt_engine")
    tensorrt: TensorRTSpec = option(TensorRTSpec(), "the engine")
