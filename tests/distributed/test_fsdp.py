"""fsdp on CPU processes over gloo: same losses, checkpoints that any run reads, other numbers of processes."""

from __future__ import annotations

import pytest
import torch

from openmae.checkpoints.folder import list_checkpoints
from openmae.cli.main import main
from openmae.distributed.launch import _possible_precision
from openmae.errors import SpecError
from openmae.models.blocks import sharded_units
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.models.masking import random_mask
from openmae.results.metrics_csv import read_metrics
from openmae.spec.load import load_spec

several_processes = pytest.mark.xdist_group("several processes")  # one such test at a time: they need the cores

SIZES = {"vit_tiny_patch16": 32, "hiera_tiny_224": 64, "convnextv2_atto": 64}
FSDP = {"dataset.batch_size": 2, "train.num_gpus": 2, "train.distributed_strategy": "fsdp", "train.clip_grad_norm": 0.3}


def _losses(folder):
    return [row["train_loss"] for row in read_metrics(folder / "metrics.csv") if "train_loss" in row]


def _weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def one(train, tmp_path_factory):
    """One process with twice the batch, a checkpoint at every third step."""
    folder = tmp_path_factory.mktemp("one")
    steps = {"train.checkpoint_interval": 3, "train.checkpoint_interval_unit": "step", "train.keep_checkpoints": 9}
    train(folder, {"dataset.batch_size": 4, "train.clip_grad_norm": 0.3, **steps})
    return folder


@pytest.mark.integration
@several_processes
def test_fsdp_trains_as_one_process_and_one_process_resumes(forked, one, train, tiny_overrides, tmp_path, capfd):
    """Half of the run on two processes with sharded weights, half on one that accumulates gradients."""
    overrides = tiny_overrides(
        tmp_path / "two", {**FSDP, "train.stop_after_epoch": 1, "train.activation_checkpointing": True}
    )
    assert main(["train", *overrides]) == 0
    noise = capfd.readouterr().err
    assert "distributed_strategy=fsdp uses fp16, which needs a GPU: using fp32." in noise
    assert "2 processes of 1 thread, fp32, sharded weights (fsdp)" in noise
    assert "Warning" not in noise
    half = _losses(tmp_path / "two")
    assert half == pytest.approx(_losses(one)[:5], rel=2e-3)
    (written,) = list_checkpoints(tmp_path / "two")
    reference = next(path for path in list_checkpoints(one) if "step_00006" in path.name)
    payload, expected = (torch.load(path, weights_only=True) for path in (written, reference))
    assert payload["optimizer"].keys() == expected["optimizer"].keys()
    shapes, whole_shapes = ({n: t.shape for n, t in part["state_dict"].items()} for part in (payload, expected))
    assert shapes == whole_shapes
    moments, whole = payload["optimizer"]["state"], expected["optimizer"]["state"]
    assert {n: s["exp_avg"].shape for n, s in moments.items()} == {n: s["exp_avg"].shape for n, s in whole.items()}

    assert (
        main(["train", *tiny_overrides(tmp_path / "two", {"dataset.batch_size": 2, "train.clip_grad_norm": 0.3})]) == 0
    )
    text = capfd.readouterr().err
    assert "resumes with 1 process instead of 2: its global batch stays 4 (2 images x 2 accumulated batches)" in text
    assert "resumes with other settings" not in text
    assert _losses(tmp_path / "two") == pytest.approx(_losses(one), rel=2e-3)
    newest, last = (_weights(list_checkpoints(folder)[-1]) for folder in (tmp_path / "two", one))
    for name, tensor in newest.items():
        torch.testing.assert_close(tensor, last[name], atol=2e-3, rtol=1e-2)
    # and once more, with more epochs: what the run began with is remembered
    assert main(["train", *tiny_overrides(tmp_path / "two", {"dataset.batch_size": 2, "train.num_epochs": 3})]) == 0
    assert "x 2 accumulated" in capfd.readouterr().err


@several_processes
@pytest.mark.slow(reason="two processes train four epochs")
def test_fsdp_keeps_the_best_between_two_checkpoints(tiny_overrides, tmp_path):
    changes = {"train.checkpoint_interval": 2, "train.optim.monitor_name": "val_loss"}
    assert main(["train", *tiny_overrides(tmp_path, {**FSDP, **changes})]) == 0
    assert len(list_checkpoints(tmp_path)) == 1, "the first epoch is the best so far, and no checkpoint is due"
    assert (tmp_path / "model_best.pth").is_file()


@pytest.mark.slow
@several_processes
def test_fsdp_resumes_in_the_middle_of_an_epoch_of_one_process(one, tiny_overrides, tmp_path, capfd):
    """At the same sample: step 9 of 10, the fifth of five steps of the second epoch being the last."""
    checkpoint = next(path for path in list_checkpoints(one) if "step_00009" in path.name)
    changes = {**FSDP, "train.resume_training_checkpoint_path": checkpoint}
    assert main(["train", *tiny_overrides(tmp_path / "two", changes)]) == 0
    text = capfd.readouterr().err
    assert "after epoch 1, step 9" in text
    assert "starts again" not in text
    (last,) = _losses(tmp_path / "two")
    assert last == pytest.approx(_losses(one)[-1], rel=2e-3)
    rows = [read_metrics(folder / "metrics.csv")[-1] for folder in (tmp_path / "two", one)]
    assert rows[0]["val_loss"] == pytest.approx(rows[1]["val_loss"], rel=1e-3)
    for name, tensor in _weights(list_checkpoints(tmp_path / "two")[-1]).items():
        torch.testing.assert_close(tensor, _weights(list_checkpoints(one)[-1])[name], atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("arch", SIZES)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_trained_weight_gets_a_gradient(arch, stage):
    """So ddp does not have to look for unused parameters."""
    torch.manual_seed(0)
    size = (SIZES[arch], SIZES[arch])
    config = ModelConfig(
        arch, size, decoder_depth=1, decoder_embed_dim=32, mask_ratio=0.5, num_classes=3 if stage == "finetune" else 0
    )
    images = torch.randn(2, 3, *size)
    if stage == "finetune":
        model = build_classifier(config)
        model(images).square().sum().backward()
    else:
        model = build_autoencoder(config)
        mask = random_mask(torch.arange(2), seed=0, epoch=0, num_units=model.num_units, mask_ratio=0.5)
        model(images, mask).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("arch", SIZES)
@pytest.mark.parametrize(("classes", "attention"), [(0, "self"), (0, "cross"), (3, "self")])
def test_every_sharded_unit_is_called(arch, classes, attention):
    """The weights of a unit are gathered in its forward: a unit that is never called would compute with shards."""
    size = (SIZES[arch], SIZES[arch])
    decoder = {"decoder_depth": 2, "decoder_embed_dim": 32, "decoder_attention": attention}
    config = ModelConfig(arch, size, **decoder, mask_ratio=0.5, num_classes=classes)
    if attention == "cross" and config.architecture.family == "convnextv2":
        pytest.skip("it has no such decoder")
    model = build_classifier(config) if classes else build_autoencoder(config)
    units, called = sharded_units(model, config), []
    assert len(units) >= 2
    for unit in units:
        unit.register_forward_hook(lambda unit, *_: called.append(unit))
    images = torch.randn(1, 3, *size)
    if classes:
        model(images)
    else:
        model(images, random_mask(torch.arange(1), seed=0, epoch=0, num_units=model.num_units, mask_ratio=0.5))
    assert {id(unit) for unit in called} == {id(unit) for unit in units}


def test_fsdp_uses_fp16_on_a_gpu_with_a_warning(caplog):
    assert _possible_precision("train", "fp32", sharded=True, on_gpu=True) == "fp16"
    assert "train.distributed_strategy=fsdp uses fp16 or bf16: using fp16 instead of fp32." in caplog.text
    caplog.clear()
    for precision in ("fp16", "bf16"):
        assert _possible_precision("train", precision, sharded=True, on_gpu=True) == precision
    assert not caplog.text


def test_fsdp_with_averaged_weights_is_an_error(tiny_overrides, tmp_path):
    changes = {"train.stage": "finetune", "train.ema_decay": 0.9, "train.distributed_strategy": "fsdp"}
    with pytest.raises(SpecError, match=r"train\.ema_decay.*must be 0 with fsdp, .* got 0\.9\. Set it to 0"):
        load_spec(None, tiny_overrides(tmp_path, changes), action="train")
