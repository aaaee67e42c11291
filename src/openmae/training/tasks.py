"""Build the task of a training run."""

from __future__ import annotations

from torch import nn

from openmae.models.mae import MaskedAutoencoder
from openmae.models.normalise import Normaliser
from openmae.spec.schema import ExperimentSpec
from openmae.training.finetune import FinetuneTask
from openmae.training.pretrain import PretrainTask
from openmae.training.state import Task


def build_task(spec: ExperimentSpec, model: nn.Module, normalise: Normaliser) -> Task:
    """Return the task of a masked autoencoder, or of a classifier of ``spec.model.num_classes`` classes."""
    monitor = spec.train.optim.monitor_name
    if isinstance(model, MaskedAutoencoder):
        return PretrainTask(
            model,
            normalise,
            mask_ratio=spec.model.mask_ratio,
            seed=spec.train.seed,
            monitor=monitor,
            targets=spec.model.decoder_targets,
        )
    return FinetuneTask(
        model,
        normalise,
        augmentation=spec.dataset.augmentation,
        num_classes=spec.model.num_classes or 0,
        monitor=monitor,
    )
