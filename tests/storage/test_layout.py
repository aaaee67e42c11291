"""File names of results folders: the names that outside clients rely on, and reading them back."""

from __future__ import annotations

import doctest

import pytest

from openmae.storage import layout


def test_the_names_that_clients_rely_on() -> None:
    names = (
        layout.STATUS,
        layout.METRICS,
        layout.SPEC,
        layout.BEST,
        layout.BACKBONE,
        layout.REPORT,
        layout.PREDICTIONS,
    )
    assert names == (
        *("status.json", "metrics.csv", "experiment.yaml", "model_best.pth", "backbone.safetensors", "report.html"),
        "results.csv",
    )
    assert layout.RECONSTRUCTIONS == "reconstructions"
    assert layout.latest_name("hiera_tiny_224") == "hiera_tiny_224_latest.pth"


@pytest.mark.parametrize("progress", [(0, 0), (3, 120), (1000, 123456)])
def test_a_checkpoint_name_can_be_read_back(progress: tuple[int, int]) -> None:
    assert layout.checkpoint_progress(layout.checkpoint_name(*progress)) == progress


@pytest.mark.parametrize("name", ["model_best.pth", "model_epoch_001_step_00001.pth.diverged", "x_latest.pth", ""])
def test_other_names_have_no_progress(name: str) -> None:
    assert layout.checkpoint_progress(name) is None


def test_the_epoch_of_reconstructions_can_be_read_back() -> None:
    assert layout.reconstruction_name(12) == "epoch_0012.png"
    assert [layout.reconstruction_epoch(name) for name in ("epoch_0012.png", "epoch_12345.png")] == [12, 12345]
    assert layout.reconstruction_epoch("last.png") is None


def test_checkpoints_are_sorted_by_number_not_by_text() -> None:
    names = [layout.checkpoint_name(epoch, step) for epoch, step in [(999, 9), (1000, 5), (999, 100000)]]
    assert layout.sort_checkpoints(["status.json", *names]) == [names[0], names[2], names[1]]


def test_examples_run() -> None:
    assert doctest.testmod(layout).failed == 0
