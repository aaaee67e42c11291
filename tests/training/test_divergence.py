"""Runs that diverge: skipped steps, checkpoints that are kept, messages, and that their advice works."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from openmae.actions.plan import make_plan
from openmae.checkpoints.folder import list_checkpoints
from openmae.distributed.launch import build_fabric, launch
from openmae.errors import RunError
from openmae.results.status import read_status
from openmae.spec.load import load_spec
from openmae.training import divergence, trainer
from openmae.training.divergence import DivergenceGuard
from openmae.training.finetune import FinetuneTask
from openmae.training.pretrain import PretrainTask
from openmae.training.state import Progress, Step

pytestmark = pytest.mark.integration

several_processes = pytest.mark.xdist_group("several processes")

PRETRAIN = {"dataset.val_data_sources": None, "train.num_epochs": 5}
FINETUNE = {
    "train.stage": "finetune",
    "model.decoder_depth": None,
    "model.decoder_embed_dim": None,
    "train.ema_decay": 0.9,
    "train.num_epochs": 4,
    "dataset.augmentation.mixup": 0.8,
}
ACCUMULATE = {"train.accum_grad_batches": 2, "train.num_epochs": 6}  # 3 steps an epoch


@pytest.fixture
def after_step():
    """``after_step(n, change)``: change the weights after the n-th step of the optimizer."""
    hooks = []

    def install(number, change):
        steps = []

        def hook(optimizer, *_):
            steps.append(1)
            if len(steps) == number:
                with torch.no_grad():
                    for group in optimizer.param_groups:
                        for parameter in group["params"]:
                            change(parameter)

        hooks.append(register_optimizer_step_post_hook(hook))
        return hooks[-1]

    yield install
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    """Train once with each set of changes; returns the results folder."""
    folders = {}

    def run(changes):
        key = str(changes)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("uninterrupted")
            train(folders[key], changes)
        return folders[key]

    return run


def explode(parameter: torch.Tensor) -> None:
    """Leave finite weights that give no finite loss, as far too high a learning rate does."""
    parameter.mul_(1e30)


def break_weights(parameter: torch.Tensor) -> None:
    parameter.fill_(float("nan"))


def finite(path: Path) -> bool:
    payload = torch.load(path, weights_only=True)
    parts = [*payload["state_dict"].values(), *payload.get("ema_state_dict", {}).values()]
    return all(bool(value.isfinite().all()) for value in parts)


@pytest.mark.parametrize(
    ("changes", "step", "left", "deferred"),
    [
        pytest.param(PRETRAIN, 11, "model_epoch_002_step_00010.pth", False, id="pretrain"),
        pytest.param(
            {**FINETUNE, **ACCUMULATE},
            7,
            "model_epoch_002_step_00006.pth",
            True,
            id="finetune, deferred",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {**PRETRAIN, "train.num_epochs": 4, "train.checkpoint_interval_unit": "step", "train.keep_checkpoints": 2},
            7,
            "model_epoch_001_step_00006.pth",
            True,
            id="steps, deferred",
        ),
    ],
)
def test_the_same_command_resumes_from_the_last_good_weights(
    changes, step, left, deferred, train, uninterrupted, after_step, assert_same_run, monkeypatch, tmp_path
):
    monkeypatch.setattr(trainer, "can_defer", lambda fabric: deferred)
    hook = after_step(step, explode)
    with pytest.raises(RunError) as caught:
        train(tmp_path / "cut", changes)
    hook.remove()
    assert caught.value.problem == (
        "Training diverged: the loss or its gradients were not finite 10 steps in a row. They are not finite for "
        "random images either, so the weights are at fault, not the images."
    )
    assert caught.value.fix == (
        "Lower the learning rate (its peak was 0.001), set train.clip_grad_norm=1.0, lengthen "
        f"train.optim.warmup_epochs; the same command with that change resumes from {left}."
    )
    assert list_checkpoints(tmp_path / "cut")[-1].name == left
    assert (tmp_path / "cut" / "vit_tiny_patch16_latest.pth").resolve().name == left
    assert list((tmp_path / "cut").glob("*.pth.diverged"))
    train(tmp_path / "cut", changes)
    assert_same_run(uninterrupted(changes), tmp_path / "cut")


@pytest.mark.parametrize("deferred", [False, True], ids=["immediate", "deferred"])
def test_nonfinite_weights_are_not_written(
    deferred, train, uninterrupted, after_step, assert_same_run, monkeypatch, tmp_path
):
    """Neither as a checkpoint nor as the best one, and they replace no healthy checkpoint."""
    monkeypatch.setattr(trainer, "can_defer", lambda fabric: deferred)
    hook = after_step(10, break_weights)
    changes = {**PRETRAIN, "train.keep_checkpoints": 1}
    with pytest.raises(RunError) as caught:
        train(tmp_path / "cut", changes)
    hook.remove()
    assert caught.value.problem == "Training diverged: the weights are not finite. They were not saved."
    assert caught.value.fix.endswith("the same command with that change resumes from model_epoch_001_step_00005.pth.")
    assert [path.name for path in list_checkpoints(tmp_path / "cut")] == ["model_epoch_001_step_00005.pth"]
    assert all(finite(path) for path in (tmp_path / "cut").glob("*.pth"))
    train(tmp_path / "cut", changes)
    assert_same_run(uninterrupted(changes), tmp_path / "cut")


def test_a_nonfinite_average_is_not_written(train, monkeypatch, tmp_path):
    update = trainer.ModelEmaV3.update

    def spoilt(self, model, step=None):
        update(self, model, step)
        if step == 7:
            next(iter(self.module.parameters())).fill_(float("inf"))

    monkeypatch.setattr(trainer.ModelEmaV3, "update", torch.no_grad()(spoilt))
    with pytest.raises(RunError, match="the weights are not finite"):
        train(tmp_path, {**FINETUNE, "train.checkpoint_interval": 3, "train.keep_checkpoints": 1})
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_best.pth"], "the first epoch's"
    assert finite(tmp_path / "model_best.pth")


def spoil_images(monkeypatch, task, first: int = 1) -> None:
    """Make every loss NaN from the ``first`` on, except of random images."""
    original, calls = task.training_loss, []

    def training_loss(self, model, batch, epoch):
        calls.append(1)
        noise = batch.indices.tolist() == [0, 1, 2, 3]
        loss = original(self, model, batch, epoch)
        return loss if noise or len(calls) < first else loss * float("nan")

    monkeypatch.setattr(task, "training_loss", training_loss)


@pytest.mark.parametrize("deferred", [False, True], ids=["immediate", "deferred"])
def test_bad_images_are_named_and_checkpoints_are_kept(deferred, train, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "can_defer", lambda fabric: deferred)
    spoil_images(monkeypatch, PretrainTask, first=6)
    with pytest.raises(RunError) as caught:
        train(tmp_path, PRETRAIN)
    assert caught.value.problem.startswith(
        "The loss or its gradients were not finite 10 steps in a row, the last with: "
    )
    assert caught.value.problem.count(".png") == 4
    assert caught.value.problem.endswith(
        "They are finite for random images, so these images are at fault, not the weights."
    )
    assert caught.value.fix.startswith("Check the images named")
    names = {path.name for path in list_checkpoints(tmp_path)}
    assert names >= {"model_epoch_001_step_00005.pth", "model_epoch_002_step_00010.pth"}
    assert not list(tmp_path.glob("*.diverged"))


@pytest.mark.parametrize("task", [PretrainTask, FinetuneTask])
def test_a_run_that_skips_every_step_fails(task, train, monkeypatch, tmp_path):
    spoil_images(monkeypatch, task)
    changes = FINETUNE if task is FinetuneTask else PRETRAIN
    with pytest.raises(RunError, match=r"not finite 5 steps in a row, .* so these images are at fault"):
        train(tmp_path, {**changes, "train.num_epochs": 1})
    assert read_status(tmp_path / "status.json")[-1]["status"] == "FAILURE"
    assert not list(tmp_path.glob("*.pth"))


def test_a_run_whose_last_steps_diverge_fails(train, after_step, tmp_path):
    """Fewer than ten of them, so that they are noticed only at its end."""
    after_step(3, explode)
    with pytest.raises(RunError, match="not finite 2 steps in a row") as caught:
        train(tmp_path, {**PRETRAIN, "train.num_epochs": 1})
    assert caught.value.fix.endswith("the same command with that change starts from the beginning.")
    assert not list(tmp_path.glob("*.pth"))


def test_bad_pretrained_weights_are_named(train, tmp_path):
    train(tmp_path / "first", {**PRETRAIN, "train.num_epochs": 1})
    (path,) = list_checkpoints(tmp_path / "first")
    content = torch.load(path, weights_only=True)
    for value in content["state_dict"].values():
        value.mul_(1e30)
    torch.save(content, tmp_path / "huge.pth")
    changes = {**PRETRAIN, "train.num_epochs": 1, "train.pretrained_model_path": tmp_path / "huge.pth"}
    with pytest.raises(RunError, match="the weights are at fault") as caught:
        train(tmp_path / "second", changes)
    assert caught.value.fix.startswith(
        f"Check train.pretrained_model_path ({tmp_path / 'huge.pth'}): no step could be made from its weights. Or: "
        "Lower the learning rate"
    )


def test_a_run_whose_last_image_is_bad_succeeds(train, monkeypatch, caplog, tmp_path):
    spoil_images(monkeypatch, PretrainTask, first=5)
    with caplog.at_level(logging.WARNING, "openmae"):
        train(tmp_path, {**PRETRAIN, "train.num_epochs": 1})
    assert "Step 5: the loss is nan; the step is skipped." in caplog.text
    assert [path.name for path in list_checkpoints(tmp_path)] == ["model_epoch_001_step_00005.pth"]


@several_processes
@pytest.mark.slow(reason="starts two processes")
@pytest.mark.parametrize("strategy", ["fsdp", "ddp", "deferred"])
def test_two_processes_diverge_together(strategy, tiny_overrides, photos, monkeypatch, tmp_path):
    from tests.helpers import two_process_work

    changes = {**PRETRAIN, "train.num_gpus": 2, "train.gpu_ids": "[0,1]", "dataset.batch_size": 2}
    changes["train.distributed_strategy"] = "fsdp" if strategy == "fsdp" else "ddp"
    spec = load_spec(None, tiny_overrides(tmp_path, changes), action="train")
    fabric = build_fabric("train", 2, [0, 1], 1, strategy=spec.train.distributed_strategy)
    job = two_process_work.diverge_deferred if strategy == "deferred" else two_process_work.diverge
    with pytest.raises(RunError) as caught:
        launch(fabric, job, make_plan(spec, tmp_path))
    assert "the weights are at fault" in caught.value.problem
    assert caught.value.fix.endswith("resumes from model_epoch_001_step_00005.pth.")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["model_epoch_001_step_00005.pth"]


class Scaler:
    """A scaler of fp16 and its optimizer, whose gradients overflow at each step."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale

    def step(self) -> None:
        self.scale /= 2


def test_a_skipped_step_of_fp16_counts_as_bad_and_is_explained_at_a_scale_of_1(monkeypatch, caplog):
    """Above 1 the right scale is being searched for; at 1 the gradients themselves overflow."""
    scaler, progress = Scaler(4.0), Progress()
    monkeypatch.setattr(divergence, "scaler_of", lambda fabric: scaler)
    fabric: Any = SimpleNamespace(world_size=1)
    unused: Any = None
    guard = DivergenceGuard(fabric, unused, unused, scaler, unused, unused, unused, progress, "{}.png".format)
    step = Step(7, 1e-3, [torch.tensor([3])], [torch.tensor(1.0)], None)
    assert [guard.update_weights(step) for _ in range(3)] == [False] * 3
    assert caplog.messages == [
        "Step 7: the gradients overflow in fp16 at a scale of 1; the step is skipped. Its images: 3.png"
    ]
    assert progress.bad_steps == 3
