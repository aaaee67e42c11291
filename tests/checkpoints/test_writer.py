"""Tests of the host copy and the background thread."""

from __future__ import annotations

import pytest
import torch

from openmae.checkpoints.writer import BackgroundWorker, HostCopy
from openmae.errors import RunError


def test_host_copy_is_a_snapshot_and_reuses_memory():
    host = HostCopy()
    weights = torch.arange(4.0)
    state = {"model": {"w": weights}, "groups": [{"lr": 1.0, "betas": (0.9, 0.95)}], "progress": {"step": 3}}
    first = host.copy(state)
    weights.zero_()
    assert first["model"]["w"].tolist() == [0, 1, 2, 3]
    assert {k: first[k] for k in ("groups", "progress")} == {k: state[k] for k in ("groups", "progress")}
    second = host.copy(state)
    assert second["model"]["w"].data_ptr() == first["model"]["w"].data_ptr()
    other = host.copy({"model": {"w": torch.zeros(2, 3, dtype=torch.int64)}})
    assert torch.equal(other["model"]["w"], torch.zeros(2, 3, dtype=torch.int64)), "the shape had changed"


def test_error_of_the_thread_is_raised_once():
    worker = BackgroundWorker()

    def fail():
        raise RunError("no")

    worker.start(fail)
    with pytest.raises(RunError, match="no"):
        worker.wait()
    worker.wait()
