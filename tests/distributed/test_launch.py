"""Launching one process or several, and their precision."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch.multiprocessing.spawn import ProcessExitedException

from openmae.actions.plan import make_plan
from openmae.cli.main import main
from openmae.distributed import launch as launch_module
from openmae.distributed.collectives import gather, gather_objects, sum_over_ranks
from openmae.distributed.launch import build_fabric, describe_device, launch
from openmae.distributed.topology import World
from openmae.errors import DataError, Preempted, RunError, SpecError
from openmae.results.metrics_csv import read_metrics
from openmae.spec.load import load_spec
from openmae.storage.printable import counted

several_processes = pytest.mark.xdist_group("several processes")  # one such test at a time: they need the cores


@pytest.fixture
def work(monkeypatch):
    """The module ``two_process_work``, which spawned processes can import too."""
    from tests.helpers import two_process_work

    return two_process_work


@pytest.mark.integration
def test_a_single_process_is_not_started():
    fabric = build_fabric("train", 1, [0], 1)
    assert launch(fabric, lambda fabric, x: (fabric.world_size, x), 7) == (1, 7)
    assert sum_over_ranks(fabric, [1.5, 2.0]) == [1.5, 2.0]
    assert list(gather_objects(fabric, "x")) == ["x"]
    np.testing.assert_array_equal(gather(fabric, [np.arange(2), np.arange(1)]), [0, 1, 0])


@pytest.mark.integration
def test_an_error_of_a_single_process_is_raised():
    def work(fabric):
        raise DataError("rule", "fix")

    with pytest.raises(DataError, match="rule"):
        launch(build_fabric("train", 1, [0], 1), work)


@pytest.mark.integration
@several_processes
@pytest.mark.slow(reason="starts two processes twice")
def test_two_processes_measure_as_one_and_raise_an_error(work, tmp_path):
    with pytest.raises(DataError) as caught:
        launch(build_fabric("train", 2, [0, 1], 1), work.measure_then_fail, tmp_path)
    assert (caught.value.problem, caught.value.fix) == ("the rule and the value", "the fix")
    assert caught.value.exit_code == 2
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "world_size": 2,
        "sums": [3.0, 1.0],
        "objects": ["rank 0", "rank 1"],
        "uneven": [0, 1, 2, 0, 1],
        "indices": [0, 1, 2, 3, 4],
        "labels": [0, 1, 2, 0, 1],
        "threads": 1,
    }


@pytest.mark.integration
@several_processes
@pytest.mark.parametrize("stage", ["pretrain", pytest.param("finetune", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_with_twice_the_batch(stage, train, tiny_overrides, tmp_path, capfd):
    """Gradients are averaged: the losses agree to rounding, and a validation set of 9 counts each image once."""
    changes: dict[str, object] = {"dataset.batch_size": 4, "train.num_epochs": 2}
    if stage == "finetune":  # without what draws at random for each process
        off = dict.fromkeys(("mixup", "cutmix", "mixup_prob"), 0)
        changes |= {f"dataset.augmentation.{name}": value for name, value in off.items()}
        changes |= {"train.stage": stage, "model.drop_path_rate": 0, "train.ema_decay": 0.5}
        changes |= {"model.decoder_depth": None, "model.decoder_embed_dim": None}
    train(tmp_path / "one", changes)
    halves = {**changes, "dataset.batch_size": 2, "train.num_gpus": 2, "train.gpu_ids": "[0,1]"}
    capfd.readouterr()
    assert main(["train", *tiny_overrides(tmp_path / "two", halves)]) == 0
    noise = capfd.readouterr().err
    for chatter in ("Initializing distributed", "distributed_backend", "Warning", "bucket view"):
        assert chatter not in noise
    assert noise.count("Epoch 2 of 2, step 10") == 1
    assert "2 processes of 1 thread," in noise
    one, two = (read_metrics(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 12
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"images_per_s", "data_wait"}:
            assert b[name] == pytest.approx(a[name], rel=2e-3 if "loss" in name else 1e-9), name
    assert two[0]["train_loss"] == pytest.approx(one[0]["train_loss"], rel=1e-6)  # before weights can drift


@pytest.mark.integration
@several_processes
@pytest.mark.slow  # four spawned processes
def test_two_processes_with_deferred_steps_agree_with_two_without(
    work, tiny_overrides, assert_same_run, capfd, tmp_path
):
    """They skip the same step, name the same images, and one of them is profiled."""
    skipped = []
    for name, job in (("immediate", work.train_spoilt), ("deferred", work.train_deferred)):
        changes = {"train.num_gpus": 2, "train.gpu_ids": "[0,1]", "dataset.batch_size": 2, "train.profile": True}
        spec = load_spec(None, tiny_overrides(tmp_path / name, changes), action="train")
        launch(build_fabric("train", 2, [0, 1], 1), job, make_plan(spec, tmp_path / name))
        skipped.append([line for line in capfd.readouterr().err.splitlines() if "skipped" in line])
    assert_same_run(tmp_path / "immediate", tmp_path / "deferred")
    assert skipped[0] == skipped[1]
    assert len(skipped[0]) == 1
    assert skipped[0][0].count(".png") == 2, "only the batch of rank 1 is bad"
    profile = json.loads((tmp_path / "deferred" / "profile.json").read_text())
    assert (profile["processes"], profile["process"], profile["steps"]) == (2, 0, 7)
    assert profile["advice"][-1].startswith("These are the times of process 0")


@pytest.mark.integration
@several_processes
def test_a_preemption_in_a_validation_ends_all_processes(forked, work, tiny_overrides, payload_of, photos, tmp_path):
    changes = {"train.num_gpus": 2, "train.gpu_ids": "[0,1]", "dataset.batch_size": 2, "train.num_epochs": 3}
    changes["dataset.val_data_sources"] = str(photos)
    spec = load_spec(None, tiny_overrides(tmp_path, changes), action="train")
    with pytest.raises(Preempted):
        launch(build_fabric("train", 2, [0, 1], 1), work.train_preempted_in_validation, make_plan(spec, tmp_path))
    progress = payload_of(tmp_path)["progress"]
    assert (progress["epoch"], progress["batch"]) == (0, progress["batches_per_epoch"]), "trained, not validated"


@pytest.mark.integration
@several_processes
@pytest.mark.parametrize(
    ("how", "problem", "fix"),
    [
        ("raise", r"Process 1 failed:\nTraceback[^$]*ZeroDivisionError: by zero", ""),
        ("kill", r"Process 1 was killed \(SIGKILL\)\.", "lower dataset.batch_size"),
    ],
)
def test_the_failed_process_is_reported_not_the_one_that_lost_it(forked, work, how, problem, fix):
    """Process 0 waits for process 1, and loses the connection to it."""
    with pytest.raises(RunError, match=problem) as caught:
        launch(build_fabric("train", 2, [0, 1], 1), work.fail_in_process_1, how)
    assert fix in caught.value.fix


def test_a_process_that_ends_early_is_not_reported_as_out_of_memory():
    error = ProcessExitedException("", error_index=1, error_pid=7, exit_code=1)
    reported = launch_module._failure(error, [None, None], World(per_node=2))
    assert reported.problem == "Process 1 ended with exit code 1 before it began to work."
    assert 'put that line below `if __name__ == "__main__":`' in reported.fix


@pytest.mark.integration
@several_processes
@pytest.mark.slow(reason="starts two processes")
def test_the_scaler_of_fp16_handles_sharded_gradients(work, tmp_path, monkeypatch):
    """The code path of a GPU under fsdp, with the CPU's scaler."""
    monkeypatch.setattr(launch_module, "_possible_precision", lambda *_: "fp16")
    launch(build_fabric("train", 2, [0, 1], 1, "fp16", "fsdp"), work.scale_shared_gradients, tmp_path)
    (norm, moved), (overflowed, kept) = json.loads((tmp_path / "found.json").read_text())
    assert norm == pytest.approx(0.1 * 2 * 20**0.5, rel=1e-2)  # 20 gradients, of two images each
    assert moved == pytest.approx(0.1, rel=1e-2)  # AdamW's first step is lr long
    assert not np.isfinite(overflowed)
    assert kept == 0


@pytest.mark.parametrize(
    ("wanted", "ids", "missing"), [(4, [0, 1, 2, 3], 2), (1, [5], 5), (3, [0], 2)], ids=["too many", "id", "no ids"]
)
def test_missing_gpus_are_an_error(wanted, ids, missing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SpecError) as caught:
        build_fabric("train", wanted, ids, 1)
    assert caught.value.problem == f"train.gpu_ids: this machine has 2 GPUs, counted from 0, got {missing}."
    assert caught.value.fix.startswith(f"Set train.num_gpus={min(wanted, 2)} ")


def test_the_device_is_described(caplog):
    with caplog.at_level(logging.INFO, "openmae"):
        fabric = build_fabric("train", 1, [0], 1, "bf16")
    assert caplog.messages == ["No GPU was found: running on the CPU."]
    assert describe_device(fabric) == f"CPU, {counted(torch.get_num_threads(), 'thread')}, bf16"


def test_fp16_without_a_gpu_becomes_fp32(caplog):
    fabric = build_fabric("train", 1, [0], 1, "fp16")
    assert "train.precision=fp16 needs a GPU: using fp32." in caplog.text
    assert describe_device(fabric).endswith("fp32")


def test_fp16_clips_unscaled_gradients_of_fused_adamw():
    """The code path of a GPU, with the CPU's scaler."""
    fabric = Fabric(accelerator="cpu", plugins=launch_module._precision("fp16", "cpu"))
    inner = torch.nn.Linear(4, 1)
    model, optimizer = fabric.setup(inner, torch.optim.AdamW(inner.parameters(), lr=0.1, fused=True))
    before = inner.weight.detach().clone()
    fabric.backward(model(torch.ones(2, 4)).sum() * 0.1)
    fabric.clip_gradients(model, optimizer, max_norm=0.05)
    assert torch.nn.utils.get_total_norm([p.grad for p in inner.parameters()]).item() == pytest.approx(0.05, rel=1e-3)
    optimizer.step()
    assert (inner.weight - before).abs().max().item() == pytest.approx(0.1, rel=1e-2)  # AdamW's first step is lr long
