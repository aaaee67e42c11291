"""An update's numbers read during the next one, as on a GPU: here on a CPU, where both ways must agree to the bit."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openmae.training import trainer
from openmae.training.finetune import FinetuneTask
from openmae.training.pretrain import PretrainTask
from openmae.training.updates import reads_late

NO_DECODER = {"model.decoder_depth": None, "model.decoder_embed_dim": None}
PRETRAIN = {"model.drop_path_rate": 0.2, "train.clip_grad_norm": 1.0, "train.accum_grad_batches": 2}
FINETUNE = {"train.stage": "finetune", **NO_DECODER, "train.ema_decay": 0.9, "train.clip_grad_norm": 1.0}
STEP = {"train.checkpoint_interval_unit": "step", "train.checkpoint_interval": 3}  # some updates are read for one


@pytest.fixture
def late(monkeypatch):
    """From here on, updates are read late."""
    return lambda: monkeypatch.setattr(trainer, "reads_late", lambda fabric: True)


@pytest.fixture
def at_loss(monkeypatch):
    """``at_loss(task class, change)``: ``change(loss, n)`` takes the place of the n-th loss; forgets earlier calls."""
    originals = {task: task.training_loss for task in (PretrainTask, FinetuneTask)}

    def install(task, change):
        calls = 0

        def training_loss(self, *arguments):
            nonlocal calls
            calls += 1
            return change(originals[task](self, *arguments), calls)

        monkeypatch.setattr(task, "training_loss", training_loss)

    return install


@pytest.mark.parametrize("changes", [PRETRAIN, {**FINETUNE, **STEP}], ids=["pretrain", "finetune"])
def test_reading_late_changes_nothing(changes, train, assert_same_run, late, tmp_path):
    train(tmp_path / "at once", changes)
    late()
    train(tmp_path / "late", changes)
    assert_same_run(tmp_path / "at once", tmp_path / "late")


def bad_losses(loss, number):
    """The first of all, two in a row, and the last of the first epoch."""
    return loss * float("nan") if number in (1, 3, 4, 10) else loss


def bad_gradients(loss, number):
    if number in (2, 5):
        loss.register_hook(lambda gradient: gradient * float("inf"))
    return loss


@pytest.mark.parametrize(("spoil", "clip"), [(bad_losses, 1.0), (bad_gradients, 1.0), (bad_gradients, 0.0)])
def test_a_bad_step_is_skipped_on_the_device_as_it_is_on_the_host(
    spoil, clip, train, assert_same_run, at_loss, late, caplog, tmp_path
):
    changes = {**FINETUNE, "dataset.batch_size": 2, "train.clip_grad_norm": clip}  # 10 steps an epoch
    told = []
    for name in ("at once", "late"):
        at_loss(FinetuneTask, spoil)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "openmae"):
            train(tmp_path / name, changes)
        told.append([text for text in caplog.messages if "skipped" in text])
        late()
    assert told[0] == told[1]
    assert [text.partition(":")[0] for text in told[1]] == (
        ["Step 1", "Step 3", "Step 4", "Step 10"] if spoil is bad_losses else ["Step 2", "Step 5"]
    )
    assert_same_run(tmp_path / "at once", tmp_path / "late")


@pytest.mark.parametrize("batch", [2, 4, 5, 8])
def test_ctrl_c_in_a_run_that_reads_late(batch, train, assert_same_run, at_loss, late, tmp_path):
    changes = {**FINETUNE, "model.drop_path_rate": 0.2}
    train(tmp_path / "whole", changes)
    late()

    def interrupt(loss, number):
        if number == batch:
            signal.raise_signal(signal.SIGINT)
        return loss

    at_loss(FinetuneTask, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", changes)
    train(tmp_path / "cut", changes)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


class Waits(TorchDispatchMode):
    """Notes the operations that make a GPU's host wait: a value or a size has to be known to go on."""

    names = frozenset(
        {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if name in self.names or by_mask or str(function) == "aten.repeat_interleave.Tensor":
            self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


def test_the_watch_sees_a_wait():
    with Waits() as waits:
        torch.ones(1).item()
        torch.ones(2)[torch.tensor([True, False])]
    assert {name.partition(".")[2].partition(".")[0] for name in waits.seen} >= {"_local_scalar_dense", "index"}


@pytest.mark.parametrize(("arch", "size"), [("vit_tiny_patch16", 32), ("convnextv2_atto", 64), ("hiera_tiny_224", 64)])
@pytest.mark.parametrize("stage", [PRETRAIN, FINETUNE], ids=["pretrain", "finetune"])
def test_no_update_waits_for_the_device(stage, arch, size, train, late, monkeypatch, tmp_path: Path):
    late()
    update, watched = trainer.Trainer._update, []

    def watching(self, group):
        if self.progress.step == 0:  # what is computed once and kept
            update(self, group)
            return
        with Waits() as waits:
            update(self, group)
        watched.append(waits.seen)

    monkeypatch.setattr(trainer.Trainer, "_update", watching)
    shape = {"model.arch": arch, "dataset.augmentation.input_size": size, "dataset.val_data_sources": None}
    train(tmp_path, {**stage, **shape, "model.drop_path_rate": 0.1, "train.num_epochs": 1})
    assert watched
    assert not set().union(*watched)


class FakeFabric:
    """As far as ``reads_late`` looks."""

    def __init__(self, device: str, scaler: object) -> None:
        self.device = torch.device(device)
        self.strategy = self
        self.precision = self
        self.scaler = scaler


def test_who_reads_late():
    assert reads_late(FakeFabric("cuda", None))
    assert not reads_late(FakeFabric("cuda", object())), "fp16's scaler decides on a step by its own rules"
    assert not reads_late(FakeFabric("cpu", None))
