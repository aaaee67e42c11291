"""Tests of opening the model of evaluate and inference."""

from __future__ import annotations

import pytest

from openmae.actions.load_model import open_model, resolve_model
from openmae.cli.main import main
from openmae.errors import SpecError
from openmae.models.mae import MaskedAutoencoder
from openmae.results.metrics_csv import read_metrics
from openmae.results.status import read_status
from openmae.spec.load import load_spec

from .conftest import train_arguments

pytestmark = pytest.mark.xdist_group("actions")


def spec_for(checkpoint, *overrides, source=None):
    settings = [f"evaluate.checkpoint={checkpoint}", "dataset.val_data_sources=x"]
    return load_spec(source, [*settings, *overrides], action="evaluate")


def test_checkpoint_determines_the_model(trained):
    run = trained("vit", "pretrain")
    model = open_model(spec_for(run.checkpoint), "evaluate")
    assert isinstance(model.network, MaskedAutoencoder)
    assert not model.network.training
    spec = resolve_model(spec_for(run.checkpoint), model.info)
    assert (spec.model.arch, spec.model.decoder_depth) == ("vit_tiny_patch16", 1)
    assert spec.dataset.augmentation.size == (32, 32)
    assert spec.model.num_classes is None
    fine = trained("convnextv2", "finetune")
    info = open_model(spec_for(fine.checkpoint), "evaluate").info
    spec = resolve_model(spec_for(fine.checkpoint), info)
    assert (spec.train.stage, spec.model.arch, spec.model.num_classes) == ("finetune", "convnextv2_atto", 3)


@pytest.mark.parametrize(("key", "value"), [("model.mask_ratio", 0.5), ("train.mask_ratio", 0.25)])
def test_mask_ratio_can_be_changed(trained, key, value):
    model = open_model(spec_for(trained("vit", "pretrain").checkpoint, f"{key}={value}"), "evaluate")
    assert model.info.model.mask_ratio == value


def test_options_equal_to_the_checkpoint_are_accepted(trained):
    run = trained("vit", "finetune")
    said = ["model.arch=vit_tiny_patch16", "model.patch_size=16", "model.num_classes=3", "train.stage=finetune"]
    open_model(spec_for(run.checkpoint, *said), "evaluate")
    open_model(spec_for(run.checkpoint, source=run.folder / "experiment.yaml"), "evaluate")


def test_decoder_options_are_checked_for_pretrained_models_only(trained):
    open_model(spec_for(trained("vit", "finetune").checkpoint, "model.decoder_depth=4"), "evaluate")
    with pytest.raises(SpecError, match=r"model.decoder_depth is 4, but evaluate.checkpoint .* holds .*=1"):
        open_model(spec_for(trained("vit", "pretrain").checkpoint, "model.decoder_depth=4"), "evaluate")


def test_cross_attention_works_in_every_action(photos, tmp_path, capsys):
    """Train, resume, evaluate and reconstruct, and refuse another attention."""
    changes = [f"results_dir={tmp_path}", "model.decoder_attention=cross", "model.decoder_targets=0.5"]
    command = ["train", *train_arguments(photos, "vit", "pretrain"), "dataset.augmentation.input_size=64", *changes]
    assert main([*command, "train.num_epochs=2", "train.stop_after_epoch=1"]) == 0
    out = " ".join("".join(capsys.readouterr()).split())
    assert "a training step predicts 0.5 of the masked ones" in out
    assert "1 x 32, cross-attention" in out
    assert main([*command, "train.num_epochs=2", "model.decoder_attention=self"]) == 2
    assert "model.decoder_attention was cross and is self." in capsys.readouterr().err
    assert main([*command, "train.num_epochs=2"]) == 0
    folder = tmp_path / "train"
    trained_loss = read_metrics(folder / "metrics.csv")[-1]["val_loss"]
    (checkpoint,) = folder.glob("model_epoch_002*.pth")
    looked_at = [f"results_dir={tmp_path}", "dataset.num_workers_per_gpu=0", "wandb.enable=false"]
    sources = [f"dataset.val_data_sources={photos.val}", f"dataset.test_data_sources={photos.val}"]
    assert main(["evaluate", f"evaluate.checkpoint={checkpoint}", *looked_at, *sources]) == 0
    found = read_status(tmp_path / "evaluate" / "status.json")[1]["kpi"]
    assert found["val_loss"] == pytest.approx(trained_loss, rel=1e-5)
    assert main(["inference", f"inference.checkpoint={checkpoint}", *looked_at, *sources]) == 0
    assert list((tmp_path / "inference" / "reconstructions").iterdir())
    asked = "model.decoder_attention is self, but evaluate.checkpoint .* holds model.decoder_attention=cross"
    with pytest.raises(SpecError, match=asked):
        open_model(spec_for(checkpoint, "model.decoder_attention=self"), "evaluate")


def test_one_option_needs_no_others(trained):
    checkpoint = trained("vit", "finetune").checkpoint
    open_model(spec_for(checkpoint, "model.patch_size=16"), "evaluate")
    with pytest.raises(SpecError, match=r"mean is \(0.5,\), but evaluate.checkpoint"):
        open_model(spec_for(checkpoint, "dataset.augmentation.mean=[0.5]"), "evaluate")


def test_backbone_file_cannot_reconstruct(trained, photos, refused, tmp_path):
    run = trained("vit", "pretrain")
    backbone = run.folder / "backbone.safetensors"
    text = refused(
        "inference",
        [f"inference.checkpoint={backbone}", f"dataset.test_data_sources={photos.val}", f"results_dir={tmp_path}"],
    )
    assert f"inference.checkpoint: {backbone} holds only the backbone, and inference also reconstructs images." in text
    assert f"Give a checkpoint of the same run, such as {run.folder / 'model_best.pth'}." in text


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_all_mistakes_are_reported_together(trained, stage):
    run = trained("vit", stage)
    other = "finetune" if stage == "pretrain" else "pretrain"
    said = [f"train.stage={other}", "model.arch=vit_small_patch16", "model.in_chans=1", "model.num_classes=7"]
    with pytest.raises(SpecError) as caught:
        open_model(spec_for(run.checkpoint, *said, "dataset.augmentation.input_size=40"), "evaluate")
    text = str(caught.value)
    for part in (
        f"train.stage is {other}, but evaluate.checkpoint ({run.checkpoint}) holds train.stage={stage}.",
        "model.arch is vit_small_patch16, but",
        "model.in_chans is 1, but",
        "dataset.augmentation.input_size: ",
        "Fix: Remove train.stage, model.arch, model.in_chans",
    ):
        assert part in text
    assert ("model.num_classes is 7, but" in text) == (stage == "finetune")


def test_export_reports_all_mistakes_together(trained, refused, tmp_path):
    run = trained("vit", "finetune")
    text = refused(
        "export",
        [
            *(
                "model.arch=vit_small_patch16",
                "model.num_classes=7",
                "export.input_channel=1",
                "export.input_height=40",
            ),
            *(f"export.checkpoint={run.checkpoint}", f"export.onnx_file={tmp_path / 'm.onnx'}"),
        ],
    )
    for part in ("model.arch is", "model.num_classes is 7", "export.input_channel is 1", "export.input_height, input_"):
        assert part in text
