"""The loop: resumed and interrupted runs, nonfinite losses, averages, the best checkpoint."""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
import signal
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from openmae.checkpoints.folder import list_checkpoints
from openmae.data import scaled_copies
from openmae.errors import CheckpointError
from openmae.results.metrics_csv import read_metrics
from openmae.results.status import read_status
from openmae.training import trainer
from openmae.training.finetune import FinetuneTask
from openmae.training.pretrain import PretrainTask
from openmae.training.state import Outputs

pytestmark = pytest.mark.integration

PRETRAIN = {"model.drop_path_rate": 0.2}
FINETUNE = {
    "train.stage": "finetune",
    "model.decoder_depth": None,
    "model.decoder_embed_dim": None,
    "model.drop_path_rate": 0.2,
    "train.ema_decay": 0.9,
    "dataset.augmentation.re_prob": 0.25,
}
CONVNEXT = {"model.arch": "convnextv2_atto", "dataset.augmentation.input_size": 64}
HIERA = {"model.arch": "hiera_tiny_224", "dataset.augmentation.input_size": 64}


class Crash(Exception):  # noqa: N818
    """Stands for a power cut."""


@pytest.fixture
def at_batch(monkeypatch):
    """``at_batch(task class, n, what)``: do ``what`` in the n-th training batch from now on."""

    def install(task: type, number: int, what: Any) -> None:
        calls = 0
        original = task.training_loss

        def training_loss(self, *arguments):
            nonlocal calls
            calls += 1
            if calls == number:
                what()
            return original(self, *arguments)

        monkeypatch.setattr(task, "training_loss", training_loss)

    return install


def crash() -> None:
    raise Crash


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


STEP = {"train.checkpoint_interval_unit": "step"}
ACCUMULATE = {"train.accum_grad_batches": 3}  # of 5 batches: groups of 3 and 2


@pytest.mark.parametrize(
    ("task", "changes", "batch", "what", "error"),
    [
        pytest.param(PretrainTask, {}, 8, crash, Crash, id="pretrain, killed, from the epoch's end"),
        pytest.param(
            PretrainTask, {**CONVNEXT, **ACCUMULATE, **STEP}, 4, crash, Crash, id="convnext, accumulated, from a step"
        ),
        pytest.param(PretrainTask, HIERA, 2, interrupt, KeyboardInterrupt, id="hiera, Ctrl-C", marks=pytest.mark.slow),
        pytest.param(FinetuneTask, {}, 8, interrupt, KeyboardInterrupt, id="finetune, Ctrl-C"),
        pytest.param(
            FinetuneTask, {**ACCUMULATE, **STEP}, 9, crash, Crash, id="finetune, accumulated, killed, from a step"
        ),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    task, changes, batch, what, error, train, assert_same_run, at_batch, tmp_path
):
    changes = {**(PRETRAIN if task is PretrainTask else FINETUNE), **changes}
    train(tmp_path / "whole", changes)
    at_batch(task, batch, what)
    with pytest.raises(error):
        train(tmp_path / "resumed", changes)
    train(tmp_path / "resumed", changes)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


@contextmanager
def interrupted_validation(monkeypatch, task, number):
    """Press Ctrl-C in the validation with this number."""
    validate, numbers = task.validate, count(1)

    def interrupted(self, *arguments):
        if next(numbers) == number:
            interrupt()
        return validate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(task, "validate", interrupted)
        yield


@pytest.mark.parametrize("task", [PretrainTask, FinetuneTask])
def test_ctrl_c_in_a_validation_keeps_the_epoch(task, train, assert_same_run, payload_of, monkeypatch, tmp_path):
    changes = PRETRAIN if task is PretrainTask else FINETUNE
    train(tmp_path / "whole", changes)
    with (
        interrupted_validation(monkeypatch, task, 2),
        pytest.raises(KeyboardInterrupt),
    ):  # the first is before the first step
        train(tmp_path / "resumed", changes)
    assert payload_of(tmp_path / "resumed")["progress"]["batch"] == 5
    train(tmp_path / "resumed", changes)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    lines = read_status(tmp_path / "resumed" / "status.json")
    paces = [line["kpi"].get("images_per_s") for line in lines if "kpi" in line]
    assert paces[0] is None, "only the validation of the first epoch was left, which has no throughput"
    assert all(paces[1:])


@pytest.mark.parametrize("task", [PretrainTask, FinetuneTask])
def test_ctrl_c_before_the_first_step(task, train, assert_same_run, payload_of, monkeypatch, tmp_path):
    changes = {**(PRETRAIN if task is PretrainTask else FINETUNE), "train.num_epochs": 1}
    train(tmp_path / "whole", changes)
    with interrupted_validation(monkeypatch, task, 1), pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", changes)
    assert payload_of(tmp_path / "resumed")["progress"]["step"] == 0
    assert read_metrics(tmp_path / "resumed" / "metrics.csv") == []
    for _ in range(2):  # the second time, the row before the first step exists already
        with monkeypatch.context() as patch:
            patch.setattr(task, "training_loss", lambda *_: crash())
            with pytest.raises(Crash):
                train(tmp_path / "resumed", changes)
    train(tmp_path / "resumed", changes)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize("task", [PretrainTask, FinetuneTask])
def test_the_model_is_validated_before_the_first_step(task, train, payload_of, monkeypatch, caplog, tmp_path):
    changes = {**(PRETRAIN if task is PretrainTask else FINETUNE), "train.num_epochs": 1}
    with caplog.at_level(logging.INFO, "openmae"):
        metrics = train(tmp_path, changes)
    first, *others = read_metrics(tmp_path / "metrics.csv")
    assert first.keys() == {"step", "epoch", *metrics} - {"train_loss"}
    assert (first["step"], first["epoch"]) == (0, 0)
    assert all(row["step"] and row["epoch"] == 1 for row in others)
    (text,) = (m for m in caplog.messages if m.startswith("Before the first step: "))
    assert f"val_loss {first['val_loss']:.4f}" in text
    kpis = [line["kpi"] for line in read_status(tmp_path / "status.json") if "kpi" in line]
    assert [kpi["val_loss"] for kpi in kpis] == [metrics["val_loss"]], "it counts as an epoch"
    with monkeypatch.context() as patch:
        patch.setattr(Outputs, "report_untrained", lambda *_: None)
        patch.setattr(task, "validate", lambda *_: {"val_loss": 1.0})
        train(tmp_path / "other", changes)
    assert same(payload_of(tmp_path)["state_dict"], payload_of(tmp_path / "other")["state_dict"])


def test_the_untrained_model_is_never_the_best(train, monkeypatch, tmp_path):
    losses = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(PretrainTask, "validate", lambda *_: {"val_loss": next(losses)})
    metrics = train(tmp_path, {"train.num_epochs": 2})
    progress = torch.load(tmp_path / "model_best.pth", weights_only=True)["progress"]
    assert (progress["epoch"], progress["best"], progress["best_metric"]) == (2, 2.0, "val_loss")
    assert metrics["val_loss"] == 2.0


def test_a_run_without_validation_images_is_not_validated_before_the_first_step(train, tmp_path):
    train(tmp_path, {"train.num_epochs": 1, "dataset.val_data_sources": None})
    assert read_metrics(tmp_path / "metrics.csv")[0]["step"] == 1


CROSS = {"model.decoder_attention": "cross", "model.decoder_targets": 0.5}


@pytest.mark.parametrize("changes", [FINETUNE, CROSS], ids=["finetune", "cross"])
def test_a_run_that_pauses_equals_one_that_does_not(changes, train, assert_same_run, payload_of, tmp_path):
    train(tmp_path / "whole", changes)
    train(tmp_path / "paused", {**changes, "train.stop_after_epoch": 1})
    assert payload_of(tmp_path / "paused")["progress"]["epoch"] == 1, "it did not pause after the first epoch"
    assert not (tmp_path / "paused" / "backbone.safetensors").exists(), "a paused run is not a finished one"
    train(tmp_path / "paused", changes)
    assert_same_run(tmp_path / "whole", tmp_path / "paused")


@pytest.mark.parametrize("changes", [PRETRAIN, FINETUNE], ids=["pretrain", "finetune"])
def test_recomputed_activations_change_nothing(changes, train, assert_same_run, tmp_path):
    changes = {**changes, "train.num_epochs": 1}
    train(tmp_path / "kept", changes)
    train(tmp_path / "recomputed", {**changes, "train.activation_checkpointing": True})
    assert_same_run(tmp_path / "kept", tmp_path / "recomputed")


def test_a_run_resumes_without_the_cache_of_its_images(train, assert_same_run, monkeypatch, tmp_path):
    """The photos are smaller than copies for 32 px, so what a copy looks like is changed here."""
    changes = {"dataset.cache": "on", "train.num_epochs": 2}
    monkeypatch.setattr(scaled_copies, "_LARGER", 1.0)
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))
    train(tmp_path / "whole", changes)
    copies = [path for path in (tmp_path / "cache" / "copies").glob("*/*/*") if path.is_file()]
    assert len(copies) == 21, "a copy of each training image"
    train(tmp_path / "paused", {**changes, "train.stop_after_epoch": 1})
    for path in copies:
        path.unlink()
    train(tmp_path / "paused", changes)
    assert_same_run(tmp_path / "whole", tmp_path / "paused")


def test_a_run_is_validated_where_it_pauses(train, tmp_path):
    metrics = train(tmp_path, {**FINETUNE, "train.validation_interval": 9, "train.stop_after_epoch": 1})
    assert "ACC_all" in metrics


@pytest.mark.parametrize("changes", [PRETRAIN, FINETUNE], ids=["pretrain", "finetune"])
def test_workers_change_nothing(changes, train, assert_same_run, tmp_path):
    changes = {**changes, "train.num_epochs": 1}
    train(tmp_path / "alone", changes)
    train(tmp_path / "workers", {**changes, "dataset.num_workers_per_gpu": 2})
    assert_same_run(tmp_path / "alone", tmp_path / "workers")
    assert multiprocessing.active_children() == [], "the run left its workers"


def test_a_run_that_fails_ends_its_workers(train, at_batch, tmp_path):
    at_batch(PretrainTask, 2, crash)
    with pytest.raises(Crash):
        train(tmp_path, {"dataset.num_workers_per_gpu": 1})
    assert multiprocessing.active_children() == []


def test_accumulation_equals_a_larger_batch(train, payload_of, tmp_path):
    one_epoch = {"train.num_epochs": 1}
    train(tmp_path / "large", one_epoch)
    train(tmp_path / "small", {**one_epoch, "dataset.batch_size": 2, "train.accum_grad_batches": 2})
    large, small = (payload_of(tmp_path / name) for name in ("large", "small"))
    assert large["progress"]["step"] == small["progress"]["step"] == 5
    # AdamW divides by the root of a squared gradient: rounding of a gradient near 0 shows in full
    torch.testing.assert_close(small["state_dict"], large["state_dict"], rtol=0, atol=2e-4)
    assert small["progress"]["best"] == pytest.approx(large["progress"]["best"], rel=1e-5)


class Spoiler:
    """Spoils the loss of some batches, and notes the weights that each batch saw."""

    def __init__(self, task: type, bad: set[int], monkeypatch) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.files: list[list[int]] = []
        original = task.training_loss

        def training_loss(task, model, batch, epoch):
            self.weights.append({k: v.clone() for k, v in task.model.state_dict().items()})
            self.files.append(batch.indices.tolist())
            loss = original(task, model, batch, epoch)
            return loss * float("nan") if len(self.weights) in bad else loss

        monkeypatch.setattr(task, "training_loss", training_loss)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_a_nonfinite_loss_skips_its_step_and_names_its_images(train, monkeypatch, caplog, tmp_path):
    spoiler = Spoiler(PretrainTask, {3}, monkeypatch)
    with caplog.at_level(logging.WARNING, "openmae"):
        train(tmp_path, {"train.num_epochs": 1, "dataset.val_data_sources": None})
    before, bad, after, next_one = spoiler.weights[1:5]
    assert not same(before, bad)
    assert same(bad, after)
    assert not same(after, next_one)
    (text,) = (m for m in caplog.messages if "skipped" in m)
    names = sorted([f"cat/{n}.png" for n in range(11)] + [f"dog/{n}.png" for n in range(10)])  # as the index sorts them
    assert text == "Step 3: the loss is nan; the step is skipped. Its images: " + ", ".join(
        names[index] for index in spoiler.files[2]
    )
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 4, 5]


def test_only_the_bad_batch_is_named(train, monkeypatch, caplog, tmp_path):
    spoiler = Spoiler(PretrainTask, {2}, monkeypatch)
    with caplog.at_level(logging.WARNING, "openmae"):
        train(tmp_path, {**ACCUMULATE, "train.num_epochs": 1, "dataset.val_data_sources": None})
    (text,) = (m for m in caplog.messages if "skipped" in m)
    assert text.count(".png") == len(spoiler.files[1]) == 4


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"train.clip_grad_norm": 1.0}, id="clipping"),
        pytest.param({}, id="no clipping"),
        pytest.param({"train.precision": "bf16"}, id="bf16"),
    ],
)
def test_nonfinite_gradients_skip_their_step(changes, train, monkeypatch, caplog, tmp_path):
    weights: list[dict[str, torch.Tensor]] = []
    original = PretrainTask.training_loss

    def training_loss(task, *arguments):
        weights.append({k: v.clone() for k, v in task.model.state_dict().items()})
        loss = original(task, *arguments)
        if len(weights) == 3:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(PretrainTask, "training_loss", training_loss)
    with caplog.at_level(logging.WARNING, "openmae"):
        train(tmp_path, {"train.num_epochs": 1, "dataset.val_data_sources": None, **changes})
    assert same(weights[2], weights[3])
    assert not same(weights[3], weights[4])
    (text,) = (m for m in caplog.messages if "skipped" in m)
    assert text.startswith("Step 3: the loss is ")
    assert "but its gradients' norm is nan; the step is skipped. Its images: " in text
    assert text.count(".png") == 4


def test_clipping_bounds_the_gradient(train, tmp_path):
    norms: list[float] = []

    def note(optimizer, *_):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(grads).item())

    hook = register_optimizer_step_pre_hook(note)
    try:
        for limit in (0, 0.01):
            folder, changes = tmp_path / f"{limit}", {"train.num_epochs": 1, "dataset.val_data_sources": None}
            train(folder, {**changes, "train.clip_grad_norm": limit})
    finally:
        hook.remove()
    assert min(norms[:5]) > 0.1
    assert norms[5:] == pytest.approx([0.01] * 5, rel=1e-3)


def test_the_average_follows_the_weights_and_is_validated(train, monkeypatch, payload_of, tmp_path):
    spoiler = Spoiler(FinetuneTask, set(), monkeypatch)
    measured = []
    validate = FinetuneTask.validate

    def noting(self, fabric, model, batches):
        measured.append({k: v.clone() for k, v in model.state_dict().items()})
        assert not model.training
        return validate(self, fabric, model, batches)

    monkeypatch.setattr(FinetuneTask, "validate", noting)
    train(tmp_path, {**FINETUNE, "train.num_epochs": 1})
    payload = payload_of(tmp_path)
    final = {k.removeprefix("model."): v for k, v in payload["state_dict"].items()}
    averaged = {k.removeprefix("model."): v for k, v in payload["ema_state_dict"].items()}
    expected = spoiler.weights[2]  # the first two updates are copied: an average of random weights is useless
    for weights in [*spoiler.weights[3:], final]:
        expected = {k: 0.9 * expected[k] + 0.1 * v for k, v in weights.items()}
    torch.testing.assert_close(averaged, expected)
    assert same(averaged, measured[-1])
    assert not same(averaged, final)
    saved = load_file(tmp_path / "backbone.safetensors")
    assert torch.equal(saved["blocks.0.attn.qkv.weight"], averaged["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("changes", "best"),
    [
        pytest.param({}, 2, id="every epoch has a checkpoint"),
        pytest.param({"train.checkpoint_interval": 4}, 2, id="the best epoch has none of its own"),
    ],
)
def test_the_best_checkpoint_is_that_of_the_best_epoch(changes, best, train, monkeypatch, tmp_path):
    losses = iter([0.5, 3.0, 1.0, 2.0, 1.5])  # the first one is that of the untrained model
    monkeypatch.setattr(PretrainTask, "validate", lambda *_: {"val_loss": next(losses)})
    rare = {"train.num_epochs": 4, "train.keep_checkpoints": 1, "train.optim.monitor_name": "val_loss"}
    train(tmp_path, {**rare, **changes})
    payload = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert (payload["progress"]["epoch"], payload["progress"]["best"]) == (best, 1.0)
    assert [path.name for path in tmp_path.glob("model_epoch*")] == ["model_epoch_004_step_00020.pth"]
    assert (tmp_path / "vit_tiny_patch16_latest.pth").resolve().name == "model_epoch_004_step_00020.pth"


def test_the_best_checkpoint_can_be_that_of_the_best_features(train, monkeypatch, tmp_path):
    accuracies = iter([0.1, 0.5, 0.3])
    monkeypatch.setattr(PretrainTask, "validate", lambda *_: {"val_loss": 1.0, "probe_acc": next(accuracies)})
    train(tmp_path, {"train.num_epochs": 2, "train.optim.monitor_name": "probe_acc"})
    payload = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert (payload["progress"]["epoch"], payload["progress"]["best"]) == (1, 0.5)


def test_a_resumed_run_forgets_the_best_value_of_another_metric(train, monkeypatch, caplog, tmp_path):
    measured = {"val_loss": 0.4, "probe_acc": 0.3}  # val_loss 0.4 would be better than any accuracy to come
    monkeypatch.setattr(PretrainTask, "validate", lambda *_: dict(measured))
    train(tmp_path, {"train.num_epochs": 1})
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["progress"]["best"] == 0.4
    with caplog.at_level(logging.WARNING, "openmae"):
        train(tmp_path, {"train.num_epochs": 2, "train.optim.monitor_name": "probe_acc"})
    text = "model_best.pth was picked by val_loss and is now picked by probe_acc: the next epoch counts as the best so"
    assert text in caplog.text
    progress = torch.load(tmp_path / "model_best.pth", weights_only=True)["progress"]
    assert (progress["epoch"], progress["best"], progress["best_metric"]) == (2, 0.3, "probe_acc")


def test_the_spec_sets_the_optimizer_of_a_resumed_run(train, payload_of, tmp_path):
    train(tmp_path, {"train.num_epochs": 1})
    changes = {"train.optim.weight_decay": 0.3, "train.optim.momentum": 0.8, "train.num_epochs": 2}
    train(tmp_path, changes)
    decayed, *_ = payload_of(tmp_path)["optimizer"]["param_groups"]
    assert max(group["weight_decay"] for group in payload_of(tmp_path)["optimizer"]["param_groups"]) == 0.3
    assert decayed["betas"][0] == 0.8


def test_freezing_on_resume_is_an_error(train, tmp_path):
    train(tmp_path, {"train.num_epochs": 1})
    with pytest.raises(CheckpointError, match="the trained parameters differ") as caught:
        train(tmp_path, {"train.freeze": "[encoder.backbone.blocks.0]"})
    assert "train.freeze" in caught.value.fix


def test_averaging_that_begins_on_resume_starts_from_the_weights(train, payload_of, tmp_path, monkeypatch):
    train(tmp_path, {**FINETUNE, "train.num_epochs": 1, "train.ema_decay": 0})
    start = payload_of(tmp_path)["state_dict"]
    train(tmp_path, {**FINETUNE, "train.ema_decay": 0.999})
    averaged = payload_of(tmp_path)["ema_state_dict"]
    key = "model.blocks.0.attn.qkv.weight"
    assert (averaged[key] - start[key]).abs().max() < 1e-4


def test_a_new_batch_size_on_resume_restarts_the_epoch(train, at_batch, caplog, tmp_path, payload_of):
    changes = {**STEP, "train.optim.lr_scheduler": "cosine", "dataset.val_data_sources": None}
    at_batch(PretrainTask, 8, crash)
    with pytest.raises(Crash):
        train(tmp_path, changes)
    with caplog.at_level(logging.WARNING, "openmae"):
        train(tmp_path, {**changes, "dataset.batch_size": 3})
    assert "(5 batches per epoch, now 7): epoch 2 starts again." in caplog.text
    rates = [row["lr"] for row in read_metrics(tmp_path / "metrics.csv") if row["epoch"] == 2 and "lr" in row]
    assert len(rates) == 7 + 2  # 2 of before the crash
    assert rates[2] == pytest.approx(1e-3)  # the schedule goes by the epoch, not by the count of steps
    assert payload_of(tmp_path)["progress"]["epoch"] == 2


def test_a_new_batch_size_resumes_where_one_of_its_batches_begins(train, at_batch, caplog, tmp_path):
    changes = {**STEP, "dataset.val_data_sources": None}
    at_batch(PretrainTask, 8, crash)
    with pytest.raises(Crash):
        train(tmp_path, changes)
    with caplog.at_level(logging.WARNING, "openmae"):
        train(tmp_path, {**changes, "dataset.batch_size": 2})
    assert "starts again" not in caplog.text
    rates = [row["lr"] for row in read_metrics(tmp_path / "metrics.csv") if row["epoch"] == 2 and "lr" in row]
    assert len(rates) == 2 + 6, "2 batches of 4 images are 4 of the 10 of 2"


def test_metrics_are_returned_and_logged(train, tmp_path):
    metrics = train(tmp_path)
    assert set(metrics) == {"train_loss", "val_loss", "knn_acc", "probe_acc"}
    lines = [json.loads(line) for line in (tmp_path / "status.json").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["STARTED", "RUNNING", "RUNNING", "SUCCESS"]
    assert set(lines[1]["kpi"]) == {*metrics, "images_per_s", "data_wait"}
    assert lines[2]["message"] == "Epoch 2 of 2, step 10"
    counts = [[line[name] for name in ("epoch", "max_epoch", "step", "max_step")] for line in lines[1:3]]
    assert counts == [[0, 1, 5, 10], [1, 1, 10, 10]]
    assert all(re.fullmatch(r"0:00:\d\d(\.\d{6})?", lines[1][name]) for name in ("time_per_epoch", "time_per_step"))
    assert (lines[1]["eta"], lines[2]["eta"]) == (lines[1]["time_per_epoch"], "0:00:00")
    epochs = [row for row in read_metrics(tmp_path / "metrics.csv") if "train_loss_epoch" in row]
    assert [(row["epoch"], row["step"]) for row in epochs] == [(1, 5), (2, 10)]
    assert epochs[1]["val_loss"] == metrics["val_loss"]
    steps = [row for row in read_metrics(tmp_path / "metrics.csv") if "lr" in row]
    assert [row["lr"] for row in steps[:5]] == pytest.approx([1e-3 * n / 5 for n in range(1, 6)])  # warmup
    assert epochs[0]["train_loss_epoch"] == pytest.approx(sum(row["train_loss"] for row in steps[:5]) / 5)


@pytest.mark.parametrize(("most", "logged"), [(5, [1, 2, 3, 4, 5]), (4, [2, 4]), (3, [2, 4]), (1, [5])])
def test_the_rows_of_an_epoch_in_metrics_csv_are_limited(most, logged, train, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "_ROWS_PER_EPOCH", most)
    train(tmp_path, {"train.num_epochs": 1, "dataset.val_data_sources": None})
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows if "train_loss" in row] == logged


def test_validation_every_other_epoch_and_at_the_end(train, tmp_path):
    train(tmp_path, {"train.num_epochs": 3, "train.validation_interval": 2})
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in rows if "val_loss" in row] == [0, 2, 3]


def test_bf16_trains_on_a_cpu(train, payload_of, tmp_path):
    assert train(tmp_path, {"train.precision": "bf16"})["train_loss"] < 1.5
    assert {v.dtype for v in payload_of(tmp_path)["state_dict"].values()} == {torch.float32}


def test_fp16_on_a_cpu_is_fp32(train, assert_same_run, caplog, tmp_path):
    with caplog.at_level(logging.WARNING, "openmae"):
        train(tmp_path / "fp16", {"train.precision": "fp16", "train.num_epochs": 1})
    assert "train.precision=fp16 needs a GPU: using fp32." in caplog.text
    train(tmp_path / "fp32", {"train.num_epochs": 1})
    assert_same_run(tmp_path / "fp16", tmp_path / "fp32")


def test_an_unreadable_newest_checkpoint_costs_one_epoch(train, assert_same_run, caplog, tmp_path):
    train(tmp_path / "whole", {"train.num_epochs": 3})
    folder = tmp_path / "damaged"
    train(folder, {"train.num_epochs": 2})
    one, two = list_checkpoints(folder)
    two.write_bytes(two.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"train\.resume_training_checkpoint_path: .* is truncated or damaged"):
        train(folder, {"train.resume_training_checkpoint_path": two, "train.num_epochs": 3})
    assert two.exists(), "what the request names is not set aside"
    with caplog.at_level(logging.WARNING, "openmae"):
        train(folder, {"train.num_epochs": 3})
    assert f"{two} cannot be read: it is now {two.name}.unreadable, and {one.name} is used." in caplog.text
    assert_same_run(tmp_path / "whole", folder)


@pytest.mark.parametrize("given", ["{}", "${{oc.env:NAMED}}"], ids=["path", "variable"])
def test_a_run_from_a_named_checkpoint_resumes_from_its_own(given, train, at_batch, caplog, monkeypatch, tmp_path):
    train(tmp_path / "first", {"train.num_epochs": 1})
    (named,) = list_checkpoints(tmp_path / "first")
    monkeypatch.setenv("NAMED", str(named))
    resumed_from = given.format(named)
    request = {**STEP, "train.resume_training_checkpoint_path": resumed_from, "train.checkpoint_interval": 1}
    at_batch(PretrainTask, 4, crash)
    with pytest.raises(Crash):
        train(tmp_path / "second", request)
    reached = list_checkpoints(tmp_path / "second")[-1]
    with caplog.at_level(logging.INFO, "openmae"):
        train(tmp_path / "second", request)
    assert f"Resuming from {reached}, after epoch 1, step 8." in caplog.text, "what it had trained is lost"


def test_checkpoints_newer_than_the_named_one_are_set_aside(train, at_batch, payload_of, tmp_path):
    train(tmp_path, {"train.num_epochs": 2})
    one, two = list_checkpoints(tmp_path)
    again = {"train.resume_training_checkpoint_path": one, "train.num_epochs": 3, "train.optim.lr": 5e-3}
    at_batch(PretrainTask, 1, crash)
    with pytest.raises(Crash):
        train(tmp_path, again)
    assert list_checkpoints(tmp_path) == [one]
    assert two.with_name(f"{two.name}.superseded").exists()
    train(tmp_path, {**again, "train.resume_training_checkpoint_path": None})
    assert payload_of(tmp_path)["openmae"]["spec"]["train"]["optim"]["lr"] == 5e-3
    assert [row["epoch"] for row in read_metrics(tmp_path / "metrics.csv") if "train_loss_epoch" in row] == [1, 2, 3]
