"""Whether a fast step learns what a slow one learns: the losses of both, from the same weights, images and masks."""

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
    """Losses of one training by two models.

    Attributes:
        ours, reference: before each update.
    """

    ours: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def difference(self) -> float:
        """The largest of a step, as a share of the reference's loss."""
        ours, reference = np.array(self.ours), np.array(self.reference)
        return float(np.max(np.abs(ours - reference) / reference))

    @property
    def learned(self) -> float:
        """By how much the reference's loss fell from the first tenth of its steps to the last, as a share."""
        tenth = max(1, len(self.reference) // 10)
        return 1 - float(np.mean(self.reference[-tenth:]) / np.mean(self.reference[:tenth]))


def train_both(
    ours: MaskedAutoencoder,
    reference: Callable[[MaskedAutoencoder], nn.Module],
    mask_ratio: float,
    lr: float,
    updates: int = STEPS,
    bf16: bool = False,
) -> Curves:
    """Train ours and a reference made of it, each with its own optimizer.

    Args:
        ours: it is trained.
        reference: makes a model that gives the loss, with the weights of ours.
        mask_ratio: share of masked units.
        lr: learning rate of all updates.
        updates: how many.
        bf16: ours; the reference computes in float32.
    """
    images = photographs(4, ours.encoder.grid[0] * ours.encoder.unit)
    theirs = steps.reference_step(reference(ours), steps.normalised(images), mask_ratio, ours.num_units, lr)
    mine = steps.our_step(ours, images, mask_ratio, lr, bf16=bf16)
    return Curves(*(tuple(float(step()) for _ in range(updates)) for step in (mine, theirs)))


def photographs(batch: int, side: int) -> Tensor:
    """``[B, 3, side, side]`` in uint8, cut from scikit-learn's photographs: something can be learned of them."""
    rng = np.random.default_rng(0)
    cuts = []
    for number in range(batch):
        photograph = load_sample_images().images[number % 2]
        top, left = (rng.integers(length - side) for length in photograph.shape[:2])
        cuts.append(photograph[top : top + side, left : left + side].transpose(2, 0, 1))
    return torch.from_numpy(np.stack(cuts)).to(steps.device())
