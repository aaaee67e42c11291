"""Classifiers that NVIDIA TAO has fine-tuned: measured, run and exported as they are, equal to TAO's own forward.

The references follow TAO's published PyTorch code (``cv/backbone_v2/vit.py``, ``convnext_v2.py``, ``hiera.py``) and
are written here from torch and timm alone.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import openmae
from openmae.actions.load_model import read_trained
from openmae.cli.main import main
from openmae.data.decode import ImageFile
from openmae.data.transforms import EvalTransform
from openmae.errors import CheckpointError
from openmae.results.status import read_status
from openmae.spec.load import load_spec

from .conftest import Train, train_arguments

pytestmark = pytest.mark.xdist_group("actions")

CLASSES = ("blue", "green", "red")


class TaoViT(timm.models.VisionTransformer):
    """``VisionTransformerMAE``: no final norm, and the mean of the patch tokens before the head."""

    def __init__(self) -> None:
        super().__init__(
            img_size=32, embed_dim=192, num_heads=3, num_classes=3, final_norm=False, dynamic_img_size=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x)[:, 1:, :].mean(dim=1))


class TaoBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.grn = nn.Module()
        self.grn.gamma, self.grn.beta = (nn.Parameter(torch.zeros(1, 1, 1, 4 * dim)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
        norms = y.norm(dim=(1, 2), keepdim=True)
        y = self.grn.gamma * (y * (norms / (norms.mean(dim=-1, keepdim=True) + 1e-6))) + self.grn.beta + y
        return x + self.pwconv2(y).permute(0, 3, 1, 2)


class ChannelsFirstNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TaoConvNeXt(nn.Module):
    """``convnextv2_atto`` with TAO's names."""

    def __init__(self) -> None:
        super().__init__()
        dims = (40, 80, 160, 320)
        stem = nn.Sequential(nn.Conv2d(3, 40, 4, 4), ChannelsFirstNorm(40, eps=1e-6))
        rest = [
            nn.Sequential(ChannelsFirstNorm(a, eps=1e-6), nn.Conv2d(a, b, 2, 2)) for a, b in itertools.pairwise(dims)
        ]
        self.downsample_layers = nn.ModuleList([stem, *rest])
        depths = (2, 2, 6, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(*(TaoBlock(dim) for _ in range(n))) for dim, n in zip(dims, depths, strict=True)
        )
        self.norm, self.head = nn.LayerNorm(320, eps=1e-6), nn.Linear(320, 3)

    def forward(self, x: Tensor) -> Tensor:
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        return self.head(self.norm(x.mean([-2, -1])))


def tao_hiera() -> nn.Module:
    """TAO's Hiera is timm's."""
    return timm.create_model("hiera_tiny_224", img_size=64, num_classes=3)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "vit": (TaoViT, "vit_tiny_patch16", 32),
    "convnextv2": (TaoConvNeXt, "convnextv2_atto", 64),
    "hiera": (tao_hiera, "hiera_tiny_224", 64),
}


def write_tao(path: Path, model: nn.Module) -> Path:
    """A checkpoint as Lightning writes TAO's module."""
    content = {
        "epoch": 4,
        "global_step": 50,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "loops": {},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"dirpath": str(path.parent), "best_k_models": {}}},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "lr_schedulers": [{"base_lrs": [1e-3]}],
    }
    torch.save(content, path)
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def tao(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, str, int]:
    build, arch, size = FAMILIES[request.param]
    torch.manual_seed(1)
    model = build().eval()
    for name, parameter in model.named_parameters():  # GRN and biases start at zero, where mistakes have no effect
        parameter.data += 0.05 * torch.randn_like(parameter) * (1 + 4 * ("head" in name))
    return write_tao(tmp_path_factory.mktemp("tao") / "model_epoch_004.pth", model), model, arch, size


def spec_of(arch: str, size: int) -> list[str]:
    return [
        f"model.arch={arch}",
        "model.num_classes=3",
        "train.stage=finetune",
        f"dataset.augmentation.input_size={size}",
    ]


def test_load_backbone_is_tao_s_own_forward(tao: tuple[Path, nn.Module, str, int]) -> None:
    path, model, _, size = tao
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(openmae.load_backbone(path)(images), model(images), atol=1e-5)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        return model((images.float() / 255 - mean) / std)


def test_evaluate_and_inference_agree_with_tao(
    tao: tuple[Path, nn.Module, str, int], photos: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model, arch, size = tao
    common = [*spec_of(arch, size), f"results_dir={tmp_path}", "dataset.num_workers_per_gpu=0", "wandb.enable=false"]
    sources = [f"dataset.val_data_sources={photos.val}", f"dataset.test_data_sources={photos.val}"]
    assert main(["evaluate", f"evaluate.checkpoint={path}", *common, *sources]) == 0
    found = read_status(tmp_path / "evaluate" / "status.json")[1]["kpi"]
    assert main(["inference", f"inference.checkpoint={path}", *common, *sources]) == 0
    assert "does not name its classes: they are numbered from 0 to 2" in " ".join("".join(capsys.readouterr()).split())
    files = sorted(photos.val.rglob("*.png"))
    images = []
    for name in files:
        with ImageFile(name) as image:
            images.append(EvalTransform((size, size))(image))
    expected = logits_of(model, torch.stack(images))
    right = [CLASSES[label] == file.parent.name for label, file in zip(expected.argmax(1), files, strict=True)]
    assert found["ACC_all"] == pytest.approx(np.mean(right))
    with (tmp_path / "inference" / "results.csv").open() as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    shares = expected.softmax(1)
    for file, label, share in zip(files, expected.argmax(1), shares.amax(1), strict=True):
        row = rows[f"{file.parent.name}/{file.name}"]
        assert row["class"] == str(int(label))
        assert float(row["probability"]) == pytest.approx(float(share), abs=1e-4)


@pytest.mark.parametrize(
    "tao",
    ["vit", "convnextv2", pytest.param("hiera", marks=pytest.mark.slow(reason="traces for six seconds"))],
    indirect=True,
    scope="module",
)
def test_export_agrees_with_tao(tao: tuple[Path, nn.Module, str, int], photos: Any, tmp_path: Path) -> None:
    path, model, arch, size = tao
    onnx = tmp_path / "model.onnx"
    request = [f"export.checkpoint={path}", f"export.onnx_file={onnx}", f"results_dir={tmp_path}"]
    assert main(["export", *request, *spec_of(arch, size)]) == 0
    predictor = openmae.open_predictor(onnx)
    images = openmae.read_images(sorted(photos.val.rglob("*.png")), predictor.card)
    assert torch.allclose(predictor(images)["logits"], logits_of(model, images), atol=1e-4)


def test_a_classifier_that_does_not_fit_the_request_is_refused(photos: Any, tmp_path: Path, refused: Any) -> None:
    path = write_tao(tmp_path / "tao.pth", TaoViT())
    source = f"dataset.val_data_sources={photos.val}"
    common = [f"evaluate.checkpoint={path}", f"results_dir={tmp_path}"]
    said = refused("evaluate", [*common, source, "model.arch=vit_small_patch16"])
    assert "model.arch is vit_small_patch16" in said
    assert "holds model.arch=vit_tiny_patch16" in said
    assert "holds model.num_classes=3" in refused("evaluate", [*common, source, "model.num_classes=4"])
    two = refused("evaluate", [*common, f"dataset.val_data_sources={photos.two_classes}"])
    assert f"dataset.val_data_sources has 2 classes, but {path} has 3 classes" in two
    said = refused("evaluate", [*common, source, "train.stage=pretrain"])
    assert "weights written by another program" in said


def test_a_backbone_of_another_program_is_not_evaluated(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0).state_dict(), tmp_path / "f.pth")
    with pytest.raises(
        CheckpointError, match=r"weights written by another program \(timm ViT layout\).*\n.*pretrained_model"
    ):
        read_trained(load_spec(None), tmp_path / "f.pth", None)


def test_training_reports_loaded_weights_and_other_patch_sizes(
    photos: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0)
    path = tmp_path / "f.pth"
    torch.save({"model": model.state_dict(), "model_ema": model.state_dict()}, path)
    command = ["train", *train_arguments(photos, "vit", "pretrain"), f"train.pretrained_model_path={path}"]
    assert main([*command, f"results_dir={tmp_path}/a"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"train.pretrained_model_path: {path} has patches of 8 pixels, and vit_tiny_patch16 has 16." in said
    assert "Set model.patch_size=8 to keep those of the file, or model.patch_size=16 to resample them." in said
    chosen = ["train.pretrained_weights_key=model", "model.patch_size=16", f"results_dir={tmp_path}/b"]
    assert main([*command, *chosen]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "using the weights under 'model'; the file also has model_ema" in said
    assert "resized: pos_embed, patch_embed.proj" in said
    assert main([*command, "train.pretrained_weights_key=ema", f"results_dir={tmp_path}/c"]) == 2
    assert "no weights under 'ema'. Fix: It has: model, model_ema." in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("action", ["evaluate", "inference", "export"])
def test_weights_that_are_not_finite_give_no_answers(action: str, photos: Any, tmp_path: Path, refused: Any) -> None:
    model = TaoViT()
    model.head.weight.data[0, 0] = float("nan")
    path = write_tao(tmp_path / "nan.pth", model)
    source = {"evaluate": "dataset.val_data_sources", "inference": "dataset.test_data_sources"}.get(action)
    sources = [f"{source}={photos.val}"] if source else [f"export.onnx_file={tmp_path}/m.onnx"]
    said = refused(action, [f"{action}.checkpoint={path}", f"results_dir={tmp_path}", *sources])
    assert "tensors hold NaN or infinite values, the first is head.weight" in said


def test_an_onnx_file_of_weights_that_are_not_finite_is_refused(trained: Train, tmp_path: Path) -> None:
    path, target = trained("vit", "finetune").checkpoint, tmp_path / "model.onnx"
    assert main(["export", f"export.checkpoint={path}", f"export.onnx_file={target}", f"results_dir={tmp_path}"]) == 0
    proto = onnx.load(target)
    largest = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = np.frombuffer(largest.raw_data, np.float32).copy()
    values[0] = np.nan
    largest.raw_data = values.tobytes()
    onnx.save(proto, target)
    with pytest.raises(CheckpointError, match=r"weights .* hold NaN or infinite numbers"):
        openmae.open_predictor(target)
