"""Run actions as jobs that can use one another's results: ``Client`` submits, watches and cancels them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmae.jobs.client import Client
    from openmae.jobs.job import Job
    from openmae.jobs.outcome import FailureAnalysis

__all__ = ["Client", "FailureAnalysis", "Job"]
_MODULES = {"Client": "client", "FailureAnalysis": "outcome", "Job": "job"}


def __getattr__(name: str) -> Any:  # lazily, since a job's supervisor imports this package but needs none of these
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
