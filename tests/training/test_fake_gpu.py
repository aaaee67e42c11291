"""Training steps on a fake GPU: none waits for the device, and devices and precisions are not mixed.

Fake tensors have a device, a shape and a data type, but no values. Reading a value on the host (``.item()``), which on
a GPU would wait for all queued work, raises an error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from openmae.actions.sources import model_config
from openmae.data.image_dataset import Batch
from openmae.distributed.launch import DTYPES
from openmae.models.build import ModelConfig, build_autoencoder, build_model
from openmae.models.gpu_memory import move_to_fake_gpu
from openmae.models.normalise import Normaliser
from openmae.spec.load import load_spec
from openmae.training.optim import build_adamw, finetuning_groups, pretraining_groups
from openmae.training.tasks import build_task

ARCHS = ("vit_tiny_patch16", "hiera_tiny_224", "convnextv2_atto")
SIDE, IMAGES, CLASSES = 64, 4, 3
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def autocast_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver, torch would switch autocast off."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)


def a_batch() -> Batch:
    images = torch.zeros(IMAGES, 3, SIDE, SIDE, dtype=torch.uint8, device=GPU)
    labels = torch.zeros(IMAGES, dtype=torch.int64, device=GPU)
    return Batch(images, labels, torch.arange(IMAGES, device=GPU), 0, [])


@pytest.mark.parametrize(
    ("stage", "precision"), [("pretrain", "fp32"), ("pretrain", "bf16"), ("pretrain", "fp16"), ("finetune", "bf16")]
)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_step_never_waits_for_the_gpu(arch: str, stage: str, precision: str) -> None:
    options = [f"model.arch={arch}", f"train.stage={stage}", f"dataset.augmentation.input_size={SIDE}"]
    options += [f"dataset.batch_size={IMAGES}", f"model.num_classes={CLASSES}", "train.recipe=tao"]
    spec = load_spec(None, options)
    config = model_config(spec)
    model = build_model(config)
    average = ModelEmaV3(model, decay=0.99)
    with FakeTensorMode() as mode:
        move_to_fake_gpu(model, mode)
        move_to_fake_gpu(average, mode)
        task = build_task(spec, model, Normaliser(spec.dataset.augmentation.mean, spec.dataset.augmentation.std))
        if config.num_classes:
            groups = finetuning_groups(model, config, 0.05, 0.75, 1.0)
        else:
            groups = pretraining_groups(model, 0.05)
        optimizer: Any = build_adamw(groups, 1e-3, 0.9, 0.95)
        with torch.autocast("cuda", DTYPES[precision], enabled=precision != "fp32"):
            loss = task.training_loss(model, a_batch(), epoch=0)
        assert (loss.device.type, loss.dtype) == ("cuda", torch.float32)
        for parameter in model.parameters():  # a backward pass needs the driver of a real GPU
            parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.found_inf = norm.isfinite().logical_not().float()
        optimizer.step()
        average.update(model, step=1)


@pytest.mark.parametrize("arch", ARCHS)
def test_features_for_the_probes_stay_on_the_gpu(arch: str) -> None:
    config = ModelConfig(arch, (SIDE, SIDE))
    model: Any = build_autoencoder(config).eval()
    with FakeTensorMode() as mode, torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        move_to_fake_gpu(model, mode)
        features = model.encoder.embed(torch.zeros(IMAGES, 3, SIDE, SIDE, device=GPU))
    assert (features.device.type, len(features)) == ("cuda", IMAGES)


def test_a_fake_gpu_notices_a_step_that_waits() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros(1, device=GPU).item()
