"""What a run resumes from: the newest checkpoint that can be read and whose values are finite."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from openmae.checkpoints.folder import CheckpointFolder, list_checkpoints
from openmae.errors import CheckpointError
from openmae.storage import layout
from openmae.storage.encryption import Key
from openmae.training.resume import best_was_set_aside, newest_readable


def payload(number: int, part: str = "") -> dict[str, Any]:
    """A payload in which a value of ``part`` is NaN or infinite."""
    value = {part: torch.tensor([1.0, float("nan" if number % 2 else "-inf")])}
    good = torch.ones(2)
    return {
        "openmae": {},
        "progress": {"epoch": number, "step": number},
        "state_dict": {"model.a": value.get("state_dict", good), "model.count": torch.tensor(3)},
        "ema_state_dict": {"model.a": value.get("ema_state_dict", good)},
        "optimizer": {"state": {0: {"exp_avg": value.get("optimizer", good)}}, "param_groups": []},
    }


def write(folder: Path, parts: list[str], *, best: str | None = None, key: Key | None = None) -> list[Path]:
    """A checkpoint for each of ``parts``, in which that part is not finite; an empty name is a good one."""
    with CheckpointFolder(folder, "vit", keep=9, key=key) as checkpoints:
        for number, part in enumerate(parts, start=1):
            checkpoints.save(payload(number, part), number, number)
        if best is not None:
            checkpoints.save_best(payload(1, best))
    return list_checkpoints(folder)


@pytest.mark.parametrize("part", ["state_dict", "ema_state_dict", "optimizer"])
@pytest.mark.parametrize("key", [None, Key(b"k")], ids=["plain", "encrypted"])
def test_what_is_not_finite_is_set_aside(part, key, tmp_path, caplog):
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
        "and the next epoch's takes its place.",
    ]
    assert best_was_set_aside(tmp_path)


def test_the_best_is_the_last_resort(tmp_path):
    write(tmp_path, ["state_dict", "state_dict"], best="")
    found = newest_readable(tmp_path)
    assert found is not None
    assert found[0] == tmp_path / layout.BEST
    assert not list_checkpoints(tmp_path)
    again = newest_readable(tmp_path)
    assert again is not None, "a run killed before its next checkpoint starts from the beginning"
    assert again[0] == tmp_path / layout.BEST


def test_where_none_is_finite_training_starts_from_the_beginning(tmp_path, caplog):
    *_, newest = write(tmp_path, ["state_dict", "state_dict"], best="state_dict")
    with caplog.at_level(logging.WARNING, "openmae"):
        assert newest_readable(tmp_path) is None
    assert f"it is now {newest.name}.diverged, and training starts from the beginning." in caplog.text
    assert not list_checkpoints(tmp_path)
    assert not (tmp_path / layout.BEST).exists()
    assert newest_readable(tmp_path) is None


def test_where_some_cannot_be_read_and_none_is_finite_nothing_is_touched(tmp_path):
    one, two = write(tmp_path, ["", "state_dict"])
    one.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=f"{one.name} cannot be read"):
        newest_readable(tmp_path)
    assert list_checkpoints(tmp_path) == [one, two]


def test_a_best_without_a_run_is_not_resumed(tmp_path):
    write(tmp_path, [], best="")
    assert newest_readable(tmp_path) is None


def spoil(path: Path) -> None:
    """As an older version wrote it after a step with gradients that were not finite."""
    content = torch.load(path, weights_only=True)
    for value in content["state_dict"].values():
        value.fill_(float("nan"))
    path.unlink()  # the best is a link to it
    torch.save(content, path)


def test_a_run_that_an_older_version_broke_is_resumed(train, payload_of, tmp_path):
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


def test_a_named_checkpoint_must_be_finite(train, tmp_path):
    train(tmp_path / "first", {"train.num_epochs": 1})
    (named,) = list_checkpoints(tmp_path / "first")
    spoil(named)
    with pytest.raises(CheckpointError) as caught:
        train(tmp_path / "second", {"train.resume_training_checkpoint_path": named})
    assert str(named) in caught.value.problem
    assert caught.value.problem.startswith("train.resume_training_checkpoint_path: ")
    assert "holds values that are not finite (state_dict.model." in caught.value.problem
    assert caught.value.fix.startswith("Resume from an older checkpoint")
    assert named.exists()
