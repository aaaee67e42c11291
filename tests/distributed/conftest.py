"""Fixtures of the tests in this folder."""

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.helpers.training import (
    _one_thread,
    assert_same,
    assert_same_run,
    payload_of,
    photos,
    tiny_overrides,
    train,
)
from torch.multiprocessing.spawn import start_processes

_HIDDEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # by Python, unless asked


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the processes of a run where CUDA allows it; each one that is spawned imports torch, which takes seconds."""

    def fork(work: Callable[..., None], arguments: tuple[Any, ...], count: int, *, join: bool) -> Any:
        return start_processes(partial(with_warnings, work), arguments, count, join, start_method="fork")

    if not torch.cuda.is_available():
        monkeypatch.setattr("openmae.distributed.launch.spawn", fork)


def with_warnings(work: Callable[..., None], *arguments: Any) -> None:
    """Print warnings, as a spawned process does; pytest records them."""
    importlib.reload(warnings)
    warnings.resetwarnings()
    for category in _HIDDEN:
        warnings.simplefilter("ignore", category)
    work(*arguments)
