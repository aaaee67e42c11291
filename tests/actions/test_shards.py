"""Training from shards: what the same images give as loose files, bit for bit, also when it is resumed."""

from __future__ import annotations

import pytest
import torch

import openmae
from openmae.cli.main import main
from openmae.data.index import index_images
from openmae.data.shards.packing import Packing, pack
from openmae.results.metrics_csv import read_metrics

from .conftest import FAMILIES, SMALL, SMALL_DECODER

pytestmark = pytest.mark.xdist_group("actions")

SHORT = (*SMALL, *FAMILIES["vit"], *SMALL_DECODER, "train.num_epochs=2")


@pytest.fixture
def pattern(photos, tmp_path) -> str:
    packed = pack(index_images(photos.train, True), tmp_path / "shards", Packing(shard_bytes=30_000))
    assert len(packed.shards) > 1
    return packed.pattern


def run(source, folder, *more: str) -> None:
    arguments = (*SHORT, *more, f"dataset.train_data_sources={source}", f"results_dir={folder}")
    assert main(["train", *arguments]) == 0


def losses(folder) -> list[float]:
    return [row["train_loss"] for row in read_metrics(folder / "train" / "metrics.csv") if "train_loss" in row]


def assert_same_weights(ours, theirs) -> None:
    """After the last step of all."""
    paths = [max(folder.glob("train/model_epoch_*.pth")) for folder in (ours, theirs)]
    assert paths[0].name == paths[1].name
    mine, others = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert all(torch.equal(mine[name], value) for name, value in others.items()), f"{ours.name}: the weights differ"


def test_shards_give_the_same_pretraining_as_a_folder_also_resumed(photos, pattern, tmp_path):
    loose, shards, resumed = (tmp_path / name for name in ("loose", "shards", "resumed"))
    run(photos.train, loose)
    run(
        pattern,
        shards,
        "train.checkpoint_interval=1",
        "train.checkpoint_interval_unit=step",
        "train.keep_checkpoints=9",
    )
    assert losses(shards)[-1] == losses(loose)[-1], "the losses differ"
    assert_same_weights(shards, loose)
    (middle,) = (shards / "train").glob("model_epoch_*_step_00001.pth")
    run(pattern, resumed, f"train.resume_training_checkpoint_path={middle}")
    assert_same_weights(resumed, loose)


def test_shards_are_evaluated_and_classified(photos, pattern, tmp_path, trained):
    model = trained("vit", "finetune").checkpoint
    metrics = [
        openmae.evaluate({"evaluate": {"checkpoint": str(model)}, "dataset": {"val_data_sources": str(source)},
                          "results_dir": str(tmp_path / name)})
        for name, source in (("loose", photos.train), ("shards", pattern))
    ]  # fmt: skip
    assert metrics[0] == metrics[1]
    arguments = (f"inference.checkpoint={model}", f"dataset.test_data_sources={pattern}", f"results_dir={tmp_path}")
    assert main(["inference", *arguments]) == 0
    table = (tmp_path / "inference" / "results.csv").read_text()
    assert "shards-000000.tar!blue/0.png" in table
