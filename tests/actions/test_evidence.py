"""The facts of a finished training run: scored images, images per update, and the checkpoints that are left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from openmae.actions.evidence import collect_evidence
from openmae.data.index import ImageIndex
from openmae.results.verdict import ScoredImages
from openmae.spec.load import load_spec, to_dict


def collect(folder: Path, stage: str, labels: tuple[int, ...] | None, best: float | None = None):
    (folder / "metrics.csv").write_text("step,epoch,val_loss\n0,0,0.5\n5,1,0.7\n10,2,0.5\n15,3,0.6\n")
    overrides = [f"train.stage={stage}", "dataset.batch_size=8", "train.num_gpus=3", "train.accum_grad_batches=2"]
    spec = load_spec(None, [*overrides, "dataset.val_data_sources=x", "train.optim.monitor_name=val_loss"])
    index = ImageIndex(folder, tuple(map(str, range(len(labels or ())))), labels)
    config, info = SimpleNamespace(num_classes=2 * (stage == "finetune")), SimpleNamespace(spec=to_dict(spec))
    return collect_evidence(SimpleNamespace(spec=spec, folder=folder, val=index, config=config, info=info), best)


@pytest.mark.parametrize(
    ("stage", "labels", "scored"),
    [
        ("pretrain", (0, 0, 0, 1, 1, -1), ScoredImages(2, 2, 0.5)),
        ("finetune", (0, 0, 0, 1, 1), ScoredImages(5, 2, 0.6)),
        ("pretrain", None, None),
        ("pretrain", (0, 1), None),
    ],
)
def test_the_scored_images(tmp_path, stage, labels, scored):
    """The probes score half of the images of each class."""
    assert collect(tmp_path, stage, labels).scored == scored


def test_the_checkpoints_that_are_left(tmp_path):
    for name in ("model_epoch_001_step_00005.pth", "model_epoch_003_step_00015.pth", "model_best.pth"):
        (tmp_path / name).touch()
    numbered = {5: "model_epoch_001_step_00005.pth", 15: "model_epoch_003_step_00015.pth"}
    assert collect(tmp_path, "pretrain", None).kept == numbered
    found = collect(tmp_path, "pretrain", None, best=0.5)
    assert found.kept == {**numbered, 10: "model_best.pth"}, "the untrained model was as good"
    assert found.images_per_step == 48
