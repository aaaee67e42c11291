from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from openmae.data.image_dataset import Batch
from openmae.data.normalise import Normaliser
from openmae.distributed.launch import build_fabric
from openmae.models.build import ModelConfig, build_classifier
from openmae.spec.sections.dataset import AugmentationSpec
from openmae.training.finetune import FinetuneTask, Predictions, predict, score

ARCHS = {"vit_tiny_patch16": 32, "hiera_tiny_224": 64, "convnextv2_atto": 64}
NORMALISE = Normaliser((0.5,) * 3, (0.25,) * 3)


class Pixels(torch.nn.Module):
    """Logits that follow from an image alone: its first pixel's class is likeliest."""

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
def test_mixing_is_addressed(mix):
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
def test_when_mixing_is_on(mix, active):
    assert mix.mixes is active
    assert (task_of(mix).mix is not None) is active


def test_predictions_come_in_order(tmp_path):
    fabric = build_fabric("evaluate", 1, [0], 1)
    parts = [batch_of(3, start=0), batch_of(3, start=3), batch_of(1, start=6)]
    found = predict(fabric, lambda images: Pixels()(NORMALISE(images)), parts[::-1])
    assert found.indices.tolist() == list(range(7))
    assert found.labels.tolist() == [n % 3 for n in range(7)]
    images = torch.cat([part.images for part in parts])
    shares = Pixels()(NORMALISE(images)).softmax(1)
    np.testing.assert_allclose(found.probabilities, shares.sort(descending=True).values, rtol=1e-6)
    np.testing.assert_array_equal(found.classes, shares.argsort(descending=True, stable=True))
    np.testing.assert_allclose(found.losses, -shares[range(7), found.labels].log(), rtol=1e-6)


def predicted(logits: list[list[float]], labels: list[int]) -> Predictions:
    """What ``predict`` makes of the logits."""
    batch = Batch(torch.tensor(logits)[:, :, None, None], torch.tensor(labels), torch.arange(len(labels)), 0, [])
    return predict(build_fabric("evaluate", 1, [0], 1), torch.nn.Flatten(), [batch])


def test_score_counts():
    probabilities = [[0.5, 0.3, 0.1, 0.04, 0.03, 0.03], [0.1, 0.2, 0.3, 0.2, 0.15, 0.05]]
    found = predicted(np.log(probabilities).tolist(), [0, 5])
    assert found.classes.tolist() == [[0, 1, 2, 3, 4], [2, 1, 3, 4, 0]]
    assert score(found) == pytest.approx(
        {"val_loss": -(np.log(0.5) + np.log(0.05)) / 2, "ACC_all": 0.5, "ACC_top5": 0.5}, rel=1e-6
    )


def test_fewer_classes_than_five_are_always_in_the_top_five():
    found = score(predicted([[2.0, 0.1]], [1]))
    assert (found["ACC_all"], found["ACC_top5"]) == (0.0, 1.0)


def test_logits_that_are_not_finite_are_no_success():
    found = score(predicted([[float("nan")] * 6], [5]))
    assert np.isnan(found["val_loss"])
    assert (found["ACC_all"], found["ACC_top5"]) == (0.0, 0.0)


def test_unknown_labels_have_no_loss():
    assert np.isnan(predicted([[2.0, 0.1]], [-1]).losses).all()
