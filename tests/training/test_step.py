"""Immediate and deferred steps agree to the last bit (here both on a CPU), and so do compiled and plain ones."""

from __future__ import annotations

import logging
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openmae.errors import RunError
from openmae.training import step, trainer
from openmae.training.finetune import FinetuneTask
from openmae.training.pretrain import PretrainTask
from openmae.training.step import can_defer

pytestmark = pytest.mark.integration

NO_DECODER = {"model.decoder_depth": None, "model.decoder_embed_dim": None}
PRETRAIN = {"model.drop_path_rate": 0.2, "train.clip_grad_norm": 1.0, "train.accum_grad_batches": 2}
FINETUNE = {"train.stage": "finetune", **NO_DECODER, "train.ema_decay": 0.9, "train.clip_grad_norm": 1.0}
STEP = {"train.checkpoint_interval_unit": "step", "train.checkpoint_interval": 3}  # settles some steps early


@pytest.fixture
def defer(monkeypatch):
    """``defer()``: defer the steps of the runs that follow, as on a GPU."""
    return lambda: monkeypatch.setattr(trainer, "can_defer", lambda fabric: True)


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
def test_deferred_steps_give_the_same_run(changes, train, assert_same_run, defer, tmp_path):
    train(tmp_path / "immediate", changes)
    defer()
    train(tmp_path / "deferred", changes)
    assert_same_run(tmp_path / "immediate", tmp_path / "deferred")


def bad_losses(loss, number):
    """Spoil the first loss, two in a row, and the last of the first epoch."""
    return loss * float("nan") if number in (1, 3, 4, 10) else loss


def bad_gradients(loss, number):
    if number in (2, 5):
        loss.register_hook(lambda gradient: gradient * float("inf"))
    return loss


@pytest.mark.parametrize(("spoil", "clip"), [(bad_losses, 1.0), (bad_gradients, 1.0), (bad_gradients, 0.0)])
def test_a_bad_step_is_skipped_on_the_device_as_it_is_on_the_host(
    spoil, clip, train, assert_same_run, at_loss, defer, caplog, tmp_path
):
    changes = {**FINETUNE, "dataset.batch_size": 2, "train.clip_grad_norm": clip}  # 10 steps an epoch
    skipped = []
    for name in ("immediate", "deferred"):
        at_loss(FinetuneTask, spoil)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "openmae"):
            train(tmp_path / name, changes)
        skipped.append([text for text in caplog.messages if "skipped" in text])
        defer()
    assert skipped[0] == skipped[1]
    assert [text.partition(":")[0] for text in skipped[1]] == (
        ["Step 1", "Step 3", "Step 4", "Step 10"] if spoil is bad_losses else ["Step 2", "Step 5"]
    )
    assert_same_run(tmp_path / "immediate", tmp_path / "deferred")


@pytest.mark.parametrize("batch", [2, 4, 5, 8])
def test_ctrl_c_in_a_run_with_deferred_steps(batch, train, assert_same_run, at_loss, defer, tmp_path):
    changes = {**FINETUNE, "model.drop_path_rate": 0.2}
    train(tmp_path / "whole", changes)
    defer()

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
    """Collects the operations that make the host wait for a GPU, as they need a value or a size."""

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


def test_operations_that_wait_are_collected():
    with Waits() as waits:
        torch.ones(1).item()
        torch.ones(2)[torch.tensor([True, False])]
    assert {name.partition(".")[2].partition(".")[0] for name in waits.seen} >= {"_local_scalar_dense", "index"}


@pytest.mark.parametrize(("arch", "size"), [("vit_tiny_patch16", 32), ("convnextv2_atto", 64), ("hiera_tiny_224", 64)])
@pytest.mark.parametrize("stage", [PRETRAIN, FINETUNE], ids=["pretrain", "finetune"])
def test_no_deferred_step_waits_for_the_device(stage, arch, size, train, defer, monkeypatch, tmp_path: Path):
    defer()
    update, watched = trainer.Trainer._train_step, []

    def watching(self, group):
        if self.progress.step == 0:  # what is computed once and kept
            update(self, group)
            return
        with Waits() as waits:
            update(self, group)
        watched.append(waits.seen)

    monkeypatch.setattr(trainer.Trainer, "_train_step", watching)
    shape = {"model.arch": arch, "dataset.augmentation.input_size": size, "dataset.val_data_sources": None}
    train(tmp_path, {**stage, **shape, "model.drop_path_rate": 0.1, "train.num_epochs": 1})
    assert watched
    assert not set().union(*watched)


class FakeFabric:
    """The attributes that ``can_defer`` reads."""

    def __init__(self, device: str, scaler: object) -> None:
        self.device = torch.device(device)
        self.strategy = self
        self.precision = self
        self.scaler = scaler


def test_steps_are_deferred_only_on_a_gpu_without_scaler():
    assert can_defer(FakeFabric("cuda", None))
    assert not can_defer(FakeFabric("cuda", object())), "fp16's scaler decides by its own rules"
    assert not can_defer(FakeFabric("cpu", None))


CROSS = {"train.num_epochs": 1, "model.decoder_attention": "cross", "model.decoder_targets": 0.5}
ONE_EPOCH = {"train.num_epochs": 1}
NOTICE = "train.compile is meant for GPUs"


@pytest.fixture
def backend(monkeypatch):
    """``backend(x)``: compile with another backend; inductor takes minutes here, and is tested once, slowly."""
    torch._dynamo.reset()
    return lambda x: monkeypatch.setattr(step.torch, "compile", partial(torch.compile, backend=x))


@pytest.mark.parametrize("changes", [ONE_EPOCH, CROSS, {**FINETUNE, **ONE_EPOCH}])
def test_a_compiled_run_equals_the_plain_one(changes, backend, train, payload_of, assert_same_run, caplog, tmp_path):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    train(tmp_path / "plain", changes)
    backend(count)
    with caplog.at_level(logging.WARNING, "openmae"):
        train(tmp_path / "compiled", {**changes, "train.compile": True})
    assert graphs, "nothing was compiled"
    assert sum(NOTICE in text for text in caplog.messages) == 1
    assert not any("_orig_mod" in name for name in payload_of(tmp_path / "compiled")["state_dict"])
    assert_same_run(tmp_path / "plain", tmp_path / "compiled")  # these graphs run the same operations


def test_a_run_resumes_with_compilation_on_and_off(backend, train, assert_same_run, caplog, tmp_path):
    changes = {**FINETUNE, "train.num_epochs": 3}
    train(tmp_path / "plain", changes)
    backend("eager")
    with caplog.at_level(logging.WARNING, "openmae"):
        for last, on in ((1, True), (2, False), (3, True)):
            train(tmp_path / "mixed", {**changes, "train.compile": on, "train.stop_after_epoch": last})
    assert not any("other settings" in text for text in caplog.messages)
    assert_same_run(tmp_path / "plain", tmp_path / "mixed")


def test_a_model_that_cannot_be_compiled_is_an_error(backend, train, tmp_path):
    def broken(graph, inputs):
        raise OSError("no compiler here")

    backend(broken)
    with pytest.raises(RunError) as caught:
        train(tmp_path, {"train.num_epochs": 1, "train.compile": True})
    assert "torch.compile could not compile the model" in caught.value.problem
    assert "no compiler here" in caught.value.problem
    assert "train.compile=false" in caught.value.fix


@pytest.mark.slow  # inductor compiles C++ for two minutes
@pytest.mark.parametrize("changes", [ONE_EPOCH, {**FINETUNE, **ONE_EPOCH}], ids=["pretrain", "finetune"])
def test_a_model_compiled_by_inductor_learns_the_same(changes, train, payload_of, tmp_path):
    torch._dynamo.reset()
    for on in (False, True):
        train(tmp_path / f"{on}", {**changes, "train.compile": on, "model.drop_path_rate": 0})
    plain, compiled = (payload_of(tmp_path / name)["state_dict"] for name in ("False", "True"))
    assert plain.keys() == compiled.keys()
    torch.testing.assert_close(compiled, plain, rtol=0, atol=2e-3)  # AdamW shows rounding of small gradients in full
