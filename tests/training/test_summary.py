from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openmae.distributed.launch import build_fabric
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.models.normalise import Normaliser
from openmae.spec.sections.dataset import AugmentationSpec
from openmae.spec.sections.train import OptimSpec, TrainSpec
from openmae.training.finetune import FinetuneTask
from openmae.training.optim import Schedule, finetuning_groups, freeze, pretraining_groups
from openmae.training.pretrain import PretrainTask
from openmae.training.summary import _rates_text, recipe_rows

CONFIG = ModelConfig("vit_tiny_patch16", (32, 64), decoder_depth=1, decoder_embed_dim=32)
SETTINGS = TrainSpec(accum_grad_batches=2)
COSINE = Schedule(OptimSpec(lr_scheduler="cosine", warmup_epochs=2), 1e-3, 10, 7)


@pytest.fixture(scope="module")
def fabric():
    return build_fabric("train", 1, [0], 1)


def rows(fabric, config, groups, model, schedule=COSINE, images=(1234, 56), targets=1.0):
    normalise = Normaliser((0.5,) * 3, (0.25,) * 3)
    if config.num_classes:
        augmentation = AugmentationSpec(mixup=0, cutmix=0)
        task = FinetuneTask(
            model, normalise, augmentation=augmentation, num_classes=config.num_classes, monitor="ACC_all"
        )
    else:
        task = PretrainTask(model, normalise, mask_ratio=config.mask_ratio, seed=0, monitor="val_loss", targets=targets)
    return dict(recipe_rows(fabric, task, config, groups, schedule, SETTINGS, images, 8))


def classifier(layer_decay: float, multiplier: float = 1.0, arch: str = "vit_tiny_patch16", **changes):
    config = replace(CONFIG, arch=arch, num_classes=3, **changes)
    model = build_classifier(config)
    return config, finetuning_groups(model, config, 0.05, layer_decay, multiplier), model


def test_pretraining(fabric):
    model = build_autoencoder(CONFIG)
    found = rows(fabric, CONFIG, pretraining_groups(model, 0.05), model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    assert found == {
        "architecture": "vit_tiny_patch16, 32 x 64 px, 3 channels",
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M, {trained:.2f} M of them trained",
        "masked": "0.75 of 8 units of 16 px",
        "decoder": "1 x 32",
        "images": "1,234 to train, 56 to validate",
        "batch": "16 = 8 images x 2 accumulated",
        "epochs": "10 x 7 steps",
        "left out": "2 images per epoch, others in each epoch: 1,234 is not a multiple of 8",
        "schedule": "2 epochs of warmup, then cosine to 0",
        "learning rate": "0.001",
        "device": f"CPU, {torch.get_num_threads()} threads, fp32",
    }


@pytest.mark.parametrize(
    ("images", "left_out"),
    [(17, "1 image per epoch, others in each epoch: 17 is not a multiple of 8"), (16, None)],
)
def test_left_out_images_are_shown(images, left_out, fabric):
    model = build_autoencoder(CONFIG)
    schedule = Schedule(OptimSpec(lr_scheduler="cosine"), 1e-3, 10, 1)
    found = rows(fabric, CONFIG, pretraining_groups(model, 0.05), model, schedule, images=(images, 0))
    assert found.get("left out") == left_out
    assert found["epochs"] == "10 x 1 step"
    assert found["schedule"] == "1 epoch of warmup, then cosine to 0"


def test_a_cheaper_decoder_is_shown(fabric):
    config = replace(CONFIG, decoder_attention="cross")
    model = build_autoencoder(config)
    found = rows(fabric, config, pretraining_groups(model, 0.05), model, targets=0.25)
    assert found["masked"] == "0.75 of 8 units of 16 px; a training step predicts 0.25 of them"
    assert found["decoder"] == "1 x 32, cross-attention"


def test_finetuning_shows_the_rate_of_each_layer_group(fabric):
    found = rows(fabric, *classifier(0.5), images=(10, 0))
    assert found["classes"] == "3"
    assert "masked" not in found
    assert found["images"] == "10 to train, none to validate"
    layers = [f"layer {layer} {1e-3 * 0.5 ** (13 - layer):.3g}" for layer in range(13)]
    assert found["learning rate"] == ", ".join([*layers, "head 0.001"])


def test_many_layers_show_the_first_and_the_last():
    groups = [{"name": f"layer {layer}", "lr_scale": 2.0 ** (layer - 24)} for layer in range(24)]
    text = _rates_text(groups, 1.0)
    assert text.startswith("layer 0 5.96e-08, layer 1 ")
    assert ", layer 7 7.63e-06, ..., layer 16 0.00391, " in text
    assert text.endswith("layer 23 0.5")


def test_one_rate_for_all_is_one_number(fabric):
    assert rows(fabric, *classifier(1.0))["learning rate"] == "0.001"


def test_the_backbone_s_multiplier_shows(fabric):
    assert rows(fabric, *classifier(1.0, 0.1))["learning rate"].endswith("head 0.001")


def test_frozen_layers_are_not_trained(fabric):
    config, _, model = classifier(0.75)
    freeze(model, ["blocks"])
    found = rows(fabric, config, finetuning_groups(model, config, 0.05, 0.75, 1.0), model)
    assert "layer 12" not in found["learning rate"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained < 200_000
    assert found["parameters"].endswith(f", {trained / 1e6:.2f} M of them trained")


def test_multistep(fabric):
    model = build_autoencoder(CONFIG)
    groups = pretraining_groups(model, 0.05)
    steps = Schedule(OptimSpec(warmup_epochs=0, milestones=(4, 8)), 1e-3, 10, 7)
    assert rows(fabric, CONFIG, groups, model, steps)["schedule"] == "x 0.1 at epochs 4, 8"
