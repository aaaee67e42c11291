"""OpenMAE: pretrain image backbones with masked autoencoders, fine-tune them and deploy them.

``import openmae`` is fast and does not import torch; the rest is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from openmae import errors
from openmae._version import __version__
from openmae.api import (
    TrainResult,
    build_autoencoder,
    evaluate,
    export,
    finetune,
    gen_trt_engine,
    inference,
    list_architectures,
    pretrain,
    train,
)

if TYPE_CHECKING:
    from openmae import jobs
    from openmae.checkpoints.weights import load_backbone
    from openmae.engines.batching import read_images
    from openmae.engines.predictor import open_predictor
    from openmae.models.mae import MaskedAutoencoder
    from openmae.models.masking import random_mask
    from openmae.spec.load import load_spec
    from openmae.spec.schema import ExperimentSpec

__all__ = [
    "__version__",
    "train",
    "pretrain",
    "finetune",
    "TrainResult",
    "evaluate",
    "inference",
    "export",
    "gen_trt_engine",
    "load_backbone",
    "open_predictor",
    "read_images",
    "load_spec",
    "ExperimentSpec",
    "list_architectures",
    "build_autoencoder",
    "MaskedAutoencoder",
    "random_mask",
    "errors",
    "jobs",
]

_LAZY = {
    "load_backbone": "openmae.checkpoints.weights",
    "open_predictor": "openmae.engines.predictor",
    "read_images": "openmae.engines.batching",
    "load_spec": "openmae.spec.load",
    "ExperimentSpec": "openmae.spec.schema",
    "MaskedAutoencoder": "openmae.models.mae",
    "random_mask": "openmae.models.masking",
}


def __getattr__(name: str) -> Any:
    if name == "jobs":
        return importlib.import_module("openmae.jobs")
    if name not in _LAZY:
        raise AttributeError(f"module 'openmae' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
