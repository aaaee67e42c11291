"""Specs that were written for TAO: what their sections do here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openmae.errors import SpecError
from openmae.spec.actions import ACTIONS
from openmae.spec.describe import fields, traits
from openmae.spec.load import load_spec, to_dict

TAO_CORE = Path(__file__).parent / "data" / "tao_core_7_3.yaml"
KEYS = Path(__file__).parent / "data" / "published_keys.tsv"
TOPK = "train.checkpointer.enable_topk=true"
LABELLED = ("train.stage=finetune", "dataset.val_data_sources=val", "dataset.batch_size=2")


def checked(*overrides: str):
    return load_spec(None, ["dataset.train_data_sources=photos", *overrides], action="train")


#: The section as nvidia-tao-core 7.3 writes it into every template.
PUBLISHED = {
    "enable_topk": False,
    "replace_periodic": False,
    "monitor": None,
    "mode": None,
    "save_top_k": 1,
    "filename": "model_best_{epoch:03d}",
    "dirpath": None,
    "auto_insert_metric_name": False,
}


def test_the_published_section_loads_without_a_notice(caplog):
    spec = load_spec({"train": {"checkpointer": PUBLISHED}, "dataset": {"train_data_sources": "x"}}, action="train")
    assert spec.train.keep_checkpoints == 3
    assert "checkpointer" not in caplog.text
    assert "checkpointer" in to_dict(spec)["train"]
    assert "checkpointer" not in to_dict(checked())["train"], "a template of OpenMAE does not have it"


@pytest.mark.parametrize(
    ("overrides", "monitor", "typed"),
    [
        ((TOPK, "train.checkpointer.monitor=val_loss", *LABELLED), "val_loss", True),
        ((TOPK, "train.checkpointer.monitor=train_loss", "train.checkpointer.mode=MIN"), "train_loss", True),
        (
            (TOPK, "train.checkpointer.monitor=acc", "train.optim.monitor_name=train_loss", *LABELLED),
            "ACC_all",
            True,
        ),
        ((TOPK, "train.checkpointer.monitor=ACC_all", "train.checkpointer.mode=max", *LABELLED), "ACC_all", True),
        (("train.checkpointer.monitor=val_loss", *LABELLED), "ACC_all", False),
        (("train.optim.monitor_name=train_loss", *LABELLED), "train_loss", True),
    ],
)
def test_the_monitored_metric(overrides, monitor, typed):
    """If it is unset, fine-tuning with validation images monitors ACC_all."""
    spec = checked(*overrides)
    assert spec.train.optim.monitor_name == monitor
    assert spec.is_set("train.optim.monitor_name") == typed
    assert load_spec(to_dict(spec)).train.optim.monitor_name == monitor


def test_replacing_periodic_checkpoints_keeps_one():
    assert checked(TOPK, "train.checkpointer.replace_periodic=true").train.keep_checkpoints == 1
    typed = checked(TOPK, "train.checkpointer.replace_periodic=true", "train.keep_checkpoints=5")
    assert typed.train.keep_checkpoints == 5
    assert checked("train.checkpointer.replace_periodic=true").train.keep_checkpoints == 3


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ("monitor=acc",),
            "train.checkpointer.monitor (override): acc is measured when fine-tuning, on dataset.val_da",
        ),
        (
            ("monitor=train_loss", "mode=max"),
            "mode (override): train_loss is best at its minimum, got max. Set min, or",
        ),
        (("monitor=mAP",), "monitor (override): must be one of train_loss, val_loss, ACC_all, acc, got 'mAP'."),
        (("monitor=val_loss",), "train.checkpointer.monitor (override): val_loss needs validation images"),
        (("save_top_k=0",), "save_top_k (override): must be an integer >= 1, got 0."),
        (("period=3",), "train.checkpointer.period (override): there is no such key."),
    ],
)
def test_invalid_monitors_are_refused(overrides, text):
    with pytest.raises(SpecError) as caught:
        checked(TOPK, *(f"train.checkpointer.{item}" for item in overrides))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "notice"),
    [
        (
            (TOPK, "train.checkpointer.save_top_k=3"),
            "train.checkpointer.save_top_k has no effect because the best",
        ),
        (
            (TOPK, "train.checkpointer.filename=a", "train.checkpointer.dirpath=b"),
            "filename and train.checkpointer.dir",
        ),
        (
            ("train.checkpointer.monitor=train_loss",),
            "train.checkpointer.monitor has no effect without train.checkpointer.enable",
        ),
        (
            (TOPK, "train.checkpointer.monitor=val_loss", "train.optim.monitor_name=train_loss", *LABELLED),
            "train.checkpointer.monitor=val_loss replaces train.optim.monitor_name=train_loss.",
        ),
    ],
)
def test_options_without_effect_are_reported(overrides, notice, caplog):
    checked(*overrides)
    assert notice in caplog.text


IGNORED = {
    "model": {"drop_path_rate": 0.3, "decoder_depth": 1, "decoder_embed_dim": 256, "arch": "vit_base_patch16"},
    "dataset": {"train_data_sources": "x", "batch_size": 2, "augmentation": {"hflip": 0.1}},
    "train": {"optim": {"backbone_multiplier": 0.1, "layer_decay": 0.65, "momentum": 0.9, "warmup_epochs": 3}},
}
IGNORED["train"]["optim"]["lr_scheduler"] = "MultiStep"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["train.stage=finetune"],
            "model.drop_path_rate=0.3 (default 0.1), train.optim.layer_decay=0.65 (default 0.75), "
            "train.optim.backbone_multiplier=0.1 (default 1.0), train.optim.warmup_epochs=3 (default 1)",
        ),
        (
            ["train.optim.lr_scheduler=cosine"],
            "model.decoder_depth=1 (default 8), model.decoder_embed_dim=256 (default 512), "
            "model.drop_path_rate=0.3 (default 0.0), dataset.augmentation.hflip=0.1 (default 0.5)",
        ),
        (["model.arch=convnextv2_tiny", "model.drop_path_rate=0.1"], "model.decoder_embed_dim=256 (default 512), "),
    ],
)
def test_options_that_tao_ignores_are_reported_for_a_file(overrides, expected, tmp_path, caplog):
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(IGNORED))
    load_spec(path, overrides, action="train")
    assert f"TAO ignores these options of the spec file, and OpenMAE applies them: {expected}" in caplog.text
    assert "momentum" not in caplog.text, "it is the default"


def test_ignored_options_are_reported_for_files_and_training_only(tmp_path, caplog):
    load_spec(IGNORED, action="train")
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(IGNORED))
    load_spec(path, ["export.checkpoint=a", "export.onnx_file=b"], action="export")
    load_spec(path, action="automl")
    load_spec(None, ["dataset.train_data_sources=x", "train.optim.momentum=0.8"], action="train")
    assert "TAO ignores" not in caplog.text


def test_ignored_options_are_not_reported_for_openmae_specs(tmp_path, caplog):
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps({**IGNORED, "model": {**IGNORED["model"], "in_chans": 1}}))
    load_spec(path, action="train")
    assert "TAO ignores" not in caplog.text


def test_published_keys_are_in_tao():
    published = {line.split("\t")[0] for line in KEYS.read_text(encoding="utf-8").splitlines()}
    marked = {key for key in fields() if not traits(key).in_tao}
    assert len(marked) > 20
    assert not marked & published


@pytest.mark.parametrize(("arch", "said"), [("hiera_tiny_224", True), ("vit_base_patch16", False)])
def test_pixel_normalisation_is_ignored_for_hiera_alone(arch, said, tmp_path, caplog):
    path = tmp_path / "spec.yaml"
    path.write_text(
        json.dumps({"model": {"arch": arch}, "train": {"norm_pix_loss": False}, "dataset": {"train_data_sources": "x"}})
    )
    load_spec(path, action="train")
    assert ("model.norm_pix_loss=False (default True)" in caplog.text) == said


WANTED = ("train_data_sources", "val_data_sources", "test_data_sources")
FILES = (
    "evaluate.checkpoint",
    "inference.checkpoint",
    "export.checkpoint",
    "export.onnx_file",
    "gen_trt_engine.onnx_file",
)


@pytest.mark.parametrize("action", [*ACTIONS, "automl"])
def test_the_defaults_of_tao_core_load_for_every_action(action, caplog):
    """The file is what nvidia-tao-core itself writes; only what is mandatory is filled in."""
    overrides = [
        *(f"dataset.{name}=x" for name in WANTED),
        *(f"{key}=x" for key in FILES),
        "gen_trt_engine.trt_engine=y",
    ]
    spec = load_spec(TAO_CORE, overrides, action=action)
    assert (spec.model.mask_ratio, spec.train.optim.warmup_epochs, spec.dataset.batch_size) == (0.75, 1, 3)
    assert "model_name has no effect because" in caplog.text
    assert load_spec(to_dict(spec), action=action).model_dump() == spec.model_dump()


def test_the_sizes_of_the_calibration_under_the_names_of_tao():
    prefix = "gen_trt_engine.tensorrt.calibration"
    spec = load_spec(None, [f"{prefix}.cal_batches=6", f"{prefix}.cal_batch_size=4"])
    calibration = spec.gen_trt_engine.tensorrt.calibration
    assert (calibration.count, calibration.batch) == (24, 4)
    assert not spec.is_set(f"{prefix}.count")
    assert load_spec(to_dict(spec)).model_dump() == spec.model_dump(), "both names agree in the recorded spec"
    again = load_spec(spec, [f"{prefix}.cal_batches=2"]).gen_trt_engine.tensorrt.calibration
    assert (again.count, again.batch) == (8, 4)
    with pytest.raises(SpecError, match=r"calibration.cal_batches.*means the same as .*calibration.count. Remove one"):
        load_spec(None, [f"{prefix}.cal_batches=6", f"{prefix}.count=7"])
