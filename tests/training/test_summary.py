from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openmae.distributed.launch import build_fabric
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.models.normalise import Normaliser
from openmae.spec.sections.dataset import AugmentationSpec
from openmae.spec.sections.train import OptimSpec, TrainSpec
from openmae.storage.printable import counted
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
        "masked": "6 of 8 units of 16 px (0.75)",
        "decoder": "1 x 32, 2% of the operations of a step",
        "images": "1,234 to train, 56 to validate",
        "batch": "16 = 8 images x 2 accumulated",
        "epochs": "10 x 7 steps",
        "left out": "2 images per epoch, others in each epoch: 1,234 is not a multiple of 8",
        "schedule": "2 epochs of warmup, then cosine to 0",
        "learning rate": "0.001",
        "device": f"CPU, {counted(torch.get_num_threads(), 'thread')}, fp32",
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
    assert found["masked"] == "6 of 8 units of 16 px (0.75); a training step predicts 0.25 of the masked ones"
    assert found["decoder"] == "1 x 32, cross-attention, 1% of the operations of a step"


def test_finetuning_shows_the_rate_of_each_layer_group(fabric):
    found = rows(fabric, *classifier(0.5), images=(10, 0))
    assert found["classes"] == "3"
    assert "masked" not in found
    assert found["images"] == "10 to train, none to validate"
    assert found["learning rate"] == "layers 0 to 12: 1.22e-07 to 0.0005, head 0.001"


@pytest.mark.parametrize(
    ("scales", "text"),
    [
        ({"layer 2": 0.25, "layer 10": 0.5}, "layers 2 to 10: 0.25 to 0.5"),
        ({"layer 3": 0.1, "layer 3, no decay": 0.1, "head": 1.0}, "layer 3 0.1, head 1"),
        ({"layer 0": 0.1, "layer 1": 0.1, "head, no decay": 1.0}, "layers 0 to 1: 0.1, head 1"),
    ],
)
def test_layers_show_the_range_of_their_rates(scales, text):
    assert _rates_text([{"name": name, "lr_scale": scale} for name, scale in scales.items()], 1.0) == text


def test_the_masked_units_of_a_ratio_are_counted_as_they_are_masked(fabric):
    config = replace(CONFIG, arch="convnextv2_atto", input_size=(128, 128), mask_ratio=0.6)
    model = build_autoencoder(config)
    found = rows(fabric, config, pretraining_groups(model, 0.05), model)
    assert found["masked"] == "10 of 16 units of 32 px (0.6)"


def test_one_channel(fabric):
    config = replace(CONFIG, in_chans=1)
    model = build_autoencoder(config)
    found = rows(fabric, config, pretraining_groups(model, 0.05), model)
    assert found["architecture"].endswith(", 1 channel")


def test_one_rate_for_all_is_one_number(fabric):
    assert rows(fabric, *classifier(1.0))["learning rate"] == "0.001"


def test_the_backbone_s_multiplier_shows(fabric):
    assert rows(fabric, *classifier(1.0, 0.1))["learning rate"] == "layers 0 to 12: 0.0001, head 0.001"


def test_frozen_layers_are_not_trained(fabric):
    config, _, model = classifier(0.75)
    freeze(model, ["blocks"])
    found = rows(fabric, config, finetuning_groups(model, config, 0.05, 0.75, 1.0), model)
    assert found["learning rate"] == "layer 0 2.38e-05, head 0.001"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained < 200_000
    assert found["parameters"].endswith(f", {trained / 1e6:.2f} M of them trained")


def test_multistep(fabric):
    model = build_autoencoder(CONFIG)
    groups = pretraining_groups(model, 0.05)
    steps = Schedule(OptimSpec(warmup_epochs=0, milestones=(4, 8)), 1e-3, 10, 7)
    assert rows(fabric, CONFIG, groups, model, steps)["schedule"] == "x 0.1 at epochs 4, 8"
