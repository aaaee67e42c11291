"""The start and the end of an action: folder, status, processes and failures."""

from __future__ import annotations

import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from openmae.actions import run as run_module
from openmae.actions.run import Run, begin_results, running, show_table
from openmae.actions.staging import local_place
from openmae.errors import DataError, RunError, UserError, blaming
from openmae.results.status import read_status
from openmae.spec.load import load_spec
from openmae.storage.lock import FolderLock


@pytest.fixture
def spec(tmp_path):
    return load_spec(None, [f"results_dir={tmp_path}"])


def statuses(run: Run) -> list[str]:
    return [line["status"] for line in read_status(run.folder / "status.json")]


def test_the_status_reports_the_outcome(spec):
    with running(spec, "evaluate") as run:
        assert statuses(run) == ["STARTED"]
    assert statuses(run) == ["STARTED", "SUCCESS"]
    with running(spec, "evaluate") as run:
        run.skipped = "nothing to do"
    assert statuses(run)[2:] == ["STARTED", "SKIPPED"], "the lines of an earlier run are kept"
    assert read_status(run.folder / "status.json")[-1]["message"] == "nothing to do"


@pytest.mark.parametrize(
    ("error", "message", "verbosity"),
    [
        (DataError("No images.", "Add some."), "DataError: No images.\n  Fix: Add some.", "ERROR"),
        (ZeroDivisionError("odd"), "ZeroDivisionError: odd", "ERROR"),
        (KeyboardInterrupt(), "train was interrupted", "WARNING"),
    ],
)
def test_a_failure_is_reported_and_raised(spec, error, message, verbosity):
    with pytest.raises(type(error)), running(spec, "train") as run:
        raise error
    last = read_status(run.folder / "status.json")[-1]
    assert (last["status"], last["message"], last["verbosity"]) == ("FAILURE", message, verbosity)


def test_a_full_disk_is_a_failed_run_even_if_the_status_cannot_be_written(spec, monkeypatch):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    def act(work: Callable[[], object]) -> None:
        with running(spec, "train") as run:
            monkeypatch.setattr(run.status, "write", full)
            work()

    with pytest.raises(RunError, match=r"could not be written \(No space left on device\)"):
        act(full)
    with pytest.raises(FileNotFoundError):
        act(Path("/nowhere/at/all").read_text)


def test_results_begin_with_the_spec_and_an_empty_list_of_corrupt_files(spec, tmp_path):
    (tmp_path / "corrupt_files.txt").write_text("old")
    begin_results(tmp_path, spec, resumed=True)
    assert (tmp_path / "corrupt_files.txt").exists()
    begin_results(tmp_path, spec)
    assert not (tmp_path / "corrupt_files.txt").exists()
    assert load_spec(tmp_path / "experiment.yaml").results_dir == str(tmp_path)


def test_blaming_names_the_key_and_keeps_type_and_fix():
    with pytest.raises(DataError) as caught, blaming("dataset.val_data_sources"):
        raise DataError("It is empty.", "Fill it.")
    assert str(caught.value) == "dataset.val_data_sources: It is empty.\n  Fix: Fill it."


def test_a_table_has_its_title_on_one_line(capsys):
    show_table("a title that is wider than the [table] below it", [("a", "1"), ("bc", "2 [x]")])
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines()]
    assert lines == ["", "a title that is wider than the [table] below it", "a   1", "bc  2 [x]", ""]


@pytest.mark.parametrize(
    ("typed", "variables", "expected", "notice"),
    [
        (
            ["train.num_gpus=1", "train.num_nodes=1", "train.gpu_ids=[0]"],
            {"WORLD_SIZE": "1", "NUM_GPU_PER_NODE": "2"},
            (2, (0, 1), 1),
            "WORLD_SIZE and NUM_GPU_PER_NODE set 2 processes on each of 1 node. This replaces train.num_gpus=1, "
            "train.gpu_ids=[0] in the spec.",
        ),
        (
            ["train.num_gpus=1", "train.num_nodes=1", "train.gpu_ids=[0]"],
            {"WORLD_SIZE": "2", "NUM_GPU_PER_NODE": "1", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            (1, (0,), 2),
            "set 1 process on each of 2 nodes. This replaces train.num_nodes=1 in the spec.",
        ),
        (
            ["train.gpu_ids=[3]"],
            {"WORLD_SIZE": "1", "NUM_GPU_PER_NODE": "1"},
            (1, (0,), 1),
            "This replaces train.gpu_ids=[3] in the spec.",
        ),
        (["train.gpu_ids=[3]"], {}, (1, (3,), 1), ""),
        ([], {"WORLD_SIZE": "1", "NUM_GPU_PER_NODE": "2"}, (2, (0, 1), 1), ""),
    ],
)
def test_the_orchestrator_replaces_numbers_of_the_spec(
    typed, variables, expected, notice, tmp_path, monkeypatch, caplog
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with running(load_spec(None, [f"results_dir={tmp_path}", *typed]), "train") as run:
        pass
    train = run.spec.train
    assert (train.num_gpus, train.gpu_ids, train.num_nodes) == expected
    assert notice in caplog.text
    assert bool(notice) == ("This replaces" in caplog.text)


@pytest.mark.parametrize(
    "streams",
    [
        pytest.param("2>&1 >/dev/null | true", id="pipe", marks=pytest.mark.slow),
        pytest.param(">&- 2>&-", id="closed"),
        pytest.param(">/dev/full 2>/dev/full", id="full", marks=pytest.mark.slow),
    ],
)
def test_a_training_survives_a_closed_output(trained, tmp_path, streams):
    words = [sys.executable, "-m", "openmae", "train", *trained("vit", "pretrain").overrides]
    command = " ".join(map(shlex.quote, [*words, f"results_dir={tmp_path}"]))
    script = f"set -o pipefail; {command} {streams}"
    subprocess.run(["bash", "-c", script], check=True)
    assert (tmp_path / "train" / "model_epoch_001_step_00002.pth").is_file()
    assert read_status(tmp_path / "train" / "status.json")[-1]["status"] == "SUCCESS"


@pytest.mark.parametrize("action", ["train", "evaluate", "inference", "export"])
def test_a_folder_of_another_run_is_refused(action, spec, tmp_path):
    folder = tmp_path / action
    folder.mkdir()
    with FolderLock(folder, "results_dir"):
        with pytest.raises(UserError, match=f"^results_dir: another run is writing to {folder}: process "):
            running(spec, action).__enter__()
        assert not (folder / "status.json").exists()
    with running(spec, action) as run:
        pass
    assert statuses(run) == ["STARTED", "SUCCESS"]


def test_another_process_of_the_same_run_is_not_locked_out(spec, tmp_path):
    with local_place(spec, "train"), local_place(spec, "train", leads=False) as place:
        assert place.folder == tmp_path / "train"


def test_the_workers_of_a_search_share_a_folder(spec):
    with local_place(spec, "automl"), local_place(spec, "automl"):
        pass


def test_a_run_that_loses_its_folder_ends(spec, monkeypatch):
    places = []

    @contextmanager
    def noting(*arguments, **options):
        with local_place(*arguments, **options) as place:
            places.append(place)
            yield place

    def act():
        with running(spec, "train"):
            places[0].lose(RunError("It has been taken over."))
            threading.Event().wait(30)  # until it is interrupted

    monkeypatch.setattr(run_module, "local_place", noting)
    with pytest.raises(RunError, match="taken over"):
        act()
