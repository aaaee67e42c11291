"""``train.profile``: what it leaves, after a whole run, a cut one and one that is too short."""

from __future__ import annotations

import json
import signal

import pytest

from openmae.cli.main import main
from openmae.distributed.launch import acting_precision
from openmae.training.pretrain import PretrainTask

pytestmark = pytest.mark.xdist_group("actions")


@pytest.fixture
def command(trained, tmp_path):
    """A pretraining of two steps an epoch, profiled."""
    drop = ("results_dir=", "train.num_epochs=")
    overrides = [o for o in trained("vit", "pretrain").overrides if not o.startswith(drop)]
    return ["train", *overrides, f"results_dir={tmp_path}", "train.profile=true"]


def test_profile(command, tmp_path, capsys):
    assert main([*command, "train.num_epochs=4"]) == 0
    text = capsys.readouterr().err
    assert "\nProfile\n" in text
    assert "5 steps after 3 of warm-up" in text
    profile = json.loads((tmp_path / "train" / "profile.json").read_text())
    assert profile["steps"] == 5  # of 8
    assert list(profile["phases"])[:5] == ["data wait", "host to device", "forward", "backward", "optimizer"]
    for name in ("forward", "backward", "optimizer", "data wait", "validation", "checkpoints"):
        assert profile["phases"][name]["seconds"] > 0, name
    assert sum(phase["share"] for phase in profile["phases"].values()) == pytest.approx(1)
    assert profile["keys"]["model.decoder_attention"] == "self", "which could make its decoder faster"
    assert profile["keys"]["train.optim.monitor_name"] == "val_loss"
    assert "limits the speed of this run" in profile["advice"][0]
    assert " ".join(profile["advice"][0].split()) in " ".join(text.split())
    html = (tmp_path / "train" / "report.html").read_text()
    assert "<h2>Profile</h2>" in html
    assert "95th percentile" in html
    assert profile["advice"][0] in html
    assert html.count("<img") == 4, "curves, reconstructions, their progress, and the profile"


@pytest.mark.parametrize(
    ("precision", "sharded", "on_gpu", "acting"),
    [
        ("bf16", False, True, "bf16"),
        ("fp16", False, True, "fp16"),
        ("fp16", False, False, "fp32"),
        ("fp32", True, True, "fp16"),
        ("fp32", True, False, "fp32"),
        ("fp16", True, False, "fp32"),
        ("bf16", True, True, "bf16"),
        ("bf16", True, False, "bf16"),
    ],
)
def test_the_reported_precision_is_the_actual_one(precision, sharded, on_gpu, acting):
    assert acting_precision(precision, sharded, on_gpu) == acting


def test_an_interrupted_run_writes_its_profile_and_resumes_without(command, monkeypatch, tmp_path, capsys):
    original, calls = PretrainTask.training_loss, []

    def training_loss(task, *arguments):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return original(task, *arguments)

    monkeypatch.setattr(PretrainTask, "training_loss", training_loss)
    assert main([*command, "train.num_epochs=3"]) == 130
    assert json.loads((tmp_path / "train" / "profile.json").read_text())["steps"] == 1
    capsys.readouterr()
    assert main([*command, "train.num_epochs=3", "train.profile=false"]) == 0
    text = capsys.readouterr().err
    assert "other settings" not in text
    assert "\nProfile\n" not in text
    assert "<h2>Profile</h2>" not in (tmp_path / "train" / "report.html").read_text()


def test_a_run_too_short_to_profile(command, tmp_path, capsys):
    assert main([*command, "train.num_epochs=1"]) == 0
    assert "nothing was measured, since the run ended within the 3 warmup steps" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "train" / "profile.json").exists()
