"""The loss of a fine-tuning batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from openmae.data.image_dataset import Batch
from openmae.models.build import ModelConfig, build_classifier
from openmae.models.normalise import Normaliser
from openmae.spec.sections.dataset import AugmentationSpec
from openmae.training.finetune import FinetuneTask

ARCHS = {"vit_tiny_patch16": 32, "hiera_tiny_224": 64, "convnextv2_atto": 64}
NORMALISE = Normaliser((0.5,) * 3, (0.25,) * 3)


class Pixels(torch.nn.Module):
    """Logits that are the first pixel of an image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, 0, 0] * 3


def batch_of(count: int, classes: int = 3, start: int = 0, size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(start)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    indices = torch.arange(start, start + count)
    return Batch(images, indices % classes, indices, 0, [])


def mixing(**values: object) -> AugmentationSpec:
    return AugmentationSpec(**{"mixup": 0, "cutmix": 0, "smoothing": 0} | values)


def task_of(mix: AugmentationSpec, model: torch.nn.Module | None = None) -> FinetuneTask:
    return FinetuneTask(model or Pixels(), NORMALISE, augmentation=mix, num_classes=3, monitor="ACC_all")


@pytest.mark.parametrize(("arch", "global_pool"), [*((arch, True) for arch in ARCHS), ("vit_tiny_patch16", False)])
def test_every_trained_parameter_gets_a_gradient(arch, global_pool):
    """Several processes wait for all of them; ``find_unused_parameters`` would cost every step."""
    size = ARCHS[arch]
    config = ModelConfig(arch, (size, size), num_classes=3, drop_path_rate=0.2, global_pool=global_pool)
    model = build_classifier(config).train()
    task_of(mixing(), model).training_loss(model, batch_of(2, size=size), 0).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_loss_is_cross_entropy_with_smoothing():
    task, batch = task_of(mixing(smoothing=0.2)), batch_of(4)
    logits = Pixels()(NORMALISE(batch.images))
    expected = F.cross_entropy(logits, 0.8 * F.one_hot(batch.labels, 3) + 0.2 / 3)
    torch.testing.assert_close(task.training_loss(task.model, batch, 0), expected)


@pytest.mark.parametrize(
    "mix",
    [
        mixing(mixup=0.8),
        mixing(cutmix=1.0),
        mixing(mixup=0.8, cutmix=1.0, mixup_mode="elem", smoothing=0.1),
        mixing(cutmix_minmax=(0.2, 0.8), mixup_mode="pair"),
    ],
)
def test_mixing_depends_only_on_the_seed(mix):
    task, batch = task_of(mix), batch_of(4)
    losses = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        losses.append(task.training_loss(task.model, batch, 0).item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("mix", "active"),
    [
        (mixing(), False),
        (mixing(mixup=1, mixup_prob=0), False),
        (mixing(cutmix=1), True),
        (mixing(cutmix_minmax=(0.1, 0.2)), True),
    ],
)
def test_mixing_is_on_when_it_has_an_effect(mix, active):
    assert mix.mixes is active
    assert (task_of(mix).mix is not None) is active
