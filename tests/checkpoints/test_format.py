"""Checkpoints matched with a report, and brought to other sizes, channels and heads."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from timm.layers import resample_abs_pos_embed
from torch import nn

import openmae
from openmae.checkpoints.format import CheckpointInfo, load_backbone, load_into, read_checkpoint, save_backbone
from openmae.errors import CheckpointError, RunError, SpecError
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier, build_feature_extractor
from openmae.models.mae import MaskedAutoencoder
from openmae.models.masking import all_visible

CONFIGS = {
    "vit": ModelConfig("vit_tiny_patch16", input_size=(32, 64), decoder_depth=1, decoder_embed_dim=32),
    "hiera": ModelConfig("hiera_tiny_224", input_size=(32, 64), decoder_depth=1, decoder_embed_dim=32),
    "convnextv2": ModelConfig("convnextv2_atto", input_size=(32, 64), decoder_depth=1, decoder_embed_dim=32),
}
CROSS = {family: replace(CONFIGS[family], decoder_attention="cross") for family in ("vit", "hiera")}
SMALL = CONFIGS["vit"]
INFO = CheckpointInfo("pretrain", SMALL, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), spec={"model": {}})


def write(path: Path, model: nn.Module, info: CheckpointInfo, ema: nn.Module | None = None) -> Path:
    """A checkpoint as training writes it, with keys of Lightning's."""
    content: dict[str, Any] = {"openmae": info.to_dict(), "epoch": 3, "loops": {}}
    for key, source in (("state_dict", model), ("ema_state_dict", ema)):
        if source is not None:
            content[key] = {f"model.{name}": value for name, value in source.state_dict().items()}
    content["state_dict"]["criterion.weight"] = torch.ones(1)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def pretrained(randomise: Callable[..., None], built: Callable[..., Any]) -> dict[str, MaskedAutoencoder]:
    models = {family: built(build_autoencoder, config).eval() for family, config in CONFIGS.items()}
    for model in models.values():
        randomise(model)
    return models


@pytest.fixture(scope="module")
def files(pretrained: dict[str, MaskedAutoencoder], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pretrained checkpoint of each family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        family: write(folder / f"{family}.pth", model, replace(INFO, model=CONFIGS[family]))
        for family, model in pretrained.items()
    }


# Our own checkpoints


@pytest.mark.parametrize("family", CONFIGS)
def test_a_pretrained_checkpoint_comes_back_whole(
    family: str, files: dict[str, Path], pretrained: dict[str, MaskedAutoencoder], built: Callable[..., Any]
) -> None:
    model = built(build_autoencoder, CONFIGS[family])
    checkpoint = read_checkpoint(files[family])
    report = load_into(model, checkpoint, part="everything")
    assert checkpoint.info == replace(INFO, model=CONFIGS[family])
    expected = f"loaded 100 % of {CONFIGS[family].arch}'s weights from the OpenMAE layout"
    assert str(report) == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pretrained[family].parameters(), strict=True))


@pytest.mark.parametrize("family", CONFIGS)
def test_load_backbone_of_a_pretrained_checkpoint_gives_its_embeddings(
    family: str,
    files: dict[str, Path],
    pretrained: dict[str, MaskedAutoencoder],
    assert_near: Callable[..., None],
) -> None:
    backbone = openmae.load_backbone(files[family])
    assert not backbone.training
    images = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        embedding = backbone(images)
        assert torch.equal(embedding, backbone(images))
        if family == "vit":
            encoder = pretrained[family].encoder
            latent = encoder(images, all_visible(2, 8).visible_BV)
            assert_near(embedding, latent[:, 1:].mean(1), 1e-5)
    assert embedding.shape == (2, pretrained[family].encoder.dim)


@pytest.mark.parametrize("global_pool", [True, False])
def test_load_backbone_of_a_fine_tuned_checkpoint_gives_its_logits(
    global_pool: bool, tmp_path: Path, randomise: Callable[..., None], built: Callable[..., Any]
) -> None:
    config = replace(SMALL, num_classes=3, global_pool=global_pool)
    model = built(build_classifier, config).eval()
    randomise(model)
    info = replace(INFO, stage="finetune", model=config, class_names=("ant", "bee", "fly"))
    files = (
        write(tmp_path / "model.ckpt", model, info),
        save_backbone(tmp_path / "backbone.safetensors", model.state_dict(), info),
    )
    images = torch.randn(2, 3, 32, 64)
    for path in files:
        assert read_checkpoint(path).info == info
        with torch.no_grad():
            assert torch.equal(load_backbone(path)(images), model(images))


def test_a_saved_backbone_loads_into_timm_and_without_arguments(
    tmp_path: Path, pretrained: dict[str, MaskedAutoencoder], files: dict[str, Path]
) -> None:
    state = pretrained["vit"].encoder.backbone.state_dict()
    path = save_backbone(tmp_path / "backbone.safetensors", state, INFO)
    assert [file.name for file in tmp_path.iterdir()] == ["backbone.safetensors"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # safetensors alone: for its owner only
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), num_classes=0).load_state_dict(tensors)
    images = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        assert torch.equal(load_backbone(path)(images), load_backbone(files["vit"])(images))


def test_the_averaged_copy_is_read_where_there_is_one(
    tmp_path: Path, randomise: Callable[..., None], built: Callable[..., Any]
) -> None:
    config = replace(CONFIGS["convnextv2"], num_classes=2)
    model, average = built(build_classifier, config), built(build_classifier, config)
    randomise(average)
    info = replace(INFO, stage="finetune", model=config)
    loaded = load_backbone(write(tmp_path / "model.pth", model, info, ema=average))
    assert torch.equal(loaded.state_dict()["stem.0.weight"], average.state_dict()["stem.0.weight"])


def test_a_failed_write_leaves_the_previous_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, {"a": torch.ones(1)}, INFO)
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("openmae.checkpoints.format.save_file", full)
    with pytest.raises(RunError, match=r"Cannot write .*No space left on device.*\n  Fix: Free disk space"):
        save_backbone(path, {"a": torch.zeros(1)}, INFO)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_importing_openmae_imports_no_torch() -> None:
    code = "import openmae, sys; assert 'torch' not in sys.modules; assert 'load_backbone' in dir(openmae)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        openmae.nothing  # noqa: B018


# Decoders with cross-attention


@pytest.mark.parametrize("family", CROSS)
def test_a_checkpoint_with_cross_attention_comes_back_whole_and_fits_another_size(
    family: str, tmp_path: Path, randomise: Callable[..., None], built: Callable[..., Any]
) -> None:
    source = built(build_autoencoder, CROSS[family])
    randomise(source)
    checkpoint = read_checkpoint(write(tmp_path / "cross.pth", source, replace(INFO, model=CROSS[family])))
    assert checkpoint.info is not None
    assert checkpoint.info.model == CROSS[family]
    model = build_autoencoder(checkpoint.info.model)
    load_into(model, checkpoint, part="everything")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    larger = build_autoencoder(replace(CROSS[family], input_size=(64, 64)))
    assert load_into(larger, checkpoint, part="everything").resized == ("pos_embed", "decoder.pos_embed")


def test_a_checkpoint_of_before_cross_attention_is_one_with_self_attention(
    tmp_path: Path, pretrained: dict[str, MaskedAutoencoder]
) -> None:
    values = INFO.to_dict()
    assert values["model"].pop("decoder_attention") == "self"
    content = {"openmae": values, "state_dict": {f"model.{n}": v for n, v in pretrained["vit"].state_dict().items()}}
    torch.save(content, tmp_path / "old.pth")
    assert read_checkpoint(tmp_path / "old.pth").info == INFO


@pytest.mark.parametrize(("old", "new"), [("self", "cross"), ("cross", "self")])
def test_blocks_of_another_attention_start_afresh_and_are_told(
    old: str, new: str, tmp_path: Path, randomise: Callable[..., None], built: Callable[..., Any]
) -> None:
    configs = {"self": SMALL, "cross": CROSS["vit"]}
    parts = {"cross": "decoder.cross_blocks", "self": "decoder.blocks, decoder.embed"}
    source, model = (built(build_autoencoder, configs[name]) for name in (old, new))
    randomise(source)
    checkpoint = read_checkpoint(write(tmp_path / "f.pth", source, replace(INFO, model=configs[old])))
    report = load_into(model, checkpoint, part="backbone")
    assert str(report) == (
        "loaded 100 % of vit_tiny_patch16's backbone from the OpenMAE layout "
        f"(fresh: {parts[new]}; not used: {parts[old]})"
    )
    assert torch.equal(model.decoder.predict.weight, source.decoder.predict.weight)
    with pytest.raises(CheckpointError, match="all must match"):
        load_into(model, checkpoint, part="everything")


# Other sizes, channels and heads


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("input_size", [(64, 64), 96])
def test_another_input_size_loads_and_runs(
    family: str, input_size: int | tuple[int, int], files: dict[str, Path], built: Callable[..., Any]
) -> None:
    model = load_backbone(files[family], input_size)
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()
    autoencoder = built(build_autoencoder, replace(CONFIGS[family], input_size=size))
    report = load_into(autoencoder, read_checkpoint(files[family]), part="everything")
    positions = {"vit": ("pos_embed", "decoder.pos_embed"), "hiera": ("pos_embed", "decoder.pos_embed")}
    assert report.resized == positions.get(family, ())
    units = autoencoder.num_units
    visible = torch.arange(units - 1)[None]
    with torch.no_grad():
        assert autoencoder.encoder(torch.randn(1, 3, *size), visible).isfinite().all()


def test_a_known_grid_that_is_not_square_is_resampled_as_it_is(tmp_path: Path, built: Callable[..., Any]) -> None:
    wide = replace(SMALL, input_size=(32, 128))  # 2 x 8 patches: as many as 4 x 4
    model, target = built(build_autoencoder, wide), built(build_feature_extractor, replace(SMALL, input_size=(64, 64)))
    load_into(target, read_checkpoint(write(tmp_path / "f.pth", model, replace(INFO, model=wide))), part="backbone")
    old = model.encoder.backbone.pos_embed
    assert torch.equal(
        target.get_parameter("pos_embed"), resample_abs_pos_embed(old, [4, 4], [2, 8], num_prefix_tokens=1)
    )


def test_an_unknown_grid_is_taken_as_square(tmp_path: Path, built: Callable[..., Any]) -> None:
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
        ("vit", "fresh: fc_norm, head; not used: decoder, norm"),
        ("hiera", "fresh: head.fc; not used: decoder, encoder"),
        ("convnextv2", "fresh: head.fc; not used: decoder"),
    ],
)
def test_a_classifier_from_a_pretrained_file_says_what_is_fresh(
    family: str, said: str, files: dict[str, Path], built: Callable[..., Any]
) -> None:
    model = built(build_classifier, replace(CONFIGS[family], num_classes=5))
    report = load_into(model, read_checkpoint(files[family]), part="backbone")
    arch = CONFIGS[family].arch
    assert str(report) == f"loaded 100 % of {arch}'s backbone from the OpenMAE layout ({said})"


@pytest.mark.parametrize(("classes", "kept"), [(3, True), (4, False)])
def test_a_head_is_kept_where_its_shape_matches(
    classes: int, kept: bool, tmp_path: Path, randomise: Callable[..., None], built: Callable[..., Any]
) -> None:
    config = replace(CONFIGS["convnextv2"], num_classes=3)
    source, target = built(build_classifier, config), built(build_classifier, replace(config, num_classes=classes))
    randomise(source)
    path = write(tmp_path / "f.pth", source, replace(INFO, stage="finetune", model=config))
    report = load_into(target, read_checkpoint(path), part="backbone")
    assert report.fresh == (() if kept else ("head.fc",))
    weight = "head.fc.weight"
    assert torch.equal(target.get_parameter(weight)[:3], source.get_parameter(weight)) is kept


def test_load_backbone_finds_out_a_foreign_files_model(tmp_path: Path, built: Callable[..., Any]) -> None:
    config = ModelConfig("vit_tiny_patch16", (32, 32), in_chans=1, patch_size=8, num_classes=2)
    model = built(build_classifier, config).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "f.pth")
    loaded = load_backbone(tmp_path / "f.pth")
    images = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


# What does not match


def test_the_wrong_architecture_is_named_with_the_right_one(files: dict[str, Path], built: Callable[..., Any]) -> None:
    model = built(build_classifier, ModelConfig("convnextv2_femto", num_classes=2))
    with pytest.raises(CheckpointError) as caught:
        load_into(model, read_checkpoint(files["convnextv2"]), part="backbone")
    assert str(caught.value) == (
        f"{files['convnextv2']}: 0 % of convnextv2_femto's backbone was found in this file (OpenMAE layout), "
        "and 95 % must match. Missing: stem.0.weight [48, 3, 4, 4] (the file has [40, 3, 4, 4]), stem.0.bias "
        "[48] (the file has [40]), stem.1.weight [48] (the file has [40]) and 135 more. The file looks like "
        "convnextv2_atto.\n  Fix: Set model.arch=convnextv2_atto."
    )


def test_a_part_of_the_weights_is_an_error_unless_allowed(
    tmp_path: Path, randomise: Callable[..., None], built: Callable[..., Any]
) -> None:
    source, target = (built(build_classifier, replace(SMALL, num_classes=2)) for _ in range(2))
    randomise(source)
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("blocks.3.")}
    torch.save(state, tmp_path / "f.pth")
    checkpoint = read_checkpoint(tmp_path / "f.pth")
    text = r"91\.\d % of vit_tiny_patch16's backbone.*Missing: blocks.3.norm1.weight \[192\].*\n"
    with pytest.raises(CheckpointError, match=text + "  Fix: Set train.allow_partial_weights=true to train"):
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
        ({"qk_norm": True}, "48 tensors .*normed queries and keys.*: blocks.0.attn.q_norm.weight"),
        ({"pre_norm": True}, "2 tensors .*another norm.*: norm_pre.weight"),
    ],
    ids=str,
)
def test_weights_of_another_function_are_refused_even_when_partial_weights_are_allowed(
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
    with pytest.raises(CheckpointError, match=r"fit no architecture|another function"):
        load_backbone(tmp_path / "f.pth")


def test_blocks_that_the_model_lacks_are_never_called_all_of_it(tmp_path: Path, built: Callable[..., Any]) -> None:
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=14)
    torch.save(source.state_dict(), tmp_path / "f.pth")
    model = built(build_classifier, replace(SMALL, num_classes=2))
    report = load_into(model, read_checkpoint(tmp_path / "f.pth"), part="backbone", allow_partial=True)
    assert re.search(r"loaded 8\d(\.\d)? % .*not used: blocks.12, blocks.13, norm\)$", str(report))


@pytest.mark.parametrize(("family", "other"), [("vit", "hiera"), ("convnextv2", "vit")])
def test_a_file_of_another_family_is_refused_even_when_partial_weights_are_allowed(
    family: str, other: str, files: dict[str, Path], built: Callable[..., Any]
) -> None:
    model = built(build_autoencoder, CONFIGS[family])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(model, read_checkpoint(files[other]), part="backbone", allow_partial=True)
    assert str(caught.value) == (
        f"{files[other]} holds {CONFIGS[other].arch} (OpenMAE layout), of which {CONFIGS[family].arch} can use "
        f"nothing: another family.\n  Fix: Set model.arch={CONFIGS[other].arch}."
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_that_fits_is_an_error_even_when_partial_weights_are_allowed(
    files: dict[str, Path], built: Callable[..., Any]
) -> None:
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
def test_everything_tolerates_no_fresh_part(
    config: ModelConfig, text: str, files: dict[str, Path], built: Callable[..., Any]
) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        load_into(built(build_autoencoder, config), read_checkpoint(files["vit"]), part="everything")
    assert caught.value.fix == "Use the stage, classes and model.* keys that the checkpoint was written with."


def test_load_backbone_refuses_another_architecture_or_an_odd_size(files: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="holds vit_tiny_patch16, not vit_base_patch16"):
        load_backbone(files["vit"], arch="vit_base_patch16")
    with pytest.raises(SpecError, match=r"\(100, 100\) does not divide into hiera_tiny_224's units of 32 px.*\n.*"):
        load_backbone(files["hiera"], 100)


def test_load_backbone_asks_for_the_architecture_of_an_unknown_shape(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0, img_size=32)
    torch.save(model.state_dict(), tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=r"fit no architecture.*\n  Fix: Name the nearest: load_backbone"):
        load_backbone(tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match="% of vit_tiny_patch16's backbone"):
        load_backbone(tmp_path / "f.pth", arch="vit_tiny_patch16")
