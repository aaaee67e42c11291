"""Masked pretraining: the training loss, and the quality of the encoder on a validation set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from openmae.data.image_dataset import Batch
from openmae.distributed.collectives import gather, sum_over_ranks
from openmae.distributed.rendezvous import watchdog_of
from openmae.evaluation.probes import probe
from openmae.models.mae import MaskedAutoencoder
from openmae.models.masking import Mask, random_mask
from openmae.models.normalise import Normaliser
from openmae.spec.metrics import METRICS

_VALIDATION_EPOCH = -1  # the masks of validation are the same in every epoch


class PretrainTask:
    """The task of predicting the pixels of masked units.

    Args:
        mask_ratio: fraction of units that are masked.
        seed: seed of the masks.
        monitor: metric that selects the best checkpoint.
        targets: fraction of the masked units that a training step predicts; validation predicts all.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        normalise: Normaliser,
        *,
        mask_ratio: float,
        seed: int,
        monitor: str,
        targets: float = 1.0,
    ) -> None:
        self.model = model
        self.normalise = normalise
        self.mask_ratio = mask_ratio
        self.seed = seed
        self.monitor = monitor
        self.lower_is_better = METRICS[monitor].direction == "minimize"
        self.targets = targets

    def training_loss(self, model: nn.Module, batch: Batch, epoch: int) -> Tensor:
        """Return the loss of a batch; each image's mask depends only on (seed, epoch, image index)."""
        return model(self.normalise(batch.images), self.mask(batch.indices, epoch, self.targets)).loss

    def mask(self, indices: Tensor, epoch: int = _VALIDATION_EPOCH, targets: float = 1.0) -> Mask:
        """Return the masks of the images in an epoch; the default is the fixed masks of validation."""
        return random_mask(
            indices,
            seed=self.seed,
            epoch=epoch,
            num_units=self.model.num_units,
            mask_ratio=self.mask_ratio,
            targets=targets,
        )

    @torch.no_grad()
    def validate(self, fabric: Fabric, model: Any, batches: Iterable[Batch]) -> dict[str, float]:
        """Return ``val_loss`` under fixed masks, and ``knn_acc`` and ``probe_acc`` of the labelled images.

        ``model`` is a ``MaskedAutoencoder`` in eval mode.
        """
        loss_sum, count = 0.0, 0
        features, labels, indices = [], [], []
        for batch in map(fabric.to_device, batches):
            images = self.normalise(batch.images)
            with fabric.autocast():
                loss_sum += model(images, self.mask(batch.indices)).loss.item() * len(images)
                known = batch.labels >= 0
                if known.any():
                    features.append(model.encoder.embed(images)[known].float().cpu().numpy())
            labels.append(batch.labels[known].cpu().numpy())
            indices.append(batch.indices[known].cpu().numpy())
            count += len(images)
        all_labels = gather(fabric, labels)
        loss_sum, total = sum_over_ranks(fabric, [loss_sum, count])
        metrics = {"val_loss": loss_sum / total}
        if len(all_labels):
            order = gather(fabric, indices).argsort(kind="stable")  # the order decides how the probe splits the images
            vectors = gather(fabric, features)[order]
            probed = probe(vectors, all_labels[order]) if fabric.is_global_zero else {}
            watchdog_of(fabric).arrive()
            metrics |= fabric.broadcast(probed)
        return metrics
