"""``mae train`` from the command line: what it leaves, in both stages and all families, and how it goes on."""

from __future__ import annotations

import csv
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import openmae
from openmae.actions import plan
from openmae.checkpoints.format import CheckpointInfo
from openmae.cli.main import main
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig
from openmae.results.metrics_csv import read_metrics
from openmae.results.status import read_status
from openmae.spec.load import load_spec
from openmae.spec.metrics import metrics_of

from .conftest import train_arguments

pytestmark = pytest.mark.xdist_group("actions")

STAGES = ("pretrain", "finetune")
FAMILIES = ("vit", "convnextv2", "hiera")
KPIS = {
    "pretrain": {"train_loss", "val_loss", "images_per_s", "data_wait"},
    "finetune": {"train_loss", "val_loss", "ACC_all", "ACC_top5", "images_per_s", "data_wait"},
}
PROBES = {"knn_acc", "probe_acc"}


def paint(path: Path, seed: int, mode: str = "RGB", size: tuple[int, int] = (48, 40)) -> None:
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = noise if mode == "RGBA" else noise[..., :3]
    Image.fromarray(channels).convert(mode).save(path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", STAGES)
def test_results_of_training(trained, family, stage):
    run = trained(family, stage)
    arch = next(o for o in run.overrides if o.startswith("model.arch=")).partition("=")[2]
    steps = 2 if stage == "pretrain" else 3
    files = {path.name for path in run.folder.iterdir()}
    assert files >= {
        *(f"model_epoch_001_step_{steps:05d}.pth", f"{arch}_latest.pth", "model_best.pth", "backbone.safetensors"),
        *("status.json", "metrics.csv", "experiment.yaml", "report.html", "curves.png"),
    }
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not any(name.endswith(".tmp") for name in files)
    assert (run.folder / f"{arch}_latest.pth").resolve() == run.checkpoint
    assert (run.folder / "reconstructions" / "last.png").exists() == (stage == "pretrain")
    assert torch.load(run.checkpoint, weights_only=True)["openmae"]["stage"] == stage
    with safe_open(run.folder / "backbone.safetensors", framework="pt") as file:
        assert not any(name.startswith(("model.", "encoder.")) for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("stage", STAGES)
def test_the_status_log_has_the_keys_of_the_contract(trained, stage):
    lines = read_status(trained("vit", stage).folder / "status.json")
    assert [line["status"] for line in lines] == ["STARTED", "RUNNING", "SUCCESS"]
    progress = {"epoch", "max_epoch", "step", "max_step", "time_per_epoch", "time_per_step", "eta"}
    always = {"date", "time", "status", "verbosity", "message"}
    facts = {"duration", "peak_memory_bytes", "versions"}
    assert [set(line) - always for line in lines] == [set(), progress | {"kpi"}, facts]
    assert set(lines[1]["kpi"]) - PROBES == KPIS[stage]
    assert set(lines[1]["kpi"]) >= PROBES or stage == "finetune"
    assert all(math.isfinite(value) for value in lines[1]["kpi"].values())
    speed = {"lr", "images_per_s", "data_wait"}
    assert set(lines[1]["kpi"]) - speed <= set(metrics_of(stage)), "a metric needs a row in openmae.spec.metrics"


@pytest.mark.parametrize("stage", STAGES)
def test_the_resolved_spec_loads_back_and_runs_again(trained, stage, tmp_path):
    run = trained("vit", stage)
    written = yaml.safe_load((run.folder / "experiment.yaml").read_text())
    assert written["model"]["drop_path_rate"] == (0.0 if stage == "pretrain" else 0.1)
    assert written["dataset"]["augmentation"]["mean"] == [0.485, 0.456, 0.406]
    assert written["model"].get("num_classes") == (None if stage == "pretrain" else 3)
    again = tmp_path / "again"
    spec = load_spec(run.folder / "experiment.yaml", [f"results_dir={again}"], action="train")
    assert spec.train.stage == stage
    assert main(["train", "-e", str(run.folder / "experiment.yaml"), f"results_dir={again}"]) == 0
    losses = [read_metrics(folder / "metrics.csv") for folder in (run.folder, again / "train")]
    pace = ("images_per_s", "data_wait")
    first, second = ([{k: v for k, v in row.items() if k not in pace} for row in rows] for rows in losses)
    assert first == second


def test_a_second_call_does_not_change_a_finished_run(trained, photos, capsys):
    run = trained("vit", "pretrain")
    before = {
        path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and path.name != "status.json"
    }
    assert main(["train", *run.overrides]) == 0
    text = capsys.readouterr().err
    assert "All 1 epochs are trained already; nothing was changed. Raise train.num_epochs to train longer" in text
    after = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and path.name != "status.json"}
    assert after == before
    lines = read_status(run.folder / "status.json")
    assert [line["status"] for line in lines[-2:]] == ["STARTED", "SKIPPED"]
    metrics = openmae.train({}, run.overrides)
    assert set(metrics) - PROBES == {"train_loss", "val_loss"}
    assert metrics["val_loss"] == lines[1]["kpi"]["val_loss"]
    # the lines of the calls above would puzzle the tests that share this run
    (run.folder / "status.json").write_text("\n".join((run.folder / "status.json").read_text().splitlines()[:3]) + "\n")


def test_more_epochs_resume_from_the_newest_checkpoint(trained, photos, tmp_path, capsys):
    run = trained("vit", "finetune")
    overrides = [o for o in run.overrides if not o.startswith("results_dir=")]
    assert main(["train", *overrides, f"results_dir={tmp_path}"]) == 0
    assert main(["train", *overrides, f"results_dir={tmp_path}", "train.num_epochs=2"]) == 0
    folder = tmp_path / "train"
    assert "Resuming from" in capsys.readouterr().err
    assert {path.name for path in folder.glob("model_epoch*")} == {
        "model_epoch_001_step_00003.pth",
        "model_epoch_002_step_00006.pth",
    }
    rows = read_metrics(folder / "metrics.csv")
    assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 3, 4, 5, 6]
    statuses = [line["status"] for line in read_status(folder / "status.json")]
    assert statuses == ["STARTED", "RUNNING", "SUCCESS"] * 2
    assert "num_epochs: 2" in (folder / "experiment.yaml").read_text()


def test_stop_after_epoch(trained, tmp_path, capsys):
    overrides = [o for o in trained("vit", "finetune").overrides if not o.startswith("results_dir=")]
    command = ["train", *overrides, f"results_dir={tmp_path}", "train.num_epochs=2"]
    assert main([*command, "train.stop_after_epoch=1"]) == 0
    assert "Paused after epoch 1 of 2" in capsys.readouterr().err
    assert main([*command, "train.stop_after_epoch=1"]) == 0
    assert "Raise train.stop_after_epoch to train longer" in capsys.readouterr().err
    assert main(command) == 0
    assert (tmp_path / "train" / "report.html").is_file()
    statuses = [line["status"] for line in read_status(tmp_path / "train" / "status.json")]
    assert statuses == ["STARTED", "RUNNING", "SUCCESS", "STARTED", "SKIPPED", "STARTED", "RUNNING", "SUCCESS"]


def test_a_finished_run_without_a_report_is_completed(trained, tmp_path):
    overrides = [o for o in trained("vit", "pretrain").overrides if not o.startswith("results_dir=")]
    assert main(["train", *overrides, f"results_dir={tmp_path}"]) == 0
    whole = (tmp_path / "train" / "backbone.safetensors").read_bytes()
    for name in ("backbone.safetensors", "report.html"):
        (tmp_path / "train" / name).unlink()
    assert main(["train", *overrides, f"results_dir={tmp_path}"]) == 0
    assert (tmp_path / "train" / "backbone.safetensors").read_bytes() == whole
    assert "training loss" in (tmp_path / "train" / "report.html").read_text()
    assert read_status(tmp_path / "train" / "status.json")[-1]["status"] == "SUCCESS"


def test_a_random_seed_is_recorded_and_kept_on_resume(trained, tmp_path):
    overrides = [o for o in trained("vit", "finetune").overrides if not o.startswith("results_dir=")]
    seeds = []
    for epochs in (1, 2):
        more = ["train.seed=-1", f"train.num_epochs={epochs}", f"results_dir={tmp_path}"]
        assert main(["train", *overrides, *more]) == 0
        seeds.append(yaml.safe_load((tmp_path / "train" / "experiment.yaml").read_text())["train"]["seed"])
    assert seeds[0] == seeds[1] >= 0


def test_the_best_checkpoint_has_the_best_metric(trained):
    folder = trained("vit", "finetune").folder
    best = torch.load(folder / "model_best.pth", weights_only=True)
    assert best["progress"]["best"] == max(
        row["ACC_all"] for row in read_metrics(folder / "metrics.csv") if "ACC_all" in row
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_pretrained_weights_are_loaded(trained, family, tmp_path, capsys):
    source = trained(family, "pretrain").folder / "backbone.safetensors"
    overrides = [o for o in trained(family, "finetune").overrides if not o.startswith("results_dir=")]
    capsys.readouterr()  # the fixtures' own trainings may have printed
    assert main(["train", *overrides, f"results_dir={tmp_path}", f"train.pretrained_model_path={source}"]) == 0
    text = capsys.readouterr().err
    assert "starts from scratch" not in text
    assert "loaded 100 % of" in " ".join(text.split())
    assert "backbone.safetensors: loaded 100 % of " in (tmp_path / "train" / "report.html").read_text()


@pytest.mark.parametrize("given", ["checkpoint", "backbone", "foreign"])
def test_the_image_size_of_pretrained_weights_is_compared(trained, given, tmp_path, capsys):
    run = trained("vit", "pretrain")
    source = run.checkpoint if given == "checkpoint" else run.folder / "backbone.safetensors"
    if given == "foreign":  # its tensors do not record the size of a training
        source = tmp_path / "timm.safetensors"
        save_file(load_file(run.folder / "backbone.safetensors"), source)
    overrides = [o for o in trained("vit", "finetune").overrides if "results_dir=" not in o and "input_size" not in o]
    overrides += [f"train.pretrained_model_path={source}", f"results_dir={tmp_path}", "train.num_epochs=1"]
    capsys.readouterr()
    assert main(["train", *overrides]) == 0
    notice = (
        "Notice: The weights were trained at 32x32 px, and this run uses 224x224 px. Set "
        "dataset.augmentation.input_size=32 to keep the size."
    )
    assert (notice in " ".join(capsys.readouterr().err.split())) == (given != "foreign")
    overrides += ["dataset.augmentation.input_size=48", f"results_dir={tmp_path / 'other'}"]
    assert main(["train", *overrides]) == 0
    assert "were trained at" not in capsys.readouterr().err, "the user has chosen the size"


def test_training_from_scratch_is_reported(trained, tmp_path, capsys):
    overrides = [o for o in trained("vit", "finetune").overrides if not o.startswith("results_dir=")]
    assert main(["train", *overrides, f"results_dir={tmp_path}"]) == 0
    assert "Notice: train.pretrained_model_path is empty: fine-tuning starts from scratch" in capsys.readouterr().err


def test_pretraining_starts_from_pretrained_weights(trained, tmp_path):
    run = trained("vit", "pretrain")
    overrides = [o for o in run.overrides if not o.startswith("results_dir=")]
    more = [f"train.pretrained_model_path={run.checkpoint}", "train.optim.lr=1e-9", f"results_dir={tmp_path}"]
    assert main(["train", *overrides, *more]) == 0
    before, after = (
        read_metrics(folder / "metrics.csv")[-1]["val_loss"] for folder in (run.folder, tmp_path / "train")
    )
    assert after == pytest.approx(before, abs=1e-4), "decoder and encoder are taken along"


def test_finetuning_without_validation_images(trained, tmp_path, capsys):
    drop = ("results_dir=", "dataset.val_data_sources=")
    overrides = [o for o in trained("vit", "finetune").overrides if not o.startswith(drop)]
    assert main(["train", *overrides, f"results_dir={tmp_path}"]) == 0
    assert "none to validate" in capsys.readouterr().err
    assert set(read_status(tmp_path / "train" / "status.json")[1]["kpi"]) == {"train_loss", "images_per_s", "data_wait"}
    assert (tmp_path / "train" / "model_best.pth").exists()


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_and_sizes_that_are_not_square(trained, channels, tmp_path):
    mode = {1: "L", 4: "RGBA"}[channels]
    for number in range(4):
        paint(tmp_path / "photos" / f"{number}.png", number, mode)
    drop = ("results_dir=", "dataset.val_data_sources=", "dataset.train_data_sources=")
    overrides = [o for o in trained("convnextv2", "pretrain").overrides if not o.startswith(drop)]
    shape = [f"model.in_chans={channels}", "dataset.augmentation.input_size=[32,64]", "model.mask_ratio=0.5"]
    sources = [f"dataset.train_data_sources={tmp_path / 'photos'}", f"results_dir={tmp_path}"]
    assert main(["train", *overrides, *shape, *sources]) == 0
    backbone = openmae.load_backbone(tmp_path / "train" / "backbone.safetensors")
    assert backbone(torch.zeros(2, channels, 32, 64)).shape == (2, 320)
    found = tmp_path / "found"
    checkpoint = next((tmp_path / "train").glob("model_epoch*"))
    table = openmae.inference(
        {"inference": {"checkpoint": str(checkpoint)}, "results_dir": str(found)},
        [f"dataset.test_data_sources={tmp_path / 'photos'}", "dataset.num_workers_per_gpu=0"],
    )
    assert table == found / "inference" / "embeddings.parquet"
    with Image.open(found / "inference" / "reconstructions" / "test.png") as picture:
        assert picture.width > picture.height


def test_a_table_of_labels(trained, tmp_path):
    with open(tmp_path / "labels.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label"])
        for number in range(6):
            paint(tmp_path / "images" / f"{number}.png", number)
            writer.writerow([f"images/{number}.png", ["10", "9"][number % 2]])
    drop = ("results_dir=", "dataset.val_data_sources=", "dataset.train_data_sources=")
    overrides = [o for o in trained("vit", "finetune").overrides if not o.startswith(drop)]
    sources = [f"dataset.{part}_data_sources={tmp_path}" for part in ("train", "val")]
    assert main(["train", *overrides, *sources, f"results_dir={tmp_path / 'results'}"]) == 0
    checkpoint = next((tmp_path / "results" / "train").glob("model_epoch*"))
    assert torch.load(checkpoint, weights_only=True)["openmae"]["class_names"] == ["9", "10"]


def test_a_finished_run_with_other_settings_is_refused(trained, refused):
    """A finished run with other settings in the same results_dir is refused, and only its log of attempts changes."""
    run = trained("vit", "finetune")

    def files() -> list[tuple[str, int]]:
        others = (path for path in run.folder.iterdir() if path.is_file() and path.name != "status.json")
        return sorted((path.name, path.stat().st_mtime_ns) for path in others)

    before = files()
    for override, words in (
        ("train.optim.lr=0.01", "train.optim.lr was"),
        ("dataset.augmentation.hflip=0.1", "dataset.augmentation.hflip was 0.5 and is 0.1"),
    ):
        text = refused("train", [*run.overrides, override])
        assert words in text
        assert "holds a finished run with other settings" in text
        assert "Fix: For a new run, pass --restart" in text
    assert before == files()


@pytest.mark.parametrize(
    ("source", "key", "reason"),
    [
        ("plain", "train.optim.monitor_name", "its images have no labels"),
        ("one_each", "train.checkpointer.monitor", "a probe needs a class with at least 2 images; every class here ha"),
    ],
)
def test_a_probe_of_images_without_labels_cannot_pick_the_best_checkpoint(
    photos, refused, source, key, reason, tmp_path
):
    for name in ("red", "blue"):
        paint(tmp_path / "one_each" / name / "0.png", 0)
    val = photos.plain if source == "plain" else tmp_path / "one_each"
    overrides = [o for o in train_arguments(photos, "vit", "pretrain") if not o.startswith("dataset.val_data_sources=")]
    overrides += [f"dataset.val_data_sources={val}", f"{key}=knn_acc", f"results_dir={tmp_path / 'out'}"]
    topk = ["train.checkpointer.enable_topk=true"] if "checkpointer" in key else []
    text = refused("train", [*overrides, *topk])
    assert f"{key}: knn_acc cannot be measured on dataset.val_data_sources: {reason}" in text
    assert f"Make one folder per class in {val}, or use {key}=val_loss." in text
    assert not (tmp_path / "out" / "train" / "metrics.csv").exists(), "training has begun"


def test_an_option_that_is_newer_than_the_run_had_its_default():
    now = {"model": {"decoder_targets": 1.0, "decoder_attention": "self"}}
    for finished, spec in ((True, {}), (False, {}), (True, {"train": {"gpu_ids": [0], "clip_grad_norm": 0.0}})):
        infos = [CheckpointInfo("pretrain", ModelConfig("vit_tiny_patch16"), spec=each) for each in (spec, now)]
        earlier = plan.Earlier("results_dir", Path("runs/train/model.pth"), infos[0], 1, None)
        plan.compare_settings(earlier, infos[1], finished=finished)
    other = CheckpointInfo("pretrain", ModelConfig("vit_tiny_patch16"), spec={"model": {"decoder_targets": 0.5}})
    with pytest.raises(CheckpointError, match=r"model\.decoder_targets was 1\.0 and is 0\.5\."):
        plan.compare_settings(earlier, other, finished=True)


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ("train_loss", "ACC_all", False),
        ("train_loss", "val_loss", False),
        ("ACC_all", "train_loss", True),
        ("val_loss", "ACC_all", True),
    ],
)
def test_the_monitored_metric_that_older_versions_recorded(before, now, refused):
    """They recorded train_loss if the option was unset."""
    model = ModelConfig("vit_tiny_patch16")
    infos = [CheckpointInfo("finetune", model, spec={"train": {"optim": {"monitor_name": m}}}) for m in (before, now)]
    earlier = plan.Earlier("results_dir", Path("runs/train/model.pth"), infos[0], 1, None)
    with pytest.raises(CheckpointError) if refused else nullcontext():
        plan.compare_settings(earlier, infos[1], finished=True)


def test_fewer_epochs_are_reported_when_a_run_resumes(caplog):
    model = ModelConfig("vit_tiny_patch16")
    long, short = (
        CheckpointInfo("pretrain", model, spec={"train": {"num_epochs": n, "optim": {"lr": lr}}})
        for n, lr in ((30, 0.1), (10, 0.2))
    )
    plan.compare_settings(plan.Earlier("results_dir", Path("r/m.pth"), long, 4, None), short, finished=False)
    assert "train.optim.lr was 0.1 and is 0.2; train.num_epochs was 30 and is 10." in caplog.text
    caplog.clear()
    short = replace(short, spec={"train": {"num_epochs": 10, "optim": {"lr": 0.1}}})
    plan.compare_settings(plan.Earlier("results_dir", Path("r/m.pth"), long, 10, None), short, finished=True)
    assert "resumes with other settings: train.num_epochs was 30 and is 10." in caplog.text
    caplog.clear()
    plan.compare_settings(plan.Earlier("results_dir", Path("r/m.pth"), long, 30, None), short, finished=True)
    assert not caplog.text, "nothing is left to do"


def test_an_unfinished_run_resumes_with_other_settings_and_a_warning(caplog):
    before = {"train": {"optim": {"lr": 0.1}, "num_epochs": 3, "pretrained_model_path": "a.pth"}, "dataset": {}}
    now = {"train": {"optim": {"lr": 0.2}, "num_epochs": 9}}
    infos = [CheckpointInfo("pretrain", ModelConfig("vit_tiny_patch16"), spec=spec) for spec in (before, now)]
    earlier = plan.Earlier("results_dir", Path("runs/train/model.pth"), infos[0], 1, None)
    plan.compare_settings(earlier, infos[1], finished=False)
    assert "The run in runs/train resumes with other settings: train.optim.lr was 0.1 and is 0.2." in caplog.text
    assert "pretrained_model_path" not in caplog.text, "a resumed run needs it no more"


def test_values_of_environment_variables_are_not_published(photos, tmp_path, monkeypatch):
    (tmp_path / "hush-hush").symlink_to(photos.plain)
    monkeypatch.setenv("MAE_SECRET", "hush-hush")
    source = str(tmp_path) + "/${oc.env:MAE_SECRET}"
    arguments = [*train_arguments(photos, "vit", "pretrain"), f"dataset.train_data_sources={source}"]
    assert main(["train", *arguments, f"results_dir={tmp_path / 'run'}"]) == 0
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"backbone.safetensors", "report.html", "experiment.yaml"} <= {path.name for path in files}
    assert not [path.name for path in files if b"hush-hush" in path.read_bytes()]
    assert b"oc.env:MAE_SECRET" in (tmp_path / "run" / "train" / "backbone.safetensors").read_bytes()
