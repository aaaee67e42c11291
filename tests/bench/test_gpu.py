"""The benchmark for machines with a GPU, on the CPU in small."""

from __future__ import annotations

from typing import Any

import pytest

from bench import gpu


def test_a_quick_run_measures_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "QUICK_ARCHS", {"vit_tiny_patch16": 2})
    report = gpu.run(quick=True)
    assert all(len(row) == len(report.columns) for row in report.rows)
    fp32, bf16, parity, run, files, copies = report.data
    assert (fp32["precision"], bf16["precision"]) == ("fp32", "bf16")
    assert 0 < fp32["operations_per_s"] < 2 * fp32["product_rate"]
    assert 0.4 < fp32["counted_memory"] / 2**30 < 0.6
    assert parity["equal"], "the CPU differs from itself"
    assert run["images_per_s"] > 0
    assert (files["source"], copies["source"]) == ("JPEG", "copies")


def test_another_result_than_that_of_a_cpu_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = gpu._loss_and_gradients, []

    def shifted(model: Any, images: Any) -> Any:
        calls.append(1)
        loss, gradients = original(model, images)
        return loss * (1 if len(calls) == 1 else 1.01), gradients

    monkeypatch.setattr(gpu, "_loss_and_gradients", shifted)
    (row, values), *_ = gpu._parity({"convnextv2_atto": 2})
    assert not values["equal"]
    assert "DIFFERENT: loss 1.0e-02, gradients 0.0e+00" in row[1]
