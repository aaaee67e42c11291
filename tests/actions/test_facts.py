"""The facts about images, weights and machine, and what a training run without options does with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tests.helpers.images import write_classes

from openmae.actions import facts, train
from openmae.actions.facts import find_facts
from openmae.actions.sources import open_training_data
from openmae.cli.main import main
from openmae.spec.load import load_spec
from openmae.spec.schema import ExperimentSpec

pytestmark = pytest.mark.integration


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """24 images of 32 px in two classes."""
    write_classes(tmp_path / "labelled", {"": 12}, ("cat", "dog"))
    for path in (tmp_path / "labelled").rglob("*.*"):
        Image.open(path).convert("RGB").resize((32, 40)).save(path)
    return tmp_path / "labelled"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure two steps only."""
    monkeypatch.setattr(facts, "_MEASURED_SECONDS", 0.0)


def test_facts_of_images(labelled):
    spec = load_spec(None, ["train.stage=finetune", f"dataset.train_data_sources={labelled}"])
    found = find_facts(spec, *open_training_data(spec), None)
    assert (found.images, found.per_class, found.classes, found.side, found.val_images) == (24, 12, 2, 32, 0)
    assert found.on_gpu is torch.cuda.is_available()
    assert found.free_memory > 2**20
    assert found.weights == {}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_step_is_measured(stage, labelled):
    spec = load_spec(None, [f"train.stage={stage}", f"dataset.train_data_sources={labelled}", "train.precision=fp32"])
    images, val = open_training_data(spec)
    found = find_facts(spec, images, val, None)
    before = torch.get_rng_state()
    measured = facts.measure(spec, found, images)
    assert torch.equal(torch.get_rng_state(), before), "the run that follows would be another one"
    assert 0 < measured.seconds_per_image < 60
    tokens, width, depth, layers = 64, 192, 12, 14  # ViT-Tiny: of a block, about 14 tensors of the tokens are kept
    whole = tokens * width * depth * layers * 4
    share = 1 if stage == "finetune" else 0.25  # of the tokens is encoded
    assert share * whole / 3 < measured.bytes_per_image < 3 * whole


def test_large_images_are_decoded_once_if_their_copies_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    for number in range(8):
        photo = Image.fromarray(noise).resize((2400, 1800))
        photo.save(tmp_path / "photos" / f"{number}.png", compress_level=1)  # slow to decode, whatever the machine
    sources = [f"dataset.train_data_sources={tmp_path / 'photos'}", "dataset.augmentation.input_size=64"]
    data = open_training_data(load_spec(None, sources))

    def decide() -> ExperimentSpec:
        return facts.decide(load_spec(None, [*sources, "model.arch=vit_tiny_patch16"]), *data, None)

    chosen = decide()
    assert chosen.dataset.cache == "on"
    assert "their copies take 0.00073 GB" in chosen.chosen["dataset.cache"]
    monkeypatch.setenv("OPENMAE_CACHE_GB", "0.0005")
    assert decide().chosen["dataset.cache"] == (
        "scaled copies of the images take 0.00073 GB, and the cache has room for 0.0005 GB"
    )


@pytest.mark.parametrize(("seconds", "precision"), [(1.3, "bf16"), (1.05, "fp32")])
def test_bf16_must_make_a_step_faster(seconds, precision, labelled, monkeypatch):
    """``seconds``: of a step in fp32; one in bf16 takes 1."""
    monkeypatch.setattr(facts, "has_fast_bf16", lambda on_gpu: True)
    monkeypatch.setattr(
        facts,
        "_measure_step",
        lambda spec, found, *_: replace(found, seconds_per_image={"bf16": 1, "fp32": seconds}[spec.train.precision]),
    )
    spec = load_spec(None, [f"dataset.train_data_sources={labelled}"])
    chosen = facts.decide(spec, *open_training_data(spec), None)
    assert chosen.train.precision == precision
    assert ("train.precision" in chosen.chosen) is (precision == "bf16")


def test_training_needs_only_images(labelled, tmp_path, monkeypatch, capsys):
    """Every choice is shown with its reason, and recorded; a resumed run keeps it."""
    monkeypatch.setattr(facts, "has_fast_bf16", lambda on_gpu: False)
    options = [f"dataset.train_data_sources={labelled}", f"results_dir={tmp_path / 'run'}", "wandb.enable=false"]
    options += ["dataset.num_workers_per_gpu=0", "train.num_epochs=2"]
    assert main(["train", *options, "train.stop_after_epoch=1"]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "chosen by train.recipe=auto model.arch=vit_tiny_patch16 the fastest to pretrain without a GPU" in shown
    assert "dataset.batch_size=8 training images: 24" in shown
    assert "The run makes only 6 optimizer steps (training images: 24, train.num_epochs: 2), too few" in shown
    text = (tmp_path / "run/train/experiment.yaml").read_text()
    assert "#   dataset.augmentation.input_size=32: half of the images have a side of 32 px or less\n" in text
    first = yaml.safe_load(text)
    monkeypatch.setattr(facts, "decide", lambda *_: pytest.fail("a resumed run chooses nothing"))
    Image.new("RGB", (99, 99)).save(labelled / "cat" / "new.png")
    assert main(["train", *options]) == 0
    shown = capsys.readouterr().err
    assert "Options that are not set have the values of the first start; see experiment.yaml." in " ".join(
        shown.split()
    )
    again = yaml.safe_load((tmp_path / "run/train/experiment.yaml").read_text())
    del first["train"]["stop_after_epoch"]
    assert again == first


def test_weights_determine_the_model(labelled, tmp_path, caplog):
    common = ["dataset.num_workers_per_gpu=0", "train.num_epochs=1", "wandb.enable=false", "dataset.batch_size=8"]
    small = ["model.arch=hiera_tiny_224", "dataset.augmentation.input_size=96", "model.decoder_depth=1"]
    data = f"dataset.train_data_sources={labelled}"
    train.run(load_spec(None, [data, *common, *small, f"results_dir={tmp_path / 'a'}"], action="train"))
    weights = f"train.pretrained_model_path={tmp_path / 'a/train/backbone.safetensors'}"
    tuned = ["train.stage=finetune", weights, data, *common, f"results_dir={tmp_path / 'b'}"]
    train.run(load_spec(None, tuned, action="train"))
    written = yaml.safe_load((tmp_path / "b/train/experiment.yaml").read_text())
    assert (written["model"]["arch"], written["dataset"]["augmentation"]["input_size"]) == ("hiera_tiny_224", 96)
    assert "The weights were trained at" not in caplog.text


def test_spec_check_shows_the_choices(labelled, tmp_path, capsys, caplog):
    assert main(["spec", "check", f"dataset.train_data_sources={labelled}", "train.num_epochs=3"]) == 0
    assert "#   dataset.batch_size=8: training images: 24\n" in capsys.readouterr().out
    assert main(["spec", "check", "dataset.train_data_sources=s3://bucket/photos"]) == 0
    assert "train.recipe=auto chooses the options that are not set when it has the data." in caplog.text


def test_a_value_that_fits_no_choice_is_refused(labelled, capsys):
    spec = ["dataset.train_data_sources=" + str(labelled), "model.patch_size=16", "dataset.augmentation.input_size=40"]
    assert main(["spec", "check", *spec]) == 2
    assert "must be a multiple of 16, the side of vit_tiny_patch16's patches, got 40x40." in capsys.readouterr().err


def test_memory_within_a_control_group(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "_CONTROL_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000")
    (tmp_path / "memory.current").write_text("1000000")
    assert facts._free_memory(on_gpu=False, processes=2) == 1_000_000
    (tmp_path / "memory.max").write_text("max")
    assert facts._free_memory(on_gpu=False, processes=1) > 3_000_000


def test_weights_that_cannot_be_read_are_left_to_training(labelled, tmp_path):
    (tmp_path / "x.pth").write_bytes(b"no checkpoint")
    spec = load_spec(
        None, [f"train.pretrained_model_path={tmp_path / 'x.pth'}", f"dataset.train_data_sources={labelled}"]
    )
    assert find_facts(spec, *open_training_data(spec), None).weights == {}


def test_images_that_cannot_be_read_are_left_out(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(tmp_path / "b.png")
    spec = load_spec(None, [f"dataset.train_data_sources={tmp_path}"], action="train")
    assert find_facts(spec, *open_training_data(spec), None).side == 50


def test_weights_of_another_program_determine_the_model_too(tmp_path, labelled):
    import timm

    torch.save(
        timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0).state_dict(), tmp_path / "timm.pth"
    )
    spec = load_spec(
        None, [f"train.pretrained_model_path={tmp_path / 'timm.pth'}", f"dataset.train_data_sources={labelled}"]
    )
    found = find_facts(spec, *open_training_data(spec), None).weights
    assert found["model.arch"] == "vit_tiny_patch16"
    assert found["dataset.augmentation.input_size"] == 64
