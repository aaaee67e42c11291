"""Tests of the checkpoint folder: complete files, rotation, links, best."""

from __future__ import annotations

import logging
import os
import resource
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from openmae.checkpoints import folder as checkpoints_module
from openmae.checkpoints.folder import CheckpointFolder, list_checkpoints
from openmae.checkpoints.resume import newest_checkpoint
from openmae.cli.main import main
from openmae.errors import RunError, StoppedAtOnce
from openmae.storage.encryption import Key

PAYLOAD = {"openmae": {"stage": "pretrain"}, "progress": {"epoch": 1}, "optimizer": {}, "x": torch.arange(3)}


def payload(number: int) -> dict:
    return {**PAYLOAD, "number": number}


def number_in(path: Path) -> int:
    return torch.load(path, weights_only=True)["number"]


@contextmanager
def largest_file(size: int):
    """Limit the size of files, as a full disk does; Python ignores the signal that reports it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_names_link_and_rotation(tmp_path):
    with CheckpointFolder(tmp_path, "vit", keep=2) as folder:
        for epoch in range(1, 4):
            folder.save(payload(epoch), epoch, 10 * epoch)
    assert names(tmp_path) == ["model_epoch_002_step_00020.pth", "model_epoch_003_step_00030.pth", "vit_latest.pth"]
    assert os.readlink(tmp_path / "vit_latest.pth") == "model_epoch_003_step_00030.pth"
    assert number_in(tmp_path / "vit_latest.pth") == 3
    assert newest_checkpoint(tmp_path) == tmp_path / "model_epoch_003_step_00030.pth"


def test_checkpoints_are_ordered_by_number(tmp_path):
    with CheckpointFolder(tmp_path, "vit", keep=9) as folder:
        for epoch, step in [(1000, 5), (999, 7), (1000, 100_000), (2, 9)]:
            folder.save(payload(0), epoch, step)
    (tmp_path / "model_epoch_9999_step_x.pth").touch()
    assert [path.stem for path in list_checkpoints(tmp_path)] == [
        "model_epoch_002_step_00009",
        "model_epoch_999_step_00007",
        "model_epoch_1000_step_00005",
        "model_epoch_1000_step_100000",
    ]


def test_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is newest_checkpoint(tmp_path / "no") is None


def test_rotation_keeps_the_checkpoint_just_written(tmp_path):
    with CheckpointFolder(tmp_path, "vit", keep=1) as folder:
        folder.save(payload(5), 5, 50)
        written = folder.save(payload(3), 3, 30)
    assert written.exists()
    assert number_in(folder.latest) == 3


def test_best_checkpoint_survives_rotation(tmp_path):
    with CheckpointFolder(tmp_path, "vit", keep=1) as folder:
        folder.save(payload(1), 1, 1, best=True)
        folder.save(payload(2), 2, 2)
    assert number_in(tmp_path / "model_best.pth") == 1
    assert names(tmp_path) == ["model_best.pth", "model_epoch_002_step_00002.pth", "vit_latest.pth"]


def test_best_checkpoint_can_be_written_alone(tmp_path):
    with CheckpointFolder(tmp_path, "vit", keep=1) as folder:
        folder.save_best(payload(4))
    assert number_in(tmp_path / "model_best.pth") == 4
    assert names(tmp_path) == ["model_best.pth"]


def test_best_checkpoint_is_renamed_before_the_numbered_one(tmp_path, monkeypatch):
    """A run may be killed between any two renames."""
    renamed = []
    replace = os.replace

    def noting(source, target):
        renamed.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr("os.replace", noting)
    with CheckpointFolder(tmp_path, "vit", keep=1) as folder:
        folder.save(payload(1), 1, 1, best=True)
    assert renamed == ["model_best.pth", "model_epoch_001_step_00001.pth", "vit_latest.pth"]


def test_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    with CheckpointFolder(tmp_path, "vit", keep=1) as folder:
        folder.save(payload(1), 1, 1, best=True)
    assert [number_in(tmp_path / name) for name in names(tmp_path)] == [1, 1, 1]


def test_training_continues_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The second checkpoint waits until the first is written."""
    go, began = threading.Event(), []
    save = torch.save

    def slow(*arguments):
        began.append(threading.current_thread().name)
        assert go.wait(30)
        save(*arguments)

    monkeypatch.setattr("torch.save", slow)
    with CheckpointFolder(tmp_path, "vit", keep=2) as folder:
        folder.save(payload(1), 1, 1)
        assert names(tmp_path) in ([], [".model_epoch_001_step_00001.pth.tmp"])
        threading.Timer(0.2, go.set).start()
        folder.save(payload(2), 2, 2)
        assert go.is_set(), "the second did not wait for the first"
        assert "model_epoch_001_step_00001.pth" in names(tmp_path)
    assert number_in(folder.latest) == 2
    assert began == ["openmae-checkpoint"] * 2


def test_failed_write_does_not_hide_another_error(tmp_path, caplog):
    def write_and_fail():
        with CheckpointFolder(tmp_path, "vit", keep=1) as folder:
            folder.save({**payload(1), "weights": torch.zeros(100_000)}, 1, 1)
            raise KeyboardInterrupt

    with largest_file(100_000), pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert "model_epoch_001_step_00001.pth could not be written (File too large)." in caplog.text


def test_full_disk_leaves_the_previous_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path, "vit", keep=1)
    folder.save({**payload(1), "weights": torch.zeros(1000)}, 1, 1)
    folder.wait()
    before = names(tmp_path)
    with largest_file(100_000):
        folder.save({**payload(2), "weights": torch.zeros(100_000)}, 2, 2)
        with pytest.raises(RunError) as caught:
            folder.wait()
    assert caught.value.problem == (
        "The checkpoint model_epoch_002_step_00002.pth could not be written (File too large)."
    )
    assert caught.value.fix == (
        f"Free space in {tmp_path}, or lower train.keep_checkpoints. "
        "model_epoch_001_step_00001.pth is intact: the same command resumes from it."
    )
    assert names(tmp_path) == before
    assert number_in(folder.latest) == 1


def test_read_only_folder(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    folder = CheckpointFolder(tmp_path, "vit", 1)
    folder.save(payload(1), 1, 1)
    with pytest.raises(RunError, match=r"model_epoch_001_step_00001\.pth could not be written \(Permission denied\)"):
        folder.wait()


def test_leftover_of_a_killed_run_is_overwritten(tmp_path):
    (tmp_path / ".model_epoch_001_step_00001.pth.tmp").write_text("half a checkpoint")
    with CheckpointFolder(tmp_path, "vit", keep=1) as folder:
        folder.save(PAYLOAD, 1, 1)
    assert names(tmp_path) == ["model_epoch_001_step_00001.pth", "vit_latest.pth"]


@pytest.mark.integration
def test_full_disk_during_training_exits_1(train, tiny_overrides, payload_of, tmp_path, capsys):
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


def three(folder: Path, key: Key | None = None) -> list[Path]:
    """Write three checkpoints, and return them oldest first."""
    with CheckpointFolder(folder, "vit", keep=3, key=key) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save({**payload(number), "weights": torch.ones(5000)}, number, number)
    return list_checkpoints(folder)


def test_resuming_from_an_older_checkpoint_sets_newer_ones_aside(tmp_path, caplog):
    one, two, three_ = three(tmp_path)
    folder = CheckpointFolder(tmp_path, "vit", keep=3)
    folder.resume_from(3, 3)
    assert list_checkpoints(tmp_path) == [one, two, three_]
    with caplog.at_level(logging.WARNING, "openmae"):
        folder.resume_from(1, 1)
    assert list_checkpoints(tmp_path) == [one]
    assert number_in(folder.latest) == 1
    assert f"The run resumes from epoch 1, step 1: newer checkpoints in {tmp_path} are set aside as" in caplog.text
    assert f"*.superseded ({two.name}, {three_.name})." in caplog.text


def test_link_to_a_checkpoint_set_aside_is_removed(tmp_path):
    three(tmp_path)
    folder = CheckpointFolder(tmp_path, "vit", keep=3)
    folder.resume_from(0, 1)
    assert not folder.latest.is_symlink()


def test_run_that_stops_at_once_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints_module, "_STOP_SECONDS", 0.05)
    begun, release = threading.Event(), threading.Event()

    def hanging(content, path, key):
        begun.set()
        release.wait()
        path.touch()

    monkeypatch.setattr(checkpoints_module, "write_checkpoint", hanging)
    folder = CheckpointFolder(tmp_path, "vit", keep=3)
    with folder:
        folder.save(payload(1), 1, 1)
        assert begun.wait(30)
        folder.__exit__(StoppedAtOnce, StoppedAtOnce(), None)
        assert not release.is_set(), "it did not wait"
        release.set()
