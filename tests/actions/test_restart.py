"""``mae train --restart``: a new run begins, and the earlier one is kept."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

import openmae
from openmae.actions import restart
from openmae.actions.run import running
from openmae.checkpoints.folder import list_checkpoints
from openmae.cli.main import main
from openmae.data.open import open_index
from openmae.results.status import read_status
from openmae.spec.load import load_spec
from openmae.storage.lock import FolderLock

from .conftest import train_arguments

pytestmark = pytest.mark.xdist_group("actions")


@pytest.fixture
def arguments(photos, tmp_path):
    """A short pretraining run whose results are not used by other tests."""
    return [*train_arguments(photos, "vit", "pretrain"), f"results_dir={tmp_path}"]


@pytest.fixture
def earlier(trained, tmp_path):
    """The folder of a run with these arguments that has finished."""
    return shutil.copytree(trained("vit", "pretrain").folder, tmp_path / "train", symlinks=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "status.json"}


def test_a_new_run_begins_and_the_earlier_one_is_kept(arguments, earlier, tmp_path, capsys):
    before = contents(earlier)
    capsys.readouterr()
    assert main(["train", *arguments, "--restart", "model.mask_ratio=0.5"]) == 0
    (aside,) = (path for path in tmp_path.iterdir() if path != earlier)
    assert re.fullmatch(r"train-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d", aside.name)
    assert f"The earlier run is kept in {aside}." in capsys.readouterr().err
    assert contents(aside) == before
    assert not any(path.name.startswith(".") for folder in (aside, earlier) for path in folder.iterdir())
    assert yaml.safe_load((earlier / "experiment.yaml").read_text())["model"]["mask_ratio"] == 0.5
    assert [line["status"] for line in read_status(earlier / "status.json")] == ["STARTED", "RUNNING", "SUCCESS"]
    last = read_status(aside / "status.json")[-1]
    assert (last["status"], last["message"]) == (
        "SKIPPED",
        f"A new run began in {earlier}, and this one is kept here.",
    )


def test_the_kept_run_is_not_read_as_images(arguments, earlier, tmp_path, photos):
    assert main(["train", *arguments, "--restart"]) == 0
    for path in photos.plain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = open_index(str(tmp_path), None)
    assert len(index.paths) == len(list(photos.plain.iterdir()))
    assert len(index.results) == 2


def test_two_restarts_in_a_second_keep_both_runs(arguments, earlier, tmp_path, monkeypatch):
    class Clock(restart.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 11, 30, 14, 5, 9)

    monkeypatch.setattr(restart, "datetime", Clock)
    for _ in range(2):
        openmae.train({}, arguments, restart=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"train", "train-2026-11-30T14-05-09", "train-2026-11-30T14-05-10"}


def test_without_an_earlier_run_nothing_is_renamed(arguments, tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("mine")
    assert main(["train", *arguments, "--restart"]) == 0
    assert f"--restart: there is no earlier run in {tmp_path / 'train'}." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    assert (tmp_path / "train" / "notes.txt").exists()


def test_a_running_run_is_not_renamed(arguments, earlier, tmp_path, refused, capsys, monkeypatch):
    monkeypatch.setattr("openmae.storage.lock.GRACE", 0.0)
    capsys.readouterr()
    with FolderLock(earlier, "results_dir"):
        assert "another run is writing to" in refused("train", [*arguments, "--restart"])
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_invalid_input_renames_nothing(arguments, earlier, tmp_path, refused, capsys):
    before = contents(earlier)
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    refused("train", [*arguments, "--restart", f"dataset.train_data_sources={tmp_path / 'empty'}"])
    assert {path.name for path in tmp_path.iterdir()} == {"train", "empty"}
    assert contents(earlier) == before


def test_only_the_leading_process_renames(arguments, earlier, tmp_path, monkeypatch):
    """Another process ignores the earlier run, wherever its folder is at that moment."""
    spec = load_spec(None, arguments, action="train")
    monkeypatch.setattr("openmae.actions.run._apply_topology", lambda spec, _: (spec, Follower()))

    class Follower:
        leads = False

    seen = []
    monkeypatch.setattr("openmae.actions.train.launch", lambda fabric, work, plan: seen.append(plan) or 1 / 0)
    from openmae.actions import train

    with pytest.raises(ZeroDivisionError):
        train.run(spec, restart=True)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    assert (seen[0].resume, seen[0].epochs_done) == (None, 0)


@pytest.mark.parametrize(
    ("overrides", "problem", "fix"),
    [
        (
            ["results_dir=s3://bucket/runs"],
            "--restart renames the results folder, but s3://bucket/runs/train is in an object store.",
            "Set another results_dir, or rename the folder with the tools of the store.",
        ),
        (
            ["train.resume_training_checkpoint_path={checkpoint}"],
            "--restart begins a new run, but train.resume_training_checkpoint_path names a checkpoint to resume from.",
            "Remove one of the two",
        ),
        (
            ["train.pretrained_model_path={checkpoint}"],
            "but the new run needs what is there: train.pretrained_model_path is {checkpoint}.",
            "Move or copy that elsewhere, or set another results_dir.",
        ),
        (
            ["dataset.val_data_sources={folder}/held_out"],
            "but the new run needs what is there: dataset.val_data_sources is {folder}/held_out.",
            "Move or copy that elsewhere",
        ),
    ],
)
def test_what_cannot_be_renamed_is_refused(overrides, problem, fix, arguments, earlier, refused, capsys):
    values = {"checkpoint": list_checkpoints(earlier)[-1], "folder": earlier}
    (earlier / "held_out").mkdir()
    capsys.readouterr()
    text = refused("train", [*arguments, "--restart", *(item.format(**values) for item in overrides)])
    assert problem.format(**values) in text
    assert fix in text


def test_the_working_directory_is_not_renamed(arguments, earlier, refused, capsys, monkeypatch):
    monkeypatch.chdir(earlier / "reconstructions")
    capsys.readouterr()
    assert f"the working directory is {earlier / 'reconstructions'}." in refused("train", [*arguments, "--restart"])


def test_messages_name_restart_as_a_fix(arguments, earlier, refused, capsys):
    instead = "pass --restart (in Python, restart=True), which keeps this run under a dated name, or set another"
    capsys.readouterr()
    assert f"For a new run, {instead} results_dir." in refused("train", [*arguments, "train.optim.lr=0.01"])
    text = refused("train", [*arguments, "model.arch=vit_small_patch16"])
    assert "cannot resume from" in text
    assert f"or begin a new run: {instead} results_dir." in text
    assert main(["train", *arguments]) == 0
    assert f"or begin a new run: {instead} results_dir." in capsys.readouterr().err
    resumed = [f"train.resume_training_checkpoint_path={list_checkpoints(earlier)[-1]}", "train.optim.lr=0.01"]
    assert "Fix: For a new run, set another results_dir." in refused("train", [*arguments, *resumed])


def test_only_train_has_the_flag(refused, capsys):
    assert "unrecognized arguments: --restart" in refused("evaluate", ["--restart"])


def test_the_results_of_a_restart_are_those_of_the_new_run(arguments, earlier):
    with running(load_spec(None, arguments, action="train"), "train") as run:
        restart.set_aside(run)
        assert {path.name for path in earlier.iterdir() if not path.name.startswith(".")} == {"status.json"}
