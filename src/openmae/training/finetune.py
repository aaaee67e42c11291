"""Supervised fine-tuning: the loss of a batch, and the accuracy on a labelled set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from timm.data import Mixup
from torch import Tensor, nn

from openmae.data.dataset import Batch
from openmae.data.normalise import Normaliser
from openmae.spec.schema import AugmentationSpec
from openmae.training.distributed import gather


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
        return score(predict(fabric, model, self.normalise, batches))


@dataclass(frozen=True)
class Predictions:
    """The classifier's word on N images, in the data set's order.

    Attributes:
        indices: ``[N]`` of the images in their data set.
        labels: ``[N]``, -1 where unknown.
        probabilities: ``[N, K]`` float32.
    """

    indices: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray


@torch.no_grad()
def predict(fabric: Fabric, model: nn.Module, normalise: Normaliser, batches: Iterable[Batch]) -> Predictions:
    """Class probabilities of every image, gathered from all processes and put in order."""
    indices, labels, probabilities = [], [], []
    for batch in map(fabric.to_device, batches):
        with fabric.autocast():
            logits = model(normalise(batch.images))
        probabilities.append(logits.float().softmax(dim=1).cpu().numpy())
        indices.append(batch.indices.cpu().numpy())
        labels.append(batch.labels.cpu().numpy())
    joined = [gather(fabric, part) for part in (indices, labels, probabilities)]
    order = joined[0].argsort(kind="stable")
    return Predictions(*(part[order] for part in joined))


def score(predictions: Predictions) -> dict[str, float]:
    """``val_loss``, ``ACC_all`` and ``ACC_top5`` of labelled predictions, shares in [0, 1]."""
    labels, probabilities = predictions.labels, predictions.probabilities
    likelihood = probabilities[np.arange(len(labels)), labels]
    rank = (probabilities > likelihood[:, None]).sum(axis=1)
    return {
        "val_loss": float(-np.log(np.maximum(likelihood, 1e-12)).mean()),
        "ACC_all": float((probabilities.argmax(axis=1) == labels).mean()),
        "ACC_top5": float((rank < 5).mean()),
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
