"""Checkpoints on disk: whole or not at all, rotated, found again."""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from openmae.cli import main
from openmae.errors import CheckpointError, RunError
from openmae.training.checkpoints import (
    CheckpointFolder,
    list_checkpoints,
    newest_checkpoint,
    read_training_state,
    write_checkpoint,
)

PAYLOAD = {"openmae": {"stage": "pretrain"}, "progress": {"epoch": 1}, "optimizer": {}, "x": torch.arange(3)}


def payload(number: int) -> dict:
    return {**PAYLOAD, "number": number}


def number_in(path: Path) -> int:
    return torch.load(path, weights_only=True)["number"]


@contextmanager
def largest_file(size: int):
    """A disk on which no file can grow past ``size`` bytes; Python ignores the signal that tells of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_names_link_and_rotation(tmp_path):
    folder = CheckpointFolder(tmp_path, "vit", keep=2)
    for epoch in range(1, 4):
        folder.save(payload(epoch), epoch, 10 * epoch)
    assert names(tmp_path) == ["model_epoch_002_step_00020.pth", "model_epoch_003_step_00030.pth", "vit_latest.pth"]
    assert os.readlink(tmp_path / "vit_latest.pth") == "model_epoch_003_step_00030.pth"
    assert number_in(tmp_path / "vit_latest.pth") == 3
    assert newest_checkpoint(tmp_path) == tmp_path / "model_epoch_003_step_00030.pth"


def test_the_newest_is_by_number_not_by_name(tmp_path):
    folder = CheckpointFolder(tmp_path, "vit", keep=9)
    for epoch, step in [(1000, 5), (999, 7), (1000, 100_000), (2, 9)]:
        folder.save(payload(0), epoch, step)
    (tmp_path / "model_epoch_9999_step_x.pth").touch()
    assert [path.stem for path in list_checkpoints(tmp_path)] == [
        "model_epoch_002_step_00009",
        "model_epoch_999_step_00007",
        "model_epoch_1000_step_00005",
        "model_epoch_1000_step_100000",
    ]


def test_an_empty_or_missing_folder_has_none(tmp_path):
    assert newest_checkpoint(tmp_path) is newest_checkpoint(tmp_path / "no") is None


def test_rotation_spares_what_was_just_written(tmp_path):
    """A run that resumed from an older checkpoint writes below the newer ones."""
    folder = CheckpointFolder(tmp_path, "vit", keep=1)
    folder.save(payload(5), 5, 50)
    written = folder.save(payload(3), 3, 30)
    assert written.exists()
    assert number_in(folder.latest) == 3


def test_the_best_outlives_rotation(tmp_path):
    folder = CheckpointFolder(tmp_path, "vit", keep=1)
    folder.save_best(payload(1), folder.save(payload(1), 1, 1))
    folder.save(payload(2), 2, 2)
    assert number_in(tmp_path / "model_best.pth") == 1
    assert names(tmp_path) == ["model_best.pth", "model_epoch_002_step_00002.pth", "vit_latest.pth"]


def test_the_best_without_a_checkpoint_of_its_own(tmp_path):
    CheckpointFolder(tmp_path, "vit", keep=1).save_best(payload(4), None)
    assert number_in(tmp_path / "model_best.pth") == 4


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    folder = CheckpointFolder(tmp_path, "vit", keep=1)
    folder.save_best(payload(1), folder.save(payload(1), 1, 1))
    assert [number_in(tmp_path / name) for name in names(tmp_path)] == [1, 1, 1]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path, "vit", keep=1)
    folder.save({**payload(1), "weights": torch.zeros(1000)}, 1, 1)
    before = names(tmp_path)
    with largest_file(100_000), pytest.raises(RunError) as caught:
        folder.save({**payload(2), "weights": torch.zeros(100_000)}, 2, 2)
    assert caught.value.problem == (
        "The checkpoint model_epoch_002_step_00002.pth could not be written (File too large)."
    )
    assert caught.value.fix == (
        f"Free space in {tmp_path}, or lower train.keep_checkpoints. "
        "model_epoch_001_step_00001.pth is intact: the same command resumes from it."
    )
    assert names(tmp_path) == before
    assert number_in(folder.latest) == 1


def test_a_read_only_folder(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(RunError, match=r"model_epoch_001_step_00001\.pth could not be written \(Permission denied\)"):
        CheckpointFolder(tmp_path, "vit", 1).save(payload(1), 1, 1)


def test_what_a_killed_run_left_is_written_over(tmp_path):
    (tmp_path / ".a.pth.tmp").write_text("half a checkpoint")
    write_checkpoint(PAYLOAD, tmp_path / "a.pth")
    assert names(tmp_path) == ["a.pth"]


def test_a_full_disk_during_training_exits_1(train, tiny_overrides, payload_of, tmp_path, capsys):
    unwatched = {"dataset.val_data_sources": None}
    train(tmp_path, {**unwatched, "train.num_epochs": 1})
    before = {path.name: path.read_bytes()[:1000] for path in tmp_path.glob("*.pth")}
    longer = {**unwatched, "train.num_epochs": 3}
    with largest_file(10_000_000):
        assert main(["train", *tiny_overrides(tmp_path, longer)]) == 1
    assert "model_epoch_002_step_00010.pth could not be written (File too large)." in capsys.readouterr().err
    assert {path.name: path.read_bytes()[:1000] for path in tmp_path.glob("*.pth")} == before
    assert list(tmp_path.glob(".*")) == []
    train(tmp_path, longer)
    assert payload_of(tmp_path)["progress"]["epoch"] == 3
    for path in tmp_path.glob("*.pth"):
        assert {"openmae", "state_dict"} <= torch.load(path, weights_only=True).keys()


def test_resuming_from_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no file '.*/no\.pth'") as caught:
        read_training_state(tmp_path / "no.pth")
    assert "leave the key empty to resume from the newest" in caught.value.fix


@pytest.mark.parametrize("lazily", [False, True])
def test_resuming_from_a_truncated_file(tmp_path, lazily):
    path = tmp_path / "model_epoch_001_step_00001.pth"
    write_checkpoint(PAYLOAD, path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint .* truncated or foreign") as caught:
        read_training_state(path, lazily=lazily)
    assert "older model_epoch_*.pth" in caught.value.fix


def test_resuming_from_weights_alone(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no training state") as caught:
        read_training_state(tmp_path / "w.pth")
    assert "train.pretrained_model_path" in caught.value.fix


def test_resuming_reads_the_payload(tmp_path):
    write_checkpoint(PAYLOAD, tmp_path / "a.pth")
    state = read_training_state(tmp_path / "a.pth")
    assert torch.equal(state["x"], torch.arange(3))
    assert state["progress"] == {"epoch": 1}
