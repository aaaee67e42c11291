"""Tests of parameter layers and weight decay against the official rules, reimplemented here."""

from __future__ import annotations

import pytest
import torch

from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.models.param_groups import is_decayed, is_head, layer_index


def official_vit(name: str, depth: int) -> int:
    """facebookresearch/mae, util/lr_decay.py; Hiera is fine-tuned the same way."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    return depth + 1


def official_convnext_single(name: str, depths: list[int]) -> int:
    """facebookresearch/ConvNeXt-V2, optim_factory.py, get_num_layer_for_convnext_single."""
    if name.startswith("downsample_layers"):
        return sum(depths[: int(name.split(".")[1])]) + 1
    if name.startswith("stages"):
        stage, block = (int(part) for part in name.split(".")[1:3])
        return sum(depths[:stage]) + block + 1
    return sum(depths) + 1


def official_convnext_grouped(name: str) -> int:
    """The same file, get_num_layer_for_convnext: 12 groups of about three blocks."""
    if name.startswith("downsample_layers"):
        return [0, 2, 3, 12][int(name.split(".")[1])]
    if name.startswith("stages"):
        stage, block = (int(part) for part in name.split(".")[1:3])
        return [1, 2, 3 + block // 3, 12][stage]
    return 13


def official_convnext_name(name: str) -> str:
    """Convert timm's name to the official layout, where the stem is the first of four downsampling layers."""
    if name.startswith("stem."):
        return name.replace("stem.", "downsample_layers.0.")
    if ".downsample." in name:
        return f"downsample_layers.{name.split('.')[1]}.{name.split('.downsample.')[1]}"
    return name.replace(".blocks.", ".")


DEPTHS = {
    "vit_tiny_patch16": [12],
    "vit_large_patch16": [24],
    "hiera_tiny_224": [12],
    "hiera_base_224": [24],
    "convnextv2_atto": [2, 2, 6, 2],
    "convnextv2_pico": [2, 2, 6, 2],
    "convnextv2_nano": [2, 2, 8, 2],
    "convnextv2_tiny": [3, 3, 9, 3],
    "convnextv2_base": [3, 3, 27, 3],
    "convnextv2_large": [3, 3, 27, 3],
    "convnextv2_huge": [3, 3, 27, 3],
}


def classifier(arch: str) -> tuple[ModelConfig, torch.nn.Module]:
    config = ModelConfig(arch, num_classes=3)
    with torch.device("meta"):
        return config, build_classifier(config)


@pytest.mark.parametrize("arch", DEPTHS)
def test_layers_are_those_of_the_papers(arch):
    config, model = classifier(arch)
    depths = DEPTHS[arch]
    layer_of, head = layer_index(config, model)
    for name, _ in model.named_parameters():
        if not arch.startswith("convnextv2"):
            expected, top = official_vit(name, depths[0]), depths[0] + 1
        elif arch.endswith(("base", "large", "huge")):
            expected, top = official_convnext_grouped(official_convnext_name(name)), 13
        else:
            expected, top = official_convnext_single(official_convnext_name(name), depths), sum(depths) + 1
        assert layer_of(name) == expected, name
        assert head == top


def official_lr_decay(name, parameter):
    """MAE's param_groups_lrd with timm's ``no_weight_decay``, and Hiera's."""
    return parameter.ndim != 1 and name not in ("pos_embed", "cls_token")


def official_optim_factory(name, parameter):
    """ConvNeXt V2's get_parameter_groups, where GRN's gamma and beta have four axes."""
    return not (parameter.ndim == 1 or name.endswith((".bias", ".gamma", ".beta")))


@pytest.mark.parametrize("arch", ["vit_tiny_patch16", "hiera_tiny_224", "convnextv2_atto"])
def test_fine_tuning_decays_as_the_official_code(arch):
    _, model = classifier(arch)
    official = official_optim_factory if arch == "convnextv2_atto" else official_lr_decay
    for name, parameter in model.named_parameters():
        assert is_decayed(name, parameter) == official(name, parameter), name


def official_add_weight_decay(name, shape):
    """timm 0.3.2, as MAE's and ConvNeXt V2's main_pretrain.py call it."""
    return not (len(shape) == 1 or name.endswith(".bias"))


@pytest.mark.parametrize("arch", ["vit_tiny_patch16", "hiera_tiny_224", "convnextv2_atto"])
def test_pretraining_decays_as_the_official_code(arch):
    with torch.device("meta"):
        model = build_autoencoder(ModelConfig(arch, decoder_depth=1, decoder_embed_dim=32))
    decayed = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        official, shape = name, tuple(parameter.shape)
        if ".grn." in name:  # official: gamma and beta of [1, 1, 1, C]
            official, shape = name.replace("bias", "beta").replace("weight", "gamma"), (1, 1, 1, *shape)
        spared = name.endswith("pos_embed")  # Hiera's no_weight_decay(); ViT's are fixed
        assert is_decayed(name, parameter, pretraining=True) == (
            official_add_weight_decay(official, shape) and not spared
        ), name
        decayed |= {name} if is_decayed(name, parameter, pretraining=True) else set()
    assert "decoder.mask_token" in decayed
    assert ("encoder.backbone.cls_token" in decayed) == (arch == "vit_tiny_patch16")
    assert ("decoder.blocks.0.mlp.grn.weight" in decayed) == (arch == "convnextv2_atto")


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("vit_tiny_patch16", {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}),
        ("hiera_tiny_224", {"head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"}),
        ("convnextv2_atto", {"head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"}),
    ],
)
def test_parameters_of_the_head(arch, expected):
    _, model = classifier(arch)
    assert {name for name, _ in model.named_parameters() if is_head(name)} == expected
