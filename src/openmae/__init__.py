"""OpenMAE: masked-autoencoder pretraining, fine-tuning and measuring of image backbones.

The names below are imported when they are first used, so that ``import openmae`` stays free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmae.models.weights import load_backbone

__version__ = "0.1.0"
__all__ = ["__version__", "load_backbone"]

_HOMES = {"load_backbone": "openmae.models.weights"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'openmae' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
