"""Tests of fitting weights to models: resampling, reports and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tests.helpers.checkpoints import CONFIGS, CROSS, INFO, SMALL, save_model
from timm.layers import resample_abs_pos_embed

from openmae.checkpoints.format import read_checkpoint
from openmae.checkpoints.matching import _fit_positions, _PositionGrid
from openmae.checkpoints.weights import load_backbone, load_into
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier, build_feature_extractor

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(("old", "new"), [("self", "cross"), ("cross", "self")])
def test_blocks_of_another_attention_are_initialised_and_reported(
    old: str, new: str, tmp_path: Path, randomise: Callable[..., None], built: Callable[..., Any]
) -> None:
    configs = {"self": SMALL, "cross": CROSS["vit"]}
    parts = {"cross": "decoder.cross_blocks", "self": "decoder.blocks, decoder.embed"}
    source, model = (built(build_autoencoder, configs[name]) for name in (old, new))
    randomise(source)
    checkpoint = read_checkpoint(save_model(tmp_path / "f.pth", source, replace(INFO, model=configs[old])))
    report = load_into(model, checkpoint, part="backbone")
    assert str(report) == (
        "loaded 100 % of vit_tiny_patch16's backbone from the OpenMAE layout "
        f"(newly initialised: {parts[new]}; not used: {parts[old]})"
    )
    assert torch.equal(model.decoder.predict.weight, source.decoder.predict.weight)
    with pytest.raises(CheckpointError, match="all must match"):
        load_into(model, checkpoint, part="everything")


def test_known_non_square_grid_is_resampled(tmp_path: Path, built: Callable[..., Any]) -> None:
    wide = replace(SMALL, input_size=(32, 128))  # 2 x 8 patches, as many as 4 x 4
    model, target = built(build_autoencoder, wide), built(build_feature_extractor, replace(SMALL, input_size=(64, 64)))
    load_into(
        target, read_checkpoint(save_model(tmp_path / "f.pth", model, replace(INFO, model=wide))), part="backbone"
    )
    old = model.encoder.backbone.pos_embed
    assert torch.equal(
        target.get_parameter("pos_embed"), resample_abs_pos_embed(old, [4, 4], [2, 8], num_prefix_tokens=1)
    )


def test_unknown_grid_is_assumed_to_be_square(tmp_path: Path, built: Callable[..., Any]) -> None:
    source = built(build_classifier, ModelConfig("vit_tiny_patch16", input_size=(64, 64), num_classes=2))
    torch.save(source.state_dict(), tmp_path / "f.pth")
    target = load_backbone(tmp_path / "f.pth", (32, 96))
    expected = resample_abs_pos_embed(source.get_parameter("pos_embed"), [2, 6], [4, 4], num_prefix_tokens=1)
    assert torch.equal(target.get_parameter("pos_embed"), expected)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels_keep_the_response_to_grey(
    family: str, in_chans: int, files: dict[str, Path], assert_near: Callable[..., None], built: Callable[..., Any]
) -> None:
    checkpoint, config = read_checkpoint(files[family]), CONFIGS[family]
    models = [built(build_feature_extractor, replace(config, in_chans=n)).eval() for n in (3, in_chans)]
    reports = [load_into(model, checkpoint, part="backbone") for model in models]
    assert reports[1].resized == (("stem.0",) if family == "convnextv2" else ("patch_embed.proj",))
    if in_chans == 1:
        grey = torch.randn(1, 1, 32, 64)
        with torch.no_grad():
            assert_near(models[1](grey), models[0](grey.expand(-1, 3, -1, -1)), 1e-4)


def test_another_patch_size_is_resampled(files: dict[str, Path], built: Callable[..., Any]) -> None:
    model = built(build_classifier, replace(SMALL, patch_size=8, num_classes=2))
    report = load_into(model, read_checkpoint(files["vit"]), part="backbone")
    assert report.resized == ("pos_embed", "patch_embed.proj")
    assert report.percent == 100


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("vit", "newly initialised: fc_norm, head; not used: decoder, norm"),
        ("hiera", "newly initialised: head.fc; not used: decoder, encoder"),
        ("convnextv2", "newly initialised: head.fc; not used: decoder"),
    ],
)
def test_classifier_from_pretrained_file_reports_new_modules(
    family: str, said: str, files: dict[str, Path], built: Callable[..., Any]
) -> None:
    model = built(build_classifier, replace(CONFIGS[family], num_classes=5))
    report = load_into(model, read_checkpoint(files[family]), part="backbone")
    arch = CONFIGS[family].arch
    assert str(report) == f"loaded 100 % of {arch}'s backbone from the OpenMAE layout ({said})"


@pytest.mark.parametrize(("classes", "kept"), [(3, True), (4, False)])
def test_head_is_kept_if_its_shape_matches(
    classes: int, kept: bool, tmp_path: Path, randomise: Callable[..., None], built: Callable[..., Any]
) -> None:
    config = replace(CONFIGS["convnextv2"], num_classes=3)
    source, target = built(build_classifier, config), built(build_classifier, replace(config, num_classes=classes))
    randomise(source)
    path = save_model(tmp_path / "f.pth", source, replace(INFO, stage="finetune", model=config))
    report = load_into(target, read_checkpoint(path), part="backbone")
    assert report.fresh == (() if kept else ("head.fc",))
    weight = "head.fc.weight"
    assert torch.equal(target.get_parameter(weight)[:3], source.get_parameter(weight)) is kept


def test_error_for_another_architecture_names_the_right_one(files: dict[str, Path], built: Callable[..., Any]) -> None:
    model = built(build_classifier, ModelConfig("convnextv2_femto", num_classes=2))
    with pytest.raises(CheckpointError) as caught:
        load_into(model, read_checkpoint(files["convnextv2"]), part="backbone")
    assert str(caught.value) == (
        f"{files['convnextv2']}: 0 % of convnextv2_femto's backbone was found in this file (OpenMAE layout), "
        "but 95 % must match. Missing: stem.0.weight [48, 3, 4, 4] (the file has [40, 3, 4, 4]), stem.0.bias "
        "[48] (the file has [40]), stem.1.weight [48] (the file has [40]) and 135 more. The file looks like "
        "convnextv2_atto.\n  Fix: Set model.arch=convnextv2_atto."
    )


def test_partial_weights_are_an_error_unless_allowed(
    tmp_path: Path, randomise: Callable[..., None], built: Callable[..., Any]
) -> None:
    source, target = (built(build_classifier, replace(SMALL, num_classes=2)) for _ in range(2))
    randomise(source)
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("blocks.3.")}
    torch.save(state, tmp_path / "f.pth")
    checkpoint = read_checkpoint(tmp_path / "f.pth")
    text = r"91\.\d % of vit_tiny_patch16's backbone.*Missing: blocks.3.norm1.weight \[192\].*\n"
    with pytest.raises(CheckpointError, match=text + "  Fix: Set train.allow_partial_weights=true to initialise"):
        load_into(target, checkpoint, part="backbone")
    report = load_into(target, checkpoint, part="backbone", allow_partial=True)
    assert not report.sufficient
    assert report.fresh == ("blocks.3",)
    weight = "blocks.4.attn.qkv.weight"
    assert torch.equal(target.get_parameter(weight), source.get_parameter(weight))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_values": 1.0}, "24 tensors .*LayerScale.*: blocks.0.ls1.gamma \\[192\\], .* and 21 more"),
        ({"reg_tokens": 4}, "a tensor .*register tokens.*: reg_token \\[1, 4, 192\\]"),
        ({"qk_norm": True}, "48 tensors .*query and key norms.*: blocks.0.attn.q_norm.weight"),
        ({"pre_norm": True}, "2 tensors .*another norm.*: norm_pre.weight"),
    ],
    ids=str,
)
def test_weights_of_another_function_are_always_refused(
    options: dict[str, Any], said: str, tmp_path: Path, built: Callable[..., Any]
) -> None:
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **options)
    torch.save(source.state_dict(), tmp_path / "f.pth")
    model = built(build_classifier, replace(SMALL, num_classes=2))
    before = model.state_dict()["blocks.0.attn.qkv.weight"].clone()
    for allowed in (False, True):
        with pytest.raises(CheckpointError, match=said) as caught:
            load_into(model, read_checkpoint(tmp_path / "f.pth"), part="backbone", allow_partial=allowed)
        assert "100 %" not in str(caught.value)
    assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], before)
    with pytest.raises(CheckpointError, match=r"fit no supported architecture|a different function"):
        load_backbone(tmp_path / "f.pth")


def test_additional_blocks_lower_the_share_that_matches(tmp_path: Path, built: Callable[..., Any]) -> None:
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=14)
    torch.save(source.state_dict(), tmp_path / "f.pth")
    model = built(build_classifier, replace(SMALL, num_classes=2))
    report = load_into(model, read_checkpoint(tmp_path / "f.pth"), part="backbone", allow_partial=True)
    assert re.search(r"loaded 8\d(\.\d)? % .*not used: blocks.12, blocks.13, norm\)$", str(report))


@pytest.mark.parametrize(("family", "other"), [("vit", "hiera"), ("convnextv2", "vit")])
def test_file_of_another_family_is_always_refused(
    family: str, other: str, files: dict[str, Path], built: Callable[..., Any]
) -> None:
    model = built(build_autoencoder, CONFIGS[family])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(model, read_checkpoint(files[other]), part="backbone", allow_partial=True)
    assert str(caught.value) == (
        f"{files[other]} holds {CONFIGS[other].arch} (OpenMAE layout), which is of a different family from "
        f"{CONFIGS[family].arch}.\n  Fix: Set model.arch={CONFIGS[other].arch}."
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_file_without_matching_weights_is_always_refused(files: dict[str, Path], built: Callable[..., Any]) -> None:
    model = built(build_classifier, ModelConfig("convnextv2_femto", num_classes=2))
    with pytest.raises(CheckpointError, match=r"0 % of convnextv2_femto.*looks like convnextv2_atto"):
        load_into(model, read_checkpoint(files["convnextv2"]), part="backbone", allow_partial=True)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (replace(SMALL, decoder_depth=2), r"all must match. Missing: decoder.blocks.1.norm1.weight \[32\]"),
        (
            replace(SMALL, decoder_embed_dim=64),
            r"decoder.mask_token \[1, 1, 64\] \(the file has \[1, 1, 32\]\)",
        ),
    ],
)
def test_part_everything_allows_no_missing_weights(
    config: ModelConfig, text: str, files: dict[str, Path], built: Callable[..., Any]
) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        load_into(built(build_autoencoder, config), read_checkpoint(files["vit"]), part="everything")
    assert caught.value.fix == "Use the stage, classes and model.* keys that the checkpoint was written with."


def test_linear_probe_of_the_official_code_can_be_loaded(tmp_path: Path) -> None:
    """Its head is a sequence with a batch norm, and no part of the backbone."""
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32)
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("head")}
    state |= {"head.0.running_mean": torch.zeros(192), "head.1.weight": torch.ones(3, 192)}
    torch.save({"model": state}, tmp_path / "probe.pth")
    model = build_classifier(ModelConfig("vit_tiny_patch16", (32, 32), num_classes=3))
    report = load_into(model, read_checkpoint(tmp_path / "probe.pth"), part="backbone", allow_partial=True)
    assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    assert "head" in str(report)


def test_positions_of_the_same_grid_are_unchanged() -> None:
    embedding = torch.randn(1, 1 + 6, 8)
    assert torch.equal(_fit_positions(embedding, _PositionGrid((2, 3), (2, 3), 1)), embedding)


def test_resizing_between_non_square_grids_keeps_prefix_and_orientation() -> None:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 6), indexing="ij")
    grid = torch.stack([rows, columns], dim=-1).reshape(1, 24, 2)
    embedding = torch.cat([torch.full((1, 1, 2), 9.0), grid], dim=1)
    resized = _fit_positions(embedding, _PositionGrid((8, 3), (4, 6), 1))
    assert resized.shape == (1, 1 + 24, 2)
    assert torch.equal(resized[:, :1], embedding[:, :1])
    new_rows, new_columns = resized[0, 1:].view(8, 3, 2).unbind(-1)
    assert (new_rows.diff(dim=0) > 0).all()
    assert new_rows.diff(dim=1).abs().max() < 1e-5
    assert (new_columns.diff(dim=1) > 0).all()
    assert new_columns.diff(dim=0).abs().max() < 1e-5
