"""Predictions of a classifier, and their score."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openmae.data.image_dataset import Batch
from openmae.distributed.launch import build_fabric
from openmae.evaluation.predictions import Predictions, predict, score


def logits_of(images: torch.Tensor) -> torch.Tensor:
    return images[:, :, 0, 0] / 50


def batch_of(count: int, start: int) -> Batch:
    generator = torch.Generator().manual_seed(start)
    images = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)
    indices = torch.arange(start, start + count)
    return Batch(images, indices % 3, indices, 0, [])


def test_predictions_come_in_order():
    fabric = build_fabric("evaluate", 1, [0], 1)
    parts = [batch_of(3, 0), batch_of(3, 3), batch_of(1, 6)]
    found = predict(fabric, logits_of, parts[::-1])
    assert found.indices.tolist() == list(range(7))
    assert found.labels.tolist() == [n % 3 for n in range(7)]
    images = torch.cat([part.images for part in parts])
    shares = logits_of(images).softmax(1)
    np.testing.assert_allclose(found.probabilities, shares.sort(descending=True).values, rtol=1e-6)
    np.testing.assert_array_equal(found.classes, shares.argsort(descending=True, stable=True))
    np.testing.assert_allclose(found.losses, -shares[range(7), found.labels].log(), rtol=1e-6)


def predicted(logits: list[list[float]], labels: list[int]) -> Predictions:
    """Return the predictions for given logits."""
    batch = Batch(torch.tensor(logits)[:, :, None, None], torch.tensor(labels), torch.arange(len(labels)), 0, [])
    return predict(build_fabric("evaluate", 1, [0], 1), torch.nn.Flatten(), [batch])


def test_score():
    probabilities = [[0.5, 0.3, 0.1, 0.04, 0.03, 0.03], [0.1, 0.2, 0.3, 0.2, 0.15, 0.05]]
    found = predicted(np.log(probabilities).tolist(), [0, 5])
    assert found.classes.tolist() == [[0, 1, 2, 3, 4], [2, 1, 3, 4, 0]]
    assert score(found) == pytest.approx(
        {"val_loss": -(np.log(0.5) + np.log(0.05)) / 2, "ACC_all": 0.5, "ACC_top5": 0.5}, rel=1e-6
    )


def test_fewer_classes_than_five_are_always_in_the_top_five():
    found = score(predicted([[2.0, 0.1]], [1]))
    assert (found["ACC_all"], found["ACC_top5"]) == (0.0, 1.0)


def test_nonfinite_logits_are_not_counted_as_right():
    found = score(predicted([[float("nan")] * 6], [5]))
    assert np.isnan(found["val_loss"])
    assert (found["ACC_all"], found["ACC_top5"]) == (0.0, 0.0)


def test_unknown_labels_have_no_loss():
    assert np.isnan(predicted([[2.0, 0.1]], [-1]).losses).all()
