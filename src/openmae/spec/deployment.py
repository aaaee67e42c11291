"""The sections ``export`` and ``gen_trt_engine``: from a checkpoint to a deployed model."""

from __future__ import annotations

import os
from typing import Literal

from openmae.spec.option import BatchOrAuto, EngineType, LocalPath, Section, Texts, option


class CalibrationSpec(Section):
    """Images that show which range the activations have, for int8 (ours)."""

    images: LocalPath = option("", "folder or archive of images like those that the model will see")
    count: int = option(256, "how many of them to use, spread evenly over the set", ge=1)
    batch: int = option(8, "images per batch while calibrating", ge=1)

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the images are."""
        return (self.images,) if self.images else ()

    @property
    def total(self) -> int:
        """How many images to use."""
        return self.count

    @property
    def batch_size(self) -> int:
        """Images per batch."""
        return self.batch


class EngineCalibrationSpec(CalibrationSpec):
    """``gen_trt_engine.tensorrt.calibration``: the same, and TAO's names for it."""

    cal_image_dir: Texts = option((), "TAO's name of images: one folder or several", automl=False)
    cal_cache_file: str = option("", "accepted; the ranges are part of the engine, and no cache is written")
    cal_batch_size: int | None = option(None, "TAO's name of batch", ge=1)
    cal_batches: int | None = option(None, "TAO's name of count, in batches of cal_batch_size (unset: 1) images", ge=1)

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the images are."""
        return tuple(map(os.path.expanduser, self.cal_image_dir)) or super().sources

    @property
    def total(self) -> int:
        """How many images to use."""
        return self.count if self.cal_batches is None else self.cal_batches * (self.cal_batch_size or 1)

    @property
    def batch_size(self) -> int:
        """Images per batch."""
        return self.batch if self.cal_batch_size is None else self.cal_batch_size


class ExportSpec(Section):
    """``export``: from a checkpoint to ONNX."""

    checkpoint: LocalPath = option("", "checkpoint to export", popular=True)
    onnx_file: LocalPath = option("", "ONNX file to write", popular=True)
    format: Literal["onnx", "xdl"] = option("onnx", "format to write; only onnx can be written")
    batch_size: BatchOrAuto = option(-1, "images per batch; -1: any number", ge=-1)
    input_channel: Literal[1, 3, 4] | None = option(None, "image channels; unset: the checkpoint's")
    input_height: int | None = option(None, "image height in pixels; unset: the checkpoint's", ge=32)
    input_width: int | None = option(None, "image width in pixels; unset: the checkpoint's", ge=32)
    include_preprocessing: bool = option(False, "take uint8 images [N, H, W, C] and normalise inside (ours)")
    quantize: Literal["none", "fp16", "int8"] = option("none", "precision of weights and arithmetic (ours)")
    calibration: CalibrationSpec = option(CalibrationSpec(), "images to calibrate int8 with")
    overwrite: bool = option(False, "replace onnx_file where it exists (ours)")
    opset_version: int = option(17, "ONNX operator set", ge=1)
    on_cpu: bool = option(False, "export on the CPU")
    gpu_id: int = option(0, "GPU to export on", ge=0)
    verbose: bool = option(False, "print the exporter's messages")
    results_dir: LocalPath = option("", "where export writes; unset: <results_dir>/export")


class TensorRTSpec(Section):
    """``gen_trt_engine.tensorrt``: what the engine is built for."""

    data_type: EngineType = option(
        "fp32,fp16", "precision of the engine; fp32,fp16: fp16 where it is faster", popular=True
    )
    workspace_size: int = option(1024, "memory that the builder may use, in MiB; 0: no limit", ge=0)
    min_batch_size: int = option(1, "smallest batch", ge=1)
    opt_batch_size: int = option(1, "batch that the engine is tuned for", ge=1)
    max_batch_size: int = option(1, "largest batch", ge=1)
    layers_precision: tuple[str, ...] = option(
        (), "nodes that keep another precision, as name:fp32, where * stands for any characters", automl=False
    )
    calibration: EngineCalibrationSpec = option(EngineCalibrationSpec(), "images to calibrate int8 with")


class GenTrtEngineSpec(Section):
    """``gen_trt_engine``: from ONNX to a TensorRT engine."""

    onnx_file: LocalPath = option("", "ONNX file to build from", popular=True)
    trt_engine: LocalPath = option("", "engine to write", popular=True)
    backend: Literal["auto", "tensorrt", "tensorrt_rtx"] = option(
        "auto", "builder; auto: tensorrt where it and a GPU are present, else tensorrt_rtx, which needs no GPU (ours)"
    )
    compute_capability: Texts = option(
        (), "GPUs that tensorrt_rtx builds for, such as sm_89, or current; unset: current (ours)", automl=False
    )
    batch_size: BatchOrAuto = option(-1, "images per batch; -1: min to max_batch_size", ge=-1)
    input_channel: int | None = option(None, "stands in a published example; the ONNX file decides", ge=1)
    input_height: int | None = option(None, "likewise", ge=1)
    input_width: int | None = option(None, "likewise", ge=1)
    overwrite: bool = option(False, "replace trt_engine where it exists (ours)")
    gpu_id: int = option(0, "GPU to build on", ge=0)
    timing_cache: LocalPath = option("", "file of TensorRT's timing cache, read and written")
    verbose: bool = option(False, "print the builder's messages")
    results_dir: LocalPath = option("", "where gen_trt_engine writes; unset: <results_dir>/gen_trt_engine")
    tensorrt: TensorRTSpec = option(TensorRTSpec(), "the engine")
