"""Tests of resuming with another number of processes."""

from __future__ import annotations

import pytest

from openmae.training.elastic import BatchLayout, accumulation_for, same_position


@pytest.mark.parametrize(
    ("begun", "last", "now", "accumulated", "notice"),
    [
        ((4, 8, 1), (4, 8, 1), (2, 8, 1), 2, "global batch stays 32 (8 images x 2 processes x 2 accumulated batches)."),
        ((4, 8, 2), (4, 8, 2), (8, 8, 2), 1, "its global batch stays 64 (8 images x 8 processes)."),
        ((4, 8, 1), (2, 8, 2), (2, 8, 1), 2, ""),  # the same command once more
        (
            (4, 8, 1),
            (2, 8, 2),
            (4, 8, 1),
            1,
            "with 4 processes instead of 2: its global batch stays 32 (8 images x 4 processes)",
        ),
        (
            (4, 6, 1),
            (4, 6, 1),
            (3, 6, 1),
            1,
            "its global batch was 24 (6 images x 4 processes) and is now 18 (6 images x 3 processes)",
        ),
        ((4, 6, 1), (4, 6, 1), (3, 6, 1), 1, "Set dataset.batch_size=8 to keep a global batch of 24."),
        (
            (2, 8, 1),
            (2, 8, 1),
            (4, 8, 1),
            1,
            "is now 32 (8 images x 4 processes); the spec's learning rate applies to the new one.",
        ),
        ((4, 8, 1), (4, 8, 1), (2, 16, 1), 1, "its global batch stays 32 (16 images x 2 processes)"),
    ],
)
def test_global_batch_is_kept_where_possible(begun, last, now, accumulated, notice):
    found, text = accumulation_for(BatchLayout(*begun), BatchLayout(*last), BatchLayout(*now))
    assert found == accumulated
    assert notice in text
    assert bool(text) == bool(notice)


@pytest.mark.parametrize(
    ("before", "now", "batch", "expected"),
    [
        ((4, 4, 1), (2, 4, 2), 3, 6),
        ((2, 4, 2), (4, 4, 1), 6, 3),
        ((2, 4, 2), (4, 4, 1), 5, 5),  # no batch of four processes starts there
        ((4, 4, 1), (3, 4, 1), 3, 4),
        ((4, 4, 1), (4, 4, 1), 3, 3),
        ((4, 4, 1), (2, 4, 2), 0, 0),
        ((4, 4, 1), (2, 4, 2), 10, 20),  # the epoch is trained, but not yet validated
        ((2, 4, 2), (3, 4, 1), 10, 20),
    ],
)
def test_position_in_an_epoch_is_counted_in_images(before, now, batch, expected):
    progress = {"epoch": 2, "batch": batch, "step": 9, "batches_per_epoch": 10}
    found = same_position(progress, BatchLayout(*before), BatchLayout(*now), 20)
    assert found["batch"] == expected
    moved = before[:2] != now[:2] and (expected != batch or batch == 0)
    assert found["batches_per_epoch"] == (20 if moved else 10)


def test_layout_is_read_from_a_spec():
    spec = {"train": {"num_gpus": 2, "num_nodes": 3, "accum_grad_batches": 4}, "dataset": {"batch_size": 5}}
    assert (BatchLayout.of(spec), BatchLayout.of(spec).global_batch) == (BatchLayout(6, 5, 4), 120)
