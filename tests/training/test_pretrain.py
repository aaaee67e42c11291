"""The loss of a pretraining batch, and validation."""

from __future__ import annotations

import pytest
import torch

from openmae.data.image_dataset import Batch
from openmae.distributed.launch import build_fabric
from openmae.errors import DataError
from openmae.models.build import ModelConfig, build_autoencoder
from openmae.models.normalise import Normaliser
from openmae.training.pretrain import PretrainTask

pytestmark = pytest.mark.integration

ARCHS = {"vit_tiny_patch16": 32, "hiera_tiny_224": 64, "convnextv2_atto": 64}


def task_of(
    arch: str = "vit_tiny_patch16", drop_path: float = 0.0, attention: str = "self", targets: float = 1.0
) -> PretrainTask:
    torch.manual_seed(0)
    size = ARCHS[arch]
    decoder = {"decoder_depth": 1, "decoder_embed_dim": 32, "decoder_attention": attention}
    model = build_autoencoder(ModelConfig(arch, (size, size), drop_path_rate=drop_path, **decoder))
    normalise = Normaliser((0.5,) * 3, (0.25,) * 3)
    return PretrainTask(model, normalise, mask_ratio=0.5, seed=1, monitor="val_loss", targets=targets)


def batches(size: int, sizes: list[int], labelled: bool = True) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    found, start = [], 0
    for count in sizes:
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
        indices = torch.arange(start, start + count)
        found.append(Batch(images, indices % 2 if labelled else torch.full((count,), -1), indices, 0, []))
        start += count
    return found


@pytest.fixture(scope="module")
def fabric():
    return build_fabric("train", 1, [0], 1)


KINDS = [*((arch, "self") for arch in ARCHS), ("vit_tiny_patch16", "cross"), ("hiera_tiny_224", "cross")]


@pytest.mark.parametrize("targets", [1.0, 0.5])
@pytest.mark.parametrize(("arch", "attention"), KINDS)
def test_every_trained_parameter_gets_a_gradient(arch, attention, targets):
    """Several processes wait for all of them; ``find_unused_parameters`` would cost every step."""
    task = task_of(arch, drop_path=0.2, attention=attention, targets=targets)
    (batch,) = batches(ARCHS[arch], [2])
    task.training_loss(task.model.train(), batch, 0).backward()
    assert [n for n, p in task.model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_masks_depend_only_on_seed_epoch_and_image():
    task = task_of("convnextv2_atto")
    indices = torch.arange(64)
    first, again, other = task.mask(indices, 3), task.mask(indices[10:], 3), task.mask(indices, 4)
    assert torch.equal(first.visible_BV[10:], again.visible_BV)
    assert not torch.equal(first.visible_BV, other.visible_BV)
    assert torch.equal(task.mask(indices).visible_BV, task.mask(indices).visible_BV)
    task.seed = 2
    assert not torch.equal(task.mask(indices, 3).visible_BV, first.visible_BV)


@pytest.mark.parametrize(("arch", "attention"), KINDS)
def test_a_training_step_predicts_a_share_and_validation_all(fabric, arch, attention):
    whole, part = (task_of(arch, attention=attention, targets=targets) for targets in (1.0, 0.5))
    (batch,) = batches(ARCHS[arch], [3])
    predicted: list[int] = []
    part.model.register_forward_hook(lambda module, inputs, output: predicted.append(output.predicted_BMP.shape[1]))
    part.training_loss(part.model, batch, 0)
    both = [task.validate(fabric, task.model.eval(), [batch]) for task in (whole, part)]
    masked = (part.model.num_units - part.model.num_units // 2) * part.model.encoder.split**2
    assert predicted == [masked // 2, masked], "a step, validation"
    assert both[0] == both[1], "the loss of validation can be compared"


def test_predicted_units_are_drawn_again_each_epoch():
    task = task_of("hiera_tiny_224", targets=0.5)
    indices = torch.arange(64)
    first, again, other = (task.mask(indices, epoch, task.targets) for epoch in (3, 3, 4))
    assert torch.equal(first.masked_BM, again.masked_BM)
    assert not torch.equal(first.masked_BM, other.masked_BM)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16", "convnextv2_atto"])
def test_validation_does_not_depend_on_its_batches(fabric, arch):
    task = task_of(arch)
    task.model.eval()
    one, many = (
        task.validate(fabric, task.model, _split(batches(ARCHS[arch], [7])[0], sizes)) for sizes in ([7], [3, 3, 1])
    )
    assert one.keys() == {"val_loss", "knn_acc", "probe_acc"}
    assert many == pytest.approx(one, rel=1e-5)


def _split(batch: Batch, sizes: list[int]) -> list[Batch]:
    parts = zip(*(torch.split(tensor, sizes) for tensor in batch[:3]), strict=True)
    return [Batch(*part, 0, []) for part in parts]


def test_unlabelled_images_are_not_probed(fabric, monkeypatch):
    task = task_of()
    monkeypatch.setattr(type(task.model.encoder), "embed", lambda *_: pytest.fail("no features were needed"))
    assert task.validate(fabric, task.model.eval(), batches(32, [3], labelled=False)).keys() == {"val_loss"}


def test_too_few_images_for_a_probe_are_a_notice(fabric, caplog):
    task = task_of()
    metrics = task.validate(fabric, task.model.eval(), batches(32, [2]))
    assert metrics.keys() == {"val_loss"}
    assert caplog.messages == [
        "No kNN or probe accuracy for this validation set: a probe needs a class with at least 2 images; every class "
        "here has 1."
    ]


def test_no_readable_image_is_an_error(fabric):
    task = task_of()
    with pytest.raises(DataError, match="No image of the set could be read"):
        task.validate(fabric, task.model, [])


def test_targets_stay_in_full_precision():
    """Autocast rounds what the layers compute, never the pixels that the prediction is compared with."""
    fabric = build_fabric("train", 1, [0], 1, "bf16")
    task = task_of()
    model = fabric.setup(task.model)
    (batch,) = batches(32, [2])
    seen = []
    task.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    loss = task.training_loss(model, batch, 0)
    assert torch.equal(seen[0], task.normalise(batch.images))
    assert loss.dtype == torch.float32
