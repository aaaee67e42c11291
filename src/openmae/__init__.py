"""OpenMAE: masked-autoencoder pretraining, fine-tuning and measuring of image backbones.

``import openmae`` is instant and free of torch: what does the work is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmae._version import __version__

if TYPE_CHECKING:
    from openmae.checkpoints.load import load_backbone
    from openmae.engines.batching import read_images
    from openmae.engines.predictor import open_predictor
    from openmae.spec.load import load_spec
    from openmae.spec.schema import ExperimentSpec


__all__ = [
    "__version__",
    "train",
    "evaluate",
    "inference",
    "export",
    "gen_trt_engine",
    "load_backbone",
    "open_predictor",
    "read_images",
    "load_spec",
    "ExperimentSpec",
]

_HOMES = {
    "open_predictor": "openmae.engines.predictor",
    "read_images": "openmae.engines.batching",
    "load_backbone": "openmae.checkpoints.load",
    "load_spec": "openmae.spec.load",
    "ExperimentSpec": "openmae.spec.schema",
}


def train(spec: str | Path | Mapping[str, Any] | ExperimentSpec, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Pretrain or fine-tune, as ``mae train`` does.

    Writes checkpoints, ``backbone.safetensors``, ``metrics.csv`` and ``report.html`` into ``<results_dir>/train``. A
    second call with the same results_dir goes on from the newest checkpoint there, or does nothing if all epochs are
    trained.

    Args:
        spec: a YAML file, nested values such as ``{"train": {"num_epochs": 3}}``, or an ``ExperimentSpec``.
        overrides: dotted keys with YAML values, ``"train.optim.lr=1e-4"``.

    Returns:
        The last epoch's metrics: ``train_loss``; with validation images ``val_loss``, and ``ACC_all`` and ``ACC_top5``
        (finetune) or ``knn_acc`` and ``probe_acc`` (pretrain, where the images have classes). Accuracies are shares
        in [0, 1].

    Raises:
        UserError: the spec, the data or a checkpoint cannot be used; nothing was trained. It is a ``ValueError``.
        RunError: training failed (the disk is full, the loss is not finite); the checkpoints so far are good.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written.
    """
    return _run("train", spec, overrides)


def evaluate(spec: str | Path | Mapping[str, Any] | ExperimentSpec, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Measure ``evaluate.checkpoint`` on ``dataset.val_data_sources``, as ``mae evaluate`` does.

    Args:
        spec: a YAML file, nested values, or an ``ExperimentSpec``.
        overrides: dotted keys with YAML values.

    Returns:
        ``ACC_all``, ``ACC_top5`` and ``val_loss`` of a fine-tuned checkpoint; ``val_loss`` of a pretrained one, and
        ``knn_acc`` and ``probe_acc`` where the images have classes. Accuracies are shares in [0, 1].

    Raises:
        UserError: the spec, the data or the checkpoint cannot be used.
    """
    return _run("evaluate", spec, overrides)


def inference(spec: str | Path | Mapping[str, Any] | ExperimentSpec, overrides: Sequence[str] = ()) -> Path:
    """Run ``inference.checkpoint`` over ``dataset.test_data_sources``, as ``mae inference`` does.

    Args:
        spec: a YAML file, nested values, or an ``ExperimentSpec``.
        overrides: dotted keys with YAML values.

    Returns:
        The file written: ``results.csv`` (path, class, probability, the next four) of a fine-tuned checkpoint,
        ``embeddings.parquet`` (path, vector) of a pretrained one.

    Raises:
        UserError: the spec, the data or the checkpoint cannot be used.
    """
    return _run("inference", spec, overrides)


def export(spec: str | Path | Mapping[str, Any] | ExperimentSpec, overrides: Sequence[str] = ()) -> Path:
    """Write ``export.checkpoint`` as ONNX, proven equal to it, as ``mae export`` does.

    Args:
        spec: a YAML file, nested values, or an ``ExperimentSpec``.
        overrides: dotted keys with YAML values.

    Returns:
        The ONNX file: ``logits`` of a fine-tuned checkpoint, ``features`` and ``tokens`` of a pretrained one.

    Raises:
        UserError: the spec or the checkpoint cannot be used.
        RunError: the file would not be equal to the checkpoint; it was removed.
    """
    return _run("export", spec, overrides)


def gen_trt_engine(spec: str | Path | Mapping[str, Any] | ExperimentSpec, overrides: Sequence[str] = ()) -> Path:
    """Build a TensorRT engine from ``gen_trt_engine.onnx_file``, as ``mae gen_trt_engine`` does.

    Args:
        spec: a YAML file, nested values, or an ``ExperimentSpec``.
        overrides: dotted keys with YAML values.

    Returns:
        The engine; beside it lies its description, ``<engine>.json``.

    Raises:
        UserError: the spec or the ONNX file cannot be used, or TensorRT is not here.
        RunError: the builder failed.
    """
    return _run("gen_trt_engine", spec, overrides)


def _run(action: str, spec: Any, overrides: Sequence[str]) -> Any:
    from openmae.errors import UserError
    from openmae.main_guard import end_if_rerun
    from openmae.results.streams import guarded
    from openmae.spec.load import load_spec

    end_if_rerun()
    with guarded("stderr"):
        try:
            checked = load_spec(spec, overrides, action=action)
            return importlib.import_module(f"openmae.actions.{action}").run(checked)
        except UserError as error:
            # the reason is in the call, not in the many frames below it
            raise error.with_traceback(None) from error.__cause__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'openmae' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
