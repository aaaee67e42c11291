"""Predictions of a classifier on a data set, and how many of them are right."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor

from openmae.data.image_dataset import Batch
from openmae.distributed.collectives import gather

_TOP = 5  # classes that are kept per image


@dataclass(frozen=True)
class Predictions:
    """The predictions on N images, in the data set's order.

    Attributes:
        indices: ``[N]`` of the images in the data set.
        labels: ``[N]``, -1 where unknown.
        losses: ``[N]`` cross entropy; NaN where the label is unknown.
        classes: ``[N, min(5, K)]`` the most likely of K classes, in decreasing order.
        probabilities: ``[N, min(5, K)]`` of these classes, float32.
    """

    indices: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray


@torch.no_grad()
def predict(fabric: Fabric, classify: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> Predictions:
    """Return the most likely classes of every image, gathered from all processes.

    Args:
        fabric: gives precision and processes.
        classify: maps images, as the data set gives them, to logits ``[B, K]``.
        batches: of the data set.
    """
    rows: list[list[np.ndarray]] = []
    for batch in map(fabric.to_device, batches):
        with fabric.autocast():
            logits = classify(batch.images)
        logs = logits.float().log_softmax(dim=1)
        losses = F.nll_loss(logs, batch.labels.clamp(min=0), reduction="none").where(batch.labels >= 0, torch.nan)
        best = logs.sort(dim=1, descending=True, stable=True)
        # copies, not views of all K classes: of a million images those would be gigabytes
        top, probabilities = best.indices[:, :_TOP].clone(), best.values[:, :_TOP].exp()
        rows.append([part.cpu().numpy() for part in (batch.indices, batch.labels, losses, top, probabilities)])
    joined = [gather(fabric, [row[part] for row in rows]) for part in range(len(fields(Predictions)))]
    order = joined[0].argsort(kind="stable")
    return Predictions(*(part[order] for part in joined))


def score(predictions: Predictions) -> dict[str, float]:
    """Return ``val_loss``, and ``ACC_all`` and ``ACC_top5`` in [0, 1], of labelled predictions."""
    hits = predictions.classes == predictions.labels[:, None]
    return {
        "val_loss": float(predictions.losses.mean(dtype=np.float64)),
        "ACC_all": float(hits[:, 0].mean()),
        "ACC_top5": float(hits.any(axis=1).mean()),
    }
