"""Other numbers of processes: the global batch and the place in an epoch."""

from __future__ import annotations

import pytest

from openmae.training.elastic import Share, accumulation_for, same_place


@pytest.mark.parametrize(
    ("begun", "last", "now", "accumulated", "told"),
    [
        ((4, 8, 1), (4, 8, 1), (2, 8, 1), 2, "its global batch stays 32 = 2 process(es) x 8 images x 2 accumulated."),
        ((4, 8, 2), (4, 8, 2), (8, 8, 2), 1, "its global batch stays 64 = 8 process(es) x 8 images x 1 accumulated."),
        ((4, 8, 1), (2, 8, 2), (2, 8, 1), 2, ""),  # the same command once more
        ((4, 8, 1), (2, 8, 2), (4, 8, 1), 1, "in place of 2: its global batch stays 32 = 4 process(es)"),
        ((4, 6, 1), (4, 6, 1), (3, 6, 1), 1, "its global batch was 24 = 4 process(es) x 6 images x 1 accumulated and"),
        ((4, 6, 1), (4, 6, 1), (3, 6, 1), 1, "dataset.batch_size=8 would keep a global batch of 24."),
        ((2, 8, 1), (2, 8, 1), (4, 8, 1), 1, "is now 32 = 4 process(es) x 8 images"),
        ((4, 8, 1), (4, 8, 1), (2, 16, 1), 1, "its global batch stays 32 = 2 process(es) x 16 images"),
    ],
)
def test_the_global_batch_is_kept_where_it_can_be(begun, last, now, accumulated, told):
    found, text = accumulation_for(Share(*begun), Share(*last), Share(*now))
    assert found == accumulated
    assert told in text
    assert bool(text) == bool(told)


@pytest.mark.parametrize(
    ("before", "now", "batch", "expected"),
    [
        ((4, 4, 1), (2, 4, 2), 3, 6),
        ((2, 4, 2), (4, 4, 1), 6, 3),
        ((2, 4, 2), (4, 4, 1), 5, 5),  # no batch of four processes begins there
        ((4, 4, 1), (3, 4, 1), 3, 4),
        ((4, 4, 1), (4, 4, 1), 3, 3),
        ((4, 4, 1), (2, 4, 2), 0, 0),
        ((4, 4, 1), (2, 4, 2), 10, 20),  # the epoch is trained, and not yet validated
        ((2, 4, 2), (3, 4, 1), 10, 20),
    ],
)
def test_the_place_in_an_epoch_is_a_number_of_images(before, now, batch, expected):
    progress = {"epoch": 2, "batch": batch, "step": 9, "batches_per_epoch": 10}
    found = same_place(progress, Share(*before), Share(*now), 20)
    assert found["batch"] == expected
    moved = before[:2] != now[:2] and (expected != batch or batch == 0)
    assert found["batches_per_epoch"] == (20 if moved else 10)


def test_a_spec_tells_the_share():
    spec = {"train": {"num_gpus": 2, "num_nodes": 3, "accum_grad_batches": 4}, "dataset": {"batch_size": 5}}
    assert (Share.of(spec), Share.of(spec).update) == (Share(6, 5, 4), 120)
