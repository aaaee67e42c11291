"""Tests of finding the checkpoint that a run resumes from."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from openmae.checkpoints.folder import CheckpointFolder, list_checkpoints
from openmae.checkpoints.format import read_training_state
from openmae.checkpoints.resume import best_was_set_aside, newest_readable
from openmae.errors import CheckpointError
from openmae.storage import layout
from openmae.storage.encryption import Key


def payload(number: int, part: str = "") -> dict[str, Any]:
    """Return a payload in which a value of ``part`` is NaN or infinite."""
    value = {part: torch.tensor([1.0, float("nan" if number % 2 else "-inf")])}
    good = torch.ones(2)
    return {
        "openmae": {},
        "weights": torch.ones(5000),
        "progress": {"epoch": number, "step": number},
        "state_dict": {"model.a": value.get("state_dict", good), "model.count": torch.tensor(3)},
        "ema_state_dict": {"model.a": value.get("ema_state_dict", good)},
        "optimizer": {"state": {0: {"exp_avg": value.get("optimizer", good)}}, "param_groups": []},
    }


def write(folder: Path, parts: list[str], *, best: str | None = None, key: Key | None = None) -> list[Path]:
    """Write a checkpoint for each of ``parts``, in which that part is not finite; "" for a healthy one."""
    with CheckpointFolder(folder, "vit", keep=9, key=key) as checkpoints:
        for number, part in enumerate(parts, start=1):
            checkpoints.save(payload(number, part), number, number)
        if best is not None:
            checkpoints.save_best(payload(1, best))
    return list_checkpoints(folder)


@pytest.mark.parametrize("part", ["state_dict", "ema_state_dict", "optimizer"])
@pytest.mark.parametrize("key", [None, Key(b"k")], ids=["plain", "encrypted"])
def test_non_finite_checkpoints_are_set_aside(part, key, tmp_path, caplog):
    one, two, three = write(tmp_path, ["", part, part], best=part, key=key)
    with caplog.at_level(logging.WARNING, "openmae"):
        found = newest_readable(tmp_path, key)
    assert found is not None
    assert found[0] == one
    assert list_checkpoints(tmp_path) == [one]
    assert caplog.messages == [
        f"{three} holds weights that are not finite: it is now {three.name}.diverged, and {one.name} is used.",
        f"{two} holds weights that are not finite: it is now {two.name}.diverged, and {one.name} is used.",
        f"{tmp_path / layout.BEST} holds weights that are not finite: it is now {layout.BEST}.diverged, "
        "and the next epoch replaces it.",
    ]
    assert best_was_set_aside(tmp_path)


def test_best_checkpoint_is_the_last_resort(tmp_path):
    write(tmp_path, ["state_dict", "state_dict"], best="")
    found = newest_readable(tmp_path)
    assert found is not None
    assert found[0] == tmp_path / layout.BEST
    assert not list_checkpoints(tmp_path)
    again = newest_readable(tmp_path)
    assert again is not None, "a run killed before its next checkpoint starts from the beginning"
    assert again[0] == tmp_path / layout.BEST


def test_training_starts_from_the_beginning_if_no_checkpoint_is_finite(tmp_path, caplog):
    *_, newest = write(tmp_path, ["state_dict", "state_dict"], best="state_dict")
    with caplog.at_level(logging.WARNING, "openmae"):
        assert newest_readable(tmp_path) is None
    assert f"it is now {newest.name}.diverged, and training starts from the beginning." in caplog.text
    assert not list_checkpoints(tmp_path)
    assert not (tmp_path / layout.BEST).exists()
    assert newest_readable(tmp_path) is None


def test_nothing_is_renamed_if_some_are_unreadable_and_none_is_finite(tmp_path):
    one, two = write(tmp_path, ["", "state_dict"])
    one.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=f"{one.name} is not a PyTorch checkpoint"):
        newest_readable(tmp_path)
    assert list_checkpoints(tmp_path) == [one, two]


def test_best_checkpoint_without_a_run_is_not_resumed(tmp_path):
    write(tmp_path, [], best="")
    assert newest_readable(tmp_path) is None


def test_sharded_checkpoint_of_an_earlier_version_is_named(tmp_path):
    (tmp_path / "model_epoch_000_step_00006.shards").mkdir()
    write(tmp_path, [""])
    shards = tmp_path / "model_epoch_002_step_00006.shards"
    assert newest_readable(tmp_path) is not None, "an older sharded checkpoint is ignored"
    shards.mkdir()
    for resume in (newest_readable, read_training_state):
        with pytest.raises(CheckpointError, match="is a sharded checkpoint of an earlier version") as caught:
            resume(tmp_path if resume is newest_readable else shards)
        assert str(shards) in caught.value.problem
        assert f"mae checkpoint consolidate {shards}" in caught.value.fix


def test_transient_disk_error_sets_nothing_aside(tmp_path, monkeypatch):
    write(tmp_path, ["", ""])
    before = sorted(os.listdir(tmp_path))

    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("torch.load", fail)
    with pytest.raises(OSError, match="Input/output error"):
        newest_readable(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def spoil(path: Path) -> None:
    """Damage a checkpoint as an earlier version did after a step with non-finite gradients."""
    content = torch.load(path, weights_only=True)
    for value in content["state_dict"].values():
        value.fill_(float("nan"))
    path.unlink()  # the best is a link to it
    torch.save(content, path)


@pytest.mark.integration
def test_run_broken_by_an_earlier_version_is_resumed(train, payload_of, tmp_path):
    folder = tmp_path / "broken"
    train(folder, {"train.num_epochs": 3})
    for path in (*list_checkpoints(folder)[1:], folder / layout.BEST):
        spoil(path)
    train(folder, {"train.num_epochs": 3})
    train(tmp_path / "whole", {"train.num_epochs": 3})
    whole = payload_of(tmp_path / "whole")
    for name, value in payload_of(folder)["state_dict"].items():
        assert torch.equal(value, whole["state_dict"][name])
    best = torch.load(folder / layout.BEST, weights_only=True)
    assert all(bool(value.isfinite().all()) for value in best["state_dict"].values())


@pytest.mark.integration
def test_named_checkpoint_must_be_finite(train, tmp_path):
    train(tmp_path / "first", {"train.num_epochs": 1})
    (named,) = list_checkpoints(tmp_path / "first")
    spoil(named)
    with pytest.raises(CheckpointError) as caught:
        train(tmp_path / "second", {"train.resume_training_checkpoint_path": named})
    assert str(named) in caught.value.problem
    assert caught.value.problem.startswith("train.resume_training_checkpoint_path: ")
    assert "has non-finite values (state_dict.model." in caught.value.problem
    assert caught.value.fix.startswith("Resume from an older checkpoint")
    assert named.exists()


def damage(path: Path, *, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at < 0 else at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut off", "a bit has changed", "empty"])
@pytest.mark.parametrize("key", [None, Key(b"k")], ids=["plain", "encrypted"])
def test_unreadable_newest_checkpoints_are_set_aside(how, key, tmp_path, caplog):
    one, two, three = write(tmp_path, [""] * 3, key=key)
    for path in (two, three):
        if how == "a bit has changed":
            damage(path)
        else:
            path.write_bytes(path.read_bytes()[: 700 if how == "cut off" else 0])
    with caplog.at_level(logging.WARNING, "openmae"):
        found = newest_readable(tmp_path, key)
    assert found is not None
    assert (found[0], found[1]["progress"]["step"]) == (one, 1)
    assert sorted(os.listdir(tmp_path)) == [
        "model_epoch_001_step_00001.pth",
        "model_epoch_002_step_00002.pth.unreadable",
        "model_epoch_003_step_00003.pth.unreadable",
        "vit_latest.pth",
    ]
    message = f"{three} cannot be read: it is now {three.name}.unreadable, and {one.name} is used."
    assert message in caplog.messages


def test_nothing_is_renamed_if_no_checkpoint_can_be_read(tmp_path):
    for path in write(tmp_path, [""] * 3):
        damage(path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=r"model_epoch_003_step_00003\.pth is truncated or damaged"):
        newest_readable(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("key", [None, Key(b"another")])
def test_wrong_key_sets_nothing_aside(tmp_path, key):
    write(tmp_path, [""] * 3, key=Key(b"k"))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=r"encryption_key|there is no key"):
        newest_readable(tmp_path, key)
    assert sorted(os.listdir(tmp_path)) == before
