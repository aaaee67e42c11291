"""Predictions of a classifier on a data set, and their accuracy."""

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

_TOP = 5  # classes kept per image


@dataclass(frozen=True)
class Predictions:
    """Predictions on N images, in the order of the data set.

    Attributes:
        indices: ``[N]``, image indices in the data set.
        labels: ``[N]``, -1 if unknown.
        losses: ``[N]``, cross entropy; NaN if the label is unknown.
        classes: ``[N, min(5, K)]``, the most likely of K classes, in decreasing order of probability.
        probabilities: ``[N, min(5, K)]``, float32, of these classes.
    """

    indices: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray


@torch.no_grad()
def predict(fabric: Fabric, classify: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> Predictions:
    """Return the most likely classes of every image, gathered from all processes.

    ``classify`` maps decoded images (uint8, or float32 in 0..255) to logits ``[B, K]``.
    """
    rows: list[list[np.ndarray]] = []
    for batch in map(fabric.to_device, batches):
        with fabric.autocast():
            logits = classify(batch.images)
        logs = logits.float().log_softmax(dim=1)
        losses = F.nll_loss(logs, batch.labels.clamp(min=0), reduction="none").where(batch.labels >= 0, torch.nan)
        best = logs.sort(dim=1, descending=True, stable=True)
        # clone, because a view would keep the scores of all K classes in memory
        top, probabilities = best.indices[:, :_TOP].clone(), best.values[:, :_TOP].exp()
        rows.append([part.cpu().numpy() for part in (batch.indices, batch.labels, losses, top, probabilities)])
    joined = [gather(fabric, [row[part] for row in rows]) for part in range(len(fields(Predictions)))]
    order = joined[0].argsort(kind="stable")
    return Predictions(*(part[order] for part in joined))


def score(predictions: Predictions) -> dict[str, float]:
    """Return ``val_loss``, and ``ACC_all`` and ``ACC_top5`` in [0, 1]; all images must be labelled."""
    hits = predictions.classes == predictions.labels[:, None]
    return {
        "val_loss": float(predictions.losses.mean(dtype=np.float64)),
        "ACC_all": float(hits[:, 0].mean()),
        "ACC_top5": float(hits.any(axis=1).mean()),
    }
