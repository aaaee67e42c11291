"""Masked pretraining: the loss of a batch, and what a validation set says of the encoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from openmae.data.image_dataset import Batch
from openmae.data.normalise import Normaliser
from openmae.distributed.collectives import gather, sum_over_ranks
from openmae.distributed.watchdog import pulse_of
from openmae.evaluation.probes import knn_accuracy, linear_probe_accuracy
from openmae.models.mae import MaskedAutoencoder
from openmae.models.masking import Mask, random_mask

_VALIDATION_EPOCH = -1  # the address of validation's fixed masks

MOST_PROBED = 10_000  # images

log = logging.getLogger("openmae")


class PretrainTask:
    """Predict the pixels of masked units.

    Args:
        model: the autoencoder.
        normalise: uint8 images to the model's input.
        mask_ratio: share of masked units.
        seed: of the masks.
        monitor: metric that picks the best checkpoint.
        targets: share of the masked units that a training step predicts; validation predicts all.
    """

    lower_is_better = True

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
        self.targets = targets

    def training_loss(self, model: nn.Module, batch: Batch, epoch: int) -> Tensor:
        """Loss of a batch; each image's mask is addressed by (seed, epoch, its index)."""
        return model(self.normalise(batch.images), self.mask(batch.indices, epoch, self.targets)).loss

    def mask(self, indices: Tensor, epoch: int = _VALIDATION_EPOCH, targets: float = 1.0) -> Mask:
        """The masks of the images ``indices`` in an epoch; without an epoch, validation's fixed ones."""
        return random_mask(
            indices,
            seed=self.seed,
            epoch=epoch,
            num_units=self.model.num_units,
            mask_ratio=self.mask_ratio,
            targets=targets,
        )

    @torch.no_grad()
    def reconstruct(
        self, fabric: Fabric, batch: Batch, model: MaskedAutoencoder | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Pictures of a batch under its fixed masks: original, masked, reconstruction, reconstruction in place.

        Args:
            fabric: gives precision and device.
            batch: of images.
            model: a whole copy of the task's own, where processes share that out.

        Returns:
            Four uint8 arrays ``[B, H, W, C]``; pixel normalisation is undone, units that a picture leaves out are grey.
        """
        model = model or self.model
        batch = fabric.to_device(batch)
        images, mask = self.normalise(batch.images), self.mask(batch.indices)
        with fabric.autocast():
            predicted = model(images, mask).predicted_BMP
        original, masked, reconstructed, pasted = (
            self.normalise.undo(picture).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
            for picture in (images, *model.render(images, mask, predicted))
        )
        return original, masked, reconstructed, pasted

    @torch.no_grad()
    def validate(self, fabric: Fabric, model: Any, batches: Iterable[Batch]) -> dict[str, float]:
        """``val_loss`` under fixed masks; also ``knn_acc`` and ``probe_acc`` of the images that have a class.

        Args:
            fabric: gives precision and processes.
            model: the ``MaskedAutoencoder`` to measure, in eval mode.
            batches: of the validation set.
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
            order = gather(fabric, indices).argsort(kind="stable")  # the probes' halves follow from it
            vectors = gather(fabric, features)[order]
            probed = probe(vectors, all_labels[order]) if fabric.is_global_zero else {}
            pulse_of(fabric).passes()
            metrics |= fabric.broadcast(probed)
        return metrics


@torch.no_grad()
def embed(
    fabric: Fabric, features: Callable[[Tensor], Tensor], batches: Iterable[Batch]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings of all images, nothing masked, gathered from all processes and put in order.

    Args:
        fabric: gives precision and processes.
        features: from images as the data set gives them to embeddings ``[B, D]``.
        batches: of the set.

    Returns:
        ``(indices, vectors, labels)``: ``[N]`` in the data set, ``[N, D]`` float32, and ``[N]``, -1 where unknown.
    """
    parts: list[list[np.ndarray]] = [[], [], []]
    for batch in map(fabric.to_device, batches):
        with fabric.autocast():
            vectors = features(batch.images)
        for part, value in zip(parts, (batch.indices, vectors.float(), batch.labels), strict=True):
            part.append(value.cpu().numpy())
    indices, all_vectors, labels = (gather(fabric, part) for part in parts)
    order = indices.argsort(kind="stable")
    return indices[order], all_vectors[order], labels[order]


def probe(features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """``knn_acc`` and ``probe_acc`` of frozen features ``[N, D]``; nothing, with a notice, for too small a set.

    Of a set larger than ``MOST_PROBED`` the same random images are taken each time, so that probing stays quick.
    """
    if len(labels) > MOST_PROBED:
        some = np.random.default_rng(0).choice(len(labels), MOST_PROBED, replace=False)
        features, labels = features[some], labels[some]
    try:
        return {
            "knn_acc": knn_accuracy(features, labels),
            "probe_acc": linear_probe_accuracy(features, labels),
        }
    except ValueError as error:
        log.warning("No kNN or probe accuracy for this validation set: %s.", error)
        return {}
