"""Supervised fine-tuning: the training loss, and the accuracy on a validation set."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from lightning_fabric import Fabric
from timm.data import Mixup
from torch import Tensor, nn

from openmae.data.image_dataset import Batch
from openmae.evaluation.predictions import predict, score
from openmae.models.normalise import Normaliser
from openmae.spec.metrics import METRICS
from openmae.spec.sections.dataset import AugmentationSpec


class FinetuneTask:
    """The task of predicting the class of an image.

    Args:
        model: a timm classifier.
        augmentation: only Mixup, CutMix and label smoothing are used here.
        monitor: metric that selects the best checkpoint.
    """

    def __init__(
        self, model: nn.Module, normalise: Normaliser, *, augmentation: AugmentationSpec, num_classes: int, monitor: str
    ) -> None:
        self.model = model
        self.normalise = normalise
        self.monitor = monitor
        self.lower_is_better = METRICS[monitor].direction == "minimize"
        self.smoothing = augmentation.smoothing
        self.mix = _build_mixup(augmentation, num_classes) if augmentation.mixes else None

    def training_loss(self, model: nn.Module, batch: Batch, epoch: int) -> Tensor:
        """Return the cross entropy of a batch. Mixup uses numpy's global generator, which the trainer seeds."""
        images, targets = self.normalise(batch.images), batch.labels
        if self.mix is not None:
            images, targets = self.mix(images, targets)  # soft targets, smoothed
            return F.cross_entropy(model(images).float(), targets)
        return F.cross_entropy(model(images).float(), targets, label_smoothing=self.smoothing)

    def validate(self, fabric: Fabric, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Return ``val_loss`` (without smoothing), ``ACC_all`` (top-1) and ``ACC_top5``."""
        return score(predict(fabric, lambda images: model(self.normalise(images)), batches))


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
