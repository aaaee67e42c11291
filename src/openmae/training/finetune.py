"""Supervised fine-tuning: the loss of a batch, and the accuracy on a labelled set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from timm.data import Mixup
from torch import Tensor, nn

from openmae.data.image_dataset import Batch
from openmae.data.normalise import Normaliser
from openmae.distributed.collectives import gather
from openmae.spec.sections.dataset import AugmentationSpec

_TOP = 5  # classes that are kept of an image


class FinetuneTask:
    """Predict the class of an image.

    Args:
        model: a timm classifier.
        normalise: uint8 images to the model's input.
        augmentation: of which Mixup, CutMix and label smoothing act here.
        num_classes: of the classifier.
        monitor: metric that picks the best checkpoint: ``ACC_all`` (maximised), or a loss.
    """

    def __init__(
        self, model: nn.Module, normalise: Normaliser, *, augmentation: AugmentationSpec, num_classes: int, monitor: str
    ) -> None:
        self.model = model
        self.normalise = normalise
        self.monitor = monitor
        self.lower_is_better = not monitor.startswith("ACC")
        self.smoothing = augmentation.smoothing
        self.mix = _build_mixup(augmentation, num_classes) if augmentation.mixes else None

    def training_loss(self, model: nn.Module, batch: Batch, epoch: int) -> Tensor:
        """Cross entropy of a batch; mixing draws from numpy's global generator, which the trainer addresses."""
        images, targets = self.normalise(batch.images), batch.labels
        if self.mix is not None:
            images, targets = self.mix(images, targets)  # soft targets, smoothed
            return F.cross_entropy(model(images).float(), targets)
        return F.cross_entropy(model(images).float(), targets, label_smoothing=self.smoothing)

    def validate(self, fabric: Fabric, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """``val_loss`` (no smoothing), ``ACC_all`` (top-1) and ``ACC_top5``."""
        return score(predict(fabric, lambda images: model(self.normalise(images)), batches))


@dataclass(frozen=True)
class Predictions:
    """The classifier's word on N images, in the data set's order.

    Attributes:
        indices: ``[N]`` of the images in their data set.
        labels: ``[N]``, -1 where unknown.
        losses: ``[N]`` cross entropy; NaN where the label is unknown.
        classes: ``[N, min(5, K)]`` most likely classes of K, the likeliest first.
        probabilities: ``[N, min(5, K)]`` of these, float32.
    """

    indices: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray


@torch.no_grad()
def predict(fabric: Fabric, classify: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> Predictions:
    """The most likely classes of every image, gathered from all processes and put in order.

    Args:
        fabric: gives precision and processes.
        classify: from images as the data set gives them to logits ``[B, K]``.
        batches: of the set.
    """
    rows: list[list[np.ndarray]] = []
    for batch in map(fabric.to_device, batches):
        with fabric.autocast():
            logits = classify(batch.images)
        logs = logits.float().log_softmax(dim=1)
        losses = F.nll_loss(logs, batch.labels.clamp(min=0), reduction="none").where(batch.labels >= 0, torch.nan)
        best = logs.sort(dim=1, descending=True, stable=True)
        # Copies, no views of all K classes: of a million images those would be gigabytes.
        top, shares = best.indices[:, :_TOP].clone(), best.values[:, :_TOP].exp()
        rows.append([part.cpu().numpy() for part in (batch.indices, batch.labels, losses, top, shares)])
    joined = [gather(fabric, [row[part] for row in rows]) for part in range(len(fields(Predictions)))]
    order = joined[0].argsort(kind="stable")
    return Predictions(*(part[order] for part in joined))


def score(predictions: Predictions) -> dict[str, float]:
    """``val_loss``, ``ACC_all`` and ``ACC_top5`` of labelled predictions, shares in [0, 1]."""
    hits = predictions.classes == predictions.labels[:, None]
    return {
        "val_loss": float(predictions.losses.mean(dtype=np.float64)),
        "ACC_all": float(hits[:, 0].mean()),
        "ACC_top5": float(hits.any(axis=1).mean()),
    }


def _build_mixup(augmentation: AugmentationSpec, num_classes: int) -> Mixup:
    return Mixup(
        mixup_alpha=augmentation.mixup,
        cutmix_alpha=augmentation.cutmix,
        cutmix_minmax=augmentation.cutmix_minmax,
        prob=augmentation.mixup_prob,
        switch_prob=augmentation.mixup_switch_prob,
        mode=augmentation.mixup_mode,
        label_smoothing=augmentation.smoothing,
        num_classes=num_classes,
    )
