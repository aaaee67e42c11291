"""``mae train --plan``."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.images import write_classes

from openmae.actions.resources import planned, this_run
from openmae.cli.main import main
from openmae.spec.load import load_spec

SMALL = ["model.arch=vit_tiny_patch16", "dataset.augmentation.input_size=64"]


def test_the_table_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--plan", *SMALL]) == 0
    text = capsys.readouterr().out
    assert text.startswith("pretrain vit_tiny_patch16, 64 x 64 px, decoder 2 x 192\n")
    lines = [line.split() for line in text.splitlines()]
    assert [line[:2] for line in lines if line and line[0] in ("fp32", "bf16")] == [
        ["fp32", "no"],
        ["fp32", "yes"],
        ["bf16", "no"],
        ["bf16", "yes"],
    ]
    assert "This run: batches of 256 images in bf16 need 0." in text


def test_the_recipe_of_a_gpu_is_planned(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "photos", {"": 4}, ("cat", "dog", "cow"))
    spec, images = planned(load_spec(None, [f"dataset.train_data_sources={folder}", "train.stage=finetune", *SMALL]))
    assert (images, spec.model.num_classes, spec.train.precision) == (12, 3, "bf16")
    text = this_run(spec, images)
    assert f". {spec.train.num_epochs} epochs of 12 images: about " in text
    assert " s on L4, " in text


def test_options_of_the_run_count() -> None:
    def told(*options: str) -> str:
        return this_run(load_spec(None, [*SMALL, "train.recipe=tao", *options]), None)

    assert told("dataset.batch_size=4").startswith("This run: batches of 4 images in fp32 need 0.5 GiB.")
    assert "with activation checkpointing" in told("train.activation_checkpointing=true")
    two = ["train.distributed_strategy=fsdp", "train.num_gpus=2", "dataset.batch_size=1"]
    assert told(*two) == "This run: batches of 1 image in fp16 need 0.2 GiB."
    on_two = this_run(load_spec(None, [*SMALL, *two]), 1000)
    assert "on 2 x L4" in on_two


def test_a_mistake_in_the_spec_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--plan", "model.arch=vit"]) == 2
    assert "model.arch" in capsys.readouterr().err
    assert main(["train", "--plan", *SMALL, "dataset.train_data_sources=/nowhere/photos"]) == 2
    assert "There is no file or folder /nowhere/photos." in capsys.readouterr().err
    assert main(["train", "--plan", "--restart", *SMALL]) == 2
    assert "not allowed with argument" in capsys.readouterr().err
