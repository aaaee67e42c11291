"""Tests of official, timm and TAO checkpoints, which an inverse mapping writes here."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openmae.checkpoints.foreign_names import recognise
from openmae.checkpoints.format import read_checkpoint
from openmae.checkpoints.weights import load_into
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.models.mae import MaskedAutoencoder
from openmae.models.masking import Mask, mask_from_noise

pytestmark = pytest.mark.integration

State = dict[str, Tensor]


VIT = ModelConfig("vit_tiny_patch16", input_size=(32, 32), decoder_depth=2, decoder_embed_dim=64)


HIERA = ModelConfig("hiera_tiny_224", input_size=(64, 64), decoder_depth=2, decoder_embed_dim=64)


CONVNEXT = ModelConfig("convnextv2_atto", input_size=(64, 64), decoder_depth=2, decoder_embed_dim=64)


def rename(state: State, rules: dict[str, str]) -> State:
    """Rename by the first rule that matches."""
    return {next((re.sub(p, r, n) for p, r in rules.items() if re.search(p, n)), n): v for n, v in state.items()}


def official_mae_vit(model: MaskedAutoencoder) -> State:
    """facebookresearch/mae, models_mae.py."""
    return rename(
        model.state_dict(),
        {
            r"^encoder\.backbone\.": "",
            r"^decoder\.mask_token": "mask_token",
            r"^decoder\.predict\.": "decoder_pred.",
            r"^decoder\.": "decoder_",
        },
    )


def official_hiera_mae(model: MaskedAutoencoder) -> State:
    """facebookresearch/hiera, hiera_mae.py, with predictions ordered (channel, row, column)."""
    state = rename(
        model.state_dict(),
        {
            r"^encoder\.backbone\.head\.norm": "encoder_norm",
            r"^encoder\.backbone\.": "",
            r"^encoder\.fusion\.": "multi_scale_fusion_heads.",
            r"^decoder\.mask_token": "mask_token",
            r"^decoder\.predict\.": "decoder_pred.",
            r"^decoder\.": "decoder_",
        },
    )
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        rows = torch.arange(16 * 16 * 3).view(16, 16, 3).permute(2, 0, 1).flatten()
        state[name] = state[name][rows]
    return state


def official_convnext(backbone: nn.Module) -> State:
    """facebookresearch/ConvNeXt-V2, models/convnextv2.py: linear layers and 4-D GRN."""
    state = {}
    for name, value in backbone.state_dict().items():
        name = name.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".")
        name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = name.replace("head.norm.", "norm.").replace("head.fc.", "head.").replace("conv_dw", "dwconv")
        if ".grn." in name:
            name = name.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
            value = value.view(1, 1, 1, -1)
        name = re.sub(r"mlp\.fc([12])", r"pwconv\1", name)
        if re.search(r"pwconv\d\.weight", name):
            value = value.flatten(1)
        state[name] = value
    return state


def official_fcmae(model: MaskedAutoencoder) -> State:
    """facebookresearch/ConvNeXt-V2, models/fcmae.py, with a dense encoder (as TAO's) and no final norm."""
    encoder = official_convnext(model.encoder.backbone)
    state = {f"encoder.{name}": value for name, value in encoder.items() if not name.startswith("norm.")}
    decoder = model.decoder
    state["proj.weight"], state["proj.bias"] = decoder.embed.weight[:, :, None, None], decoder.embed.bias
    state["pred.weight"], state["pred.bias"] = decoder.predict.weight[:, :, None, None], decoder.predict.bias
    state["mask_token"] = decoder.mask_token.view(1, -1, 1, 1)
    for name, value in decoder.blocks.state_dict().items():
        name = re.sub(r"mlp\.fc([12])", r"pwconv\1", name.replace("conv_dw", "dwconv"))
        name = name.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
        state[f"decoder.{name}"] = value.view(1, 1, 1, -1) if "grn" in name else value
    return {name: value.detach().clone() for name, value in state.items()}


def sparse_fcmae(model: MaskedAutoencoder) -> State:
    """The same with MinkowskiEngine's modules: kernel[column * k + row], linear and norm one level deeper."""
    state = {}
    for name, value in official_fcmae(model).items():
        if not name.startswith("encoder.") or name.startswith("encoder.downsample_layers.0."):
            state[name] = value
        elif value.ndim == 4 and "grn" not in name:
            rows = [value[:, :, i, j] for j in range(value.shape[3]) for i in range(value.shape[2])]
            kernel = torch.stack([row.t() for row in rows])  # [k*k, in, out]
            state[name.removesuffix("weight") + "kernel"] = kernel.squeeze(1) if "dwconv" in name else kernel
        elif "grn" in name:
            state[name] = value.view(1, -1)
        elif "pwconv" in name:
            state[re.sub(r"(pwconv\d)", r"\1.linear", name)] = value
        elif re.search(r"norm|downsample_layers\.\d\.0", name):
            state[re.sub(r"(weight|bias)$", r"ln.\1", name)] = value
        else:
            state[name] = value.view(1, -1)  # biases of sparse convolutions
    return state


@pytest.fixture(scope="module")
def pretrained(randomise: Callable[..., None], built: Callable[..., Any]) -> dict[str, MaskedAutoencoder]:
    """A masked autoencoder of each family with random parameters."""
    models: dict[str, MaskedAutoencoder] = {}
    models |= {c.architecture.family: built(build_autoencoder, c).eval() for c in (VIT, HIERA, CONVNEXT)}
    for model in models.values():
        randomise(model)
    return models


def loss(model: MaskedAutoencoder, size: tuple[int, int]) -> Tensor:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(images, Mask(torch.tensor([[0, 3], [1, 2]]), torch.tensor([[1, 2], [0, 3]]))).loss


CASES = {
    "official MAE ViT": (
        "vit",
        VIT,
        lambda m: {"model": official_mae_vit(m), "args": argparse.Namespace(lr=1)},
    ),
    "official Hiera MAE": ("hiera", HIERA, lambda m: {"model_state": official_hiera_mae(m), "epoch": 3}),
    "official FCMAE": ("convnextv2", CONVNEXT, lambda m: {"model": official_fcmae(m), "epoch": "last"}),
    "official sparse FCMAE": ("convnextv2", CONVNEXT, lambda m: {"model": sparse_fcmae(m)}),
    "OpenMAE": ("vit", VIT, lambda m: m.state_dict()),
}


@pytest.mark.parametrize("layout", CASES)
@pytest.mark.parametrize("tao", [False, True], ids=["bare", "tao"])
def test_pretrained_file_gives_the_same_loss(
    layout: str, tao: bool, pretrained: dict[str, MaskedAutoencoder], built: Callable[..., Any], tmp_path: Path
) -> None:
    family, config, write = CASES[layout]
    content = write(pretrained[family])
    if tao:
        states = [v for v in content.values() if isinstance(v, dict)] or [content]
        content = {"state_dict": {f"model.{k}": v for k, v in states[0].items()}, "epoch": 1}
    torch.save(content, tmp_path / "file.pth")
    model = built(build_autoencoder, config)
    report = load_into(model, read_checkpoint(tmp_path / "file.pth"), part="backbone")
    assert report.percent == 100
    assert report.layout.startswith(layout)
    assert report.fresh == (("head",) if family == "convnextv2" else ())
    assert torch.equal(loss(model, config.input_size), loss(pretrained[family], config.input_size))


def official_names(transformers_state: State, depths: tuple[int, ...]) -> State:
    """Convert transformers' HieraForPreTraining to facebookresearch/hiera, as transformers' own conversion does."""
    renamed = rename(
        transformers_state,
        {
            r"^hiera\.embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
            r"^hiera\.embeddings\.position_embeddings$": "pos_embed",
            r"^multiscale_fusion\.": "",
            r"^decoder\.decoder_embeddings\.": "decoder_embed.",
            r"^decoder\.decoder_position_embeddings$": "decoder_pos_embed",
            r"^decoder\.decoder_block\.layers\.": "decoder_blocks.",
            r"^decoder\.": "",
        },
    )
    state = {}
    for name, value in renamed.items():
        if place := re.match(r"hiera\.encoder\.stages\.(\d)\.layers\.(\d+)\.", name):
            name = f"blocks.{sum(depths[: int(place[1])]) + int(place[2])}.{name[place.end() :]}"
        state[name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")] = value
    return state


def test_official_hiera_mae_file_gives_the_loss_of_transformers(
    randomise: Callable[..., None],
    built: Callable[..., Any],
    assert_near: Callable[..., None],
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    depths = (1, 2, 7, 2)
    config = transformers.HieraConfig(
        image_size=[64, 64],
        depths=depths,
        num_query_pool=2,
        decoder_hidden_size=64,
        decoder_depth=2,
        decoder_num_heads=2,
        mask_ratio=0.5,
    )
    official = transformers.HieraForPreTraining(config).eval()
    randomise(official)
    torch.save({"model_state": official_names(official.state_dict(), depths)}, tmp_path / "mae_hiera.pth")

    model = built(build_autoencoder, HIERA).eval()
    report = load_into(model, read_checkpoint(tmp_path / "mae_hiera.pth"), part="everything")
    assert str(report) == "loaded 100 % of hiera_tiny_224's weights from the official Hiera MAE layout"
    images = torch.randn(2, 3, 64, 64)
    noise = torch.tensor([[0.1, 0.9, 0.8, 0.2], [0.9, 0.1, 0.2, 0.8]])
    with torch.no_grad():
        expected = official(images, noise=noise).loss
        actual = model(images, mask_from_noise(noise, num_visible=2)).loss
    assert_near(actual, expected, 1e-5)


def test_decoder_of_another_width_is_initialised(
    pretrained: dict[str, MaskedAutoencoder], built: Callable[..., Any], tmp_path: Path
) -> None:
    torch.save(official_mae_vit(pretrained["vit"]), tmp_path / "file.pth")
    model = built(build_autoencoder, replace(VIT, decoder_embed_dim=32))
    report = load_into(model, read_checkpoint(tmp_path / "file.pth"), part="backbone")
    assert str(report) == (
        "loaded 100 % of vit_tiny_patch16's backbone from the official MAE ViT layout (newly initialised: "
        "decoder.blocks, decoder.embed, decoder.mask_token, decoder.norm, decoder.pos_embed, decoder.predict.weight)"
    )


def test_hiera_predictions_are_reordered() -> None:
    state = {
        "blocks.0.norm1.weight": torch.zeros(1),
        "patch_embed.proj.weight": torch.zeros(8, 2, 7, 7),
        "decoder_embed.weight": torch.zeros(1),
        "decoder_pred.bias": torch.arange(8.0),  # channel 0: 0-3, channel 1: 4-7, of 2 x 2 pixels
    }
    assert recognise(state).rest["decoder.predict.bias"].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def six_d_grn(state: State) -> State:
    return {k: v.view(1, 1, 1, 1, 1, -1) if "grn" in k else v for k, v in state.items()}


def official_hiera(model: nn.Module) -> State:
    return rename(model.state_dict(), {r"^head\.fc\.": "head.projection.", r"^head\.norm\.": "norm."})


CLASSIFIERS: dict[str, tuple[ModelConfig, Callable[[nn.Module], dict], str]] = {
    "mae": (VIT, lambda m: {"model": m.state_dict()}, "official MAE ViT"),
    "hiera": (HIERA, lambda m: {"model_state": official_hiera(m)}, "official Hiera"),
    "convnext": (CONVNEXT, lambda m: {"model": official_convnext(m)}, "official ConvNeXt V2"),
    "tao 6-d": (
        CONVNEXT,
        lambda m: {"state_dict": {f"model.{k}": v for k, v in six_d_grn(official_convnext(m)).items()}},
        "official ConvNeXt V2 (behind 'model.', as TAO's)",
    ),
    "timm vit": (VIT, lambda m: m.state_dict(), "timm ViT"),
    "timm hiera": (HIERA, lambda m: {"state_dict": m.state_dict()}, "timm Hiera"),
    "timm ddp": (
        CONVNEXT,
        lambda m: {f"module.{k}": v for k, v in m.state_dict().items()},
        "timm ConvNeXt V2",
    ),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_fine_tuned_file_gives_the_same_logits(
    case: str, randomise: Callable[..., None], built: Callable[..., Any], tmp_path: Path
) -> None:
    config, write, layout = CLASSIFIERS[case]
    config = ModelConfig(config.arch, input_size=config.input_size, num_classes=4)
    original, model = built(build_classifier, config).eval(), built(build_classifier, config).eval()
    randomise(original)
    torch.save(write(original), tmp_path / "file.pth")
    report = load_into(model, read_checkpoint(tmp_path / "file.pth"), part="everything")
    assert str(report) == f"loaded 100 % of {config.arch}'s weights from the {layout} layout"
    images = torch.randn(2, 3, *config.input_size)
    with torch.no_grad():
        assert torch.equal(model(images), original(images))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"layer1.0.conv1.weight": torch.zeros(1)}, "no layout that OpenMAE knows.*layer1.0.conv1.weight"),
        ({"stem.0.weight": torch.zeros(1), "stages.0.blocks.0.gamma": torch.zeros(1)}, "no layout"),
        ({"epoch": 3, "args": None}, "holds no weights; its first keys: epoch, args"),
        ({"encoder.backbone.conv.weight": torch.zeros(1)}, "belong to no supported architecture"),
    ],
    ids=["resnet", "convnext v1", "no tensors", "foreign backbone"],
)
def test_unknown_layouts_are_explained(content: dict, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        recognise(content)
