"""Loss curves of OpenMAE's step and of a slow reference, from the same weights, images and masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from openmae.models.mae import MaskedAutoencoder

from . import steps

STEPS = 100


@dataclass(frozen=True)
class Curves:
    """Losses of two models that are trained alike.

    Attributes:
        openmae, reference: the loss before each update.
    """

    openmae: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def difference(self) -> float:
        """Return the largest difference of a step, as a share of the reference's loss."""
        openmae, reference = np.array(self.openmae), np.array(self.reference)
        return float(np.max(np.abs(openmae - reference) / reference))

    @property
    def learned(self) -> float:
        """Return the share by which the reference's loss fell from the first tenth of its steps to the last."""
        tenth = max(1, len(self.reference) // 10)
        return 1 - float(np.mean(self.reference[-tenth:]) / np.mean(self.reference[:tenth]))


def train_both(
    openmae: MaskedAutoencoder,
    reference: Callable[[MaskedAutoencoder], nn.Module],
    mask_ratio: float,
    lr: float,
    updates: int = STEPS,
    bf16: bool = False,
) -> Curves:
    """Train a model and a reference built from it, each with its own optimizer.

    Args:
        openmae: the model; it is trained.
        reference: builds a model that returns the loss, with the same weights.
        mask_ratio: share of masked units.
        lr: learning rate of all updates.
        updates: number of updates.
        bf16: for OpenMAE; the reference computes in float32.
    """
    images = photographs(4, openmae.encoder.grid[0] * openmae.encoder.unit)
    theirs = steps.reference_step(reference(openmae), steps.normalised(images), mask_ratio, openmae.num_units, lr)
    mine = steps.openmae_step(openmae, images, mask_ratio, lr, bf16=bf16)
    return Curves(*(tuple(float(step()) for _ in range(updates)) for step in (mine, theirs)))


def photographs(batch: int, side: int) -> Tensor:
    """Return uint8 images ``[B, 3, side, side]``, crops of scikit-learn's photos."""
    rng = np.random.default_rng(0)
    cuts = []
    for number in range(batch):
        photograph = load_sample_images().images[number % 2]
        top, left = (rng.integers(length - side) for length in photograph.shape[:2])
        cuts.append(photograph[top : top + side, left : left + side].transpose(2, 0, 1))
    return torch.from_numpy(np.stack(cuts)).to(steps.device())
