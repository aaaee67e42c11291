"""``mae automl``: complete searches with real jobs, and the parts of a search."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from openmae.automl import search
from openmae.automl.database import read_storage
from openmae.automl.trial_jobs import TrialJobs, this_machine
from openmae.cli.main import main
from openmae.errors import DataError, Preempted, RunError, SpecError
from openmae.jobs import Client
from openmae.results.status import read_status
from openmae.spec.load import load_spec
from openmae.spec.schema import ExperimentSpec

TEMPLATE = Path(search.__file__).parents[1] / "skill/tao-train-mask-auto-encoder/references/spec_template_train.yaml"
Command = list[str]


def _command(folder: Path, images: Path, *more: str) -> Command:
    return [
        *(sys.executable, "-m", "openmae", "automl"),
        *(f"results_dir={folder}", f"dataset.train_data_sources={images / 'train'}", "model.arch=vit_tiny_patch16"),
        *("dataset.batch_size=5", "dataset.augmentation.input_size=32", "dataset.num_workers_per_gpu=0"),
        *more,
    ]


def _run(command: Command, seconds: float = 240) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _until(what: Callable[[], Any], text: str, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"{text} did not come in {seconds:g} s"
        time.sleep(0.05)
    return found


def _spec(command: Command) -> ExperimentSpec:
    return load_spec(None, command[4:], action="automl")


def _trials(command: Command) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="automl", storage=read_storage(_spec(command))).trials


def _jobs(folder: Path) -> list[str]:
    return sorted(job.name for job in Client(root=folder / "automl" / "jobs" / this_machine()).list_jobs())


def test_search_from_review_to_training_with_the_best_spec(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, but for the jobs; the slow tests start the search as a user does."""
    monkeypatch.setattr("openmae.automl.worker._POLL", 0.5)  # real jobs take seconds, and need the cores
    command = _command(
        *(tmp_path, images, "train.num_epochs=1", "automl.max_recommendations=2", "automl.algorithm=random"),
        *("model.decoder_depth=1", "model.decoder_embed_dim=32"),
    )
    assert main(command[3:]) == 0
    text = "".join(capfd.readouterr())
    folder = tmp_path / "automl"
    assert f"Next: mae train -e {folder}/best.yaml" in text

    own, other = _trials(command)
    assert own.state == other.state == TrialState.COMPLETE
    best = min((own, other), key=lambda trial: trial.value or 0.0)
    for trial in (own, other):
        lines = read_status(folder / "trials" / f"{trial.number:03d}" / "status.json")
        assert trial.value == [line["kpi"]["train_loss"] for line in lines if "kpi" in line][-1]
        kept = sorted((folder / "trials" / f"{trial.number:03d}").glob("*.pth"))
        assert bool(kept) == (trial is best), "the loser takes room, or the best is gone"
    checkpoint = folder / "trials" / f"{best.number:03d}" / "model_best.pth"
    assert (folder / "model_best.pth").read_bytes() == checkpoint.read_bytes()
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert all(title in report for title in ("Best values", "History", "Parallel coordinates", "All trials"))

    entries = read_status(folder / "status.json")
    assert entries[0]["status"] == "STARTED"
    assert entries[-1]["status"] == "SUCCESS"
    assert {key for entry in entries for key in entry} == {"date", "time", "status", "verbosity", "message", "kpi"}
    told = [entry["kpi"] for entry in entries if "kpi" in entry]
    assert told[-1]["train_loss"] == best.value

    spec = load_spec(folder / "best.yaml", action="train")
    assert spec.train.optim.lr == best.params["train.optim.lr"]
    assert spec.train.optim.warmup_epochs == 0 or "train.optim.warmup_epochs" not in best.params
    assert main(["train", "-e", str(folder / "best.yaml")]) == 0
    trained = read_status(tmp_path / "best" / "train" / "status.json")
    again = [entry["kpi"]["train_loss"] for entry in trained if "kpi" in entry][-1]
    assert again == best.value, "the best spec does not train what the search trained"


def test_best_checkpoint_is_copied(tmp_path: Path) -> None:
    trial = tmp_path / "trials" / "000"
    trial.mkdir(parents=True)
    with pytest.raises(RunError, match="The best trial's checkpoint is not in"):
        search.copy_best(trial, tmp_path, of_best_epoch=False)
    (trial / "model_epoch_001_step_00004.pth").write_bytes(b"complete")
    search.copy_best(trial, tmp_path, of_best_epoch=False)
    assert (tmp_path / "model_best.pth").read_bytes() == b"complete"


@pytest.mark.slow  # starts two searches with real jobs
def test_search_continues_after_kill_and_adopts_the_running_job(tmp_path: Path, images: Path) -> None:
    command = _command(
        tmp_path, images, "train.num_epochs=2", "automl.max_recommendations=2", "automl.algorithm=random"
    )
    client = Client(root=tmp_path / "automl" / "jobs" / this_machine())

    def training() -> Any:
        jobs = [job for job in client.list_jobs() if job.name == "001 to epoch 2" and job.status == "RUNNING"]
        return jobs and client.store.read(jobs[0].id).handle.process

    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = _until(training, "the second training")
    os.kill(process["pid"], signal.SIGSTOP)  # so that it still runs when it is found
    first.send_signal(signal.SIGKILL)
    first.wait(10)
    assert [trial.state for trial in _trials(command)] == [TrialState.COMPLETE, TrialState.RUNNING]

    second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        _until(
            lambda: (
                _trials(command)[1].user_attrs["worker"]["process"]["pid"] == second.pid or second.poll() is not None
            ),
            "the second process at the trial of the first",
        )
    finally:
        os.kill(process["pid"], signal.SIGCONT)
    text, _ = second.communicate(timeout=240)
    assert second.returncode == 0, text
    assert "Continuing the search in" in text
    trials = _trials(command)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    assert _jobs(tmp_path) == ["000 to epoch 2", "001 to epoch 2", "probe"], "it was trained twice"
    lines = read_status(tmp_path / "automl" / "trials" / "001" / "status.json")
    assert [line["message"] for line in lines if "kpi" in line] == ["Epoch 1 of 2, step 2", "Epoch 2 of 2, step 4"]
    assert [line["status"] for line in read_status(tmp_path / "automl" / "status.json")].count("SUCCESS") == 1


def test_invalid_input_trains_nothing(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = _command(tmp_path, images, "train.num_epochs=2", "automl.parameters=[train.seed]")
    assert main(command[3:]) == 2
    assert "automl.parameters: train.seed: it cannot be searched" in capsys.readouterr().err
    assert not (tmp_path / "automl").exists()


def test_preemption_is_recorded(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "Study", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Preempted):
        search.run(_spec(_command(tmp_path, images)))
    assert read_status(tmp_path / "automl" / "status.json")[-1]["message"] == "automl was preempted"


@pytest.mark.slow  # minutes: every job imports torch
def test_interrupted_finetuning_search_with_early_stopping_and_evaluation(tmp_path: Path, images: Path) -> None:
    pretrained = tmp_path / "pretrained"
    _run([*_command(pretrained, images)[:3], "train", *_command(pretrained, images)[4:], "train.num_epochs=1"])
    command = _command(
        *(tmp_path / "search", images, "train.stage=finetune", f"dataset.val_data_sources={images / 'val'}"),
        *("train.num_epochs=3", "automl.algorithm=asha", "automl.max_recommendations=4", "dataset.batch_size=2"),
        f"train.pretrained_model_path={pretrained}/train/model_best.pth",
    )  # fmt: skip
    folder = tmp_path / "search" / "automl"
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _until(lambda: (folder / "trials" / "001").is_dir() or first.poll() is not None, "the second training", 200)
    first.send_signal(signal.SIGINT)
    text, _ = first.communicate(timeout=120)
    assert first.returncode == 130, text
    assert all(job.finished for job in Client(root=folder / "jobs" / this_machine()).list_jobs()), (
        "a job was left running"
    )
    text = _run(command, 400)
    trials = _trials(command)
    assert len(trials) == 4
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in trials:
        lines = read_status(folder / "trials" / f"{trial.number:03d}" / "status.json")
        epochs = [line["message"].split()[1] for line in lines if "kpi" in line]
        assert epochs == [str(number + 1) for number in range(trial.user_attrs["epochs"])], "an epoch was trained twice"
    study = optuna.load_study(study_name="automl", storage=read_storage(_spec(command)))
    assert 0 <= study.user_attrs["final"]["ACC_all"] <= 1


def best_of(spec: ExperimentSpec, params: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(search.best_spec(spec, params, 7))
    return tree


def test_best_spec_of_a_complete_template_loads(tmp_path: Path) -> None:
    spec = load_spec(TEMPLATE, ["dataset.train_data_sources=photos", f"results_dir={tmp_path}"], action="automl")
    tree = best_of(spec, {"train.optim.lr": 0.003, "train.optim.warmup_epochs": 2})
    loaded = load_spec(tree, action="train")
    assert loaded.train.optim.lr == 0.003
    assert loaded.train.num_epochs == 7
    assert loaded.results_dir == f"{tmp_path}/best", "the search's own folder is taken"
    assert "automl" not in tree


def test_best_spec_contains_only_what_was_set() -> None:
    spec = load_spec(None, ["dataset.train_data_sources=photos", "train.num_epochs=9"], action="automl")
    assert best_of(spec, {"train.optim.lr": 0.003}) == {
        "results_dir": "results/best",
        "dataset": {"train_data_sources": "photos"},
        "train": {"num_epochs": 7, "optim": {"lr": 0.003}},
    }


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "train.resume_training_checkpoint_path=a.pth",
            "train.resume_training_checkpoint_path: belongs to a single training run",
        ),
        ("train.stop_after_epoch=2", "train.stop_after_epoch: belongs to a single training run"),
    ],
)
def test_options_of_a_single_run_are_rejected(override: str, problem: str, tmp_path: Path) -> None:
    spec = load_spec(None, ["dataset.train_data_sources=photos", f"results_dir={tmp_path}", override], action="automl")
    with pytest.raises(SpecError, match=problem):
        search.run(spec)
    assert not list(tmp_path.iterdir()), "something was created for invalid input"


def test_shared_study_with_remote_results_is_rejected() -> None:
    overrides = ["dataset.train_data_sources=photos", "results_dir=s3://bucket/a", "automl.storage=postgresql://h/d"]
    with pytest.raises(SpecError, match="must share the results too"):
        search.run(load_spec(None, overrides, action="automl"))


def test_knn_needs_classes(tmp_path: Path, images: Path) -> None:
    folder = images / "train" / "blue"
    overrides = [f"dataset.train_data_sources={folder}", f"dataset.val_data_sources={folder}", "automl.metric=knn_acc"]
    with pytest.raises(DataError, match=r"automl.metric: knn_acc needs classes"):
        search.count_images(load_spec(None, overrides, action="automl"))


def test_pretraining_counts_the_classes_of_its_validation_images(images: Path) -> None:
    sources = [f"dataset.{part}_data_sources={images / part}" for part in ("train", "val")]
    counts = search.count_images(load_spec(None, sources, action="automl"))
    assert counts["classes"] == 2


def test_evaluation_gets_only_data_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint describes the model; the spec of the search may contradict it."""
    overrides = ["dataset.train_data_sources=photos", "dataset.val_data_sources=val", "train.stage=finetune"]
    more = ["model.arch=vit_tiny_patch16", "dataset.batch_size=8", "wandb.run_id=abc", "wandb.name=mine"]
    spec = load_spec(None, [*overrides, *more], action="automl")
    jobs = TrialJobs(spec, tmp_path, SimpleNamespace(epochs=3, generations=1), "local")  # type: ignore[arg-type]
    given: list[Any] = []
    monkeypatch.setattr(jobs.client, "create_job", lambda *args, **more: given.append(args))
    jobs.start("evaluate", "final", {})
    jobs.start("train", "000", {})
    (_, evaluation, _), (_, training, _) = given
    assert evaluation == {"results_dir": str(tmp_path), "dataset.val_data_sources": "val", "dataset.batch_size": 8}
    assert training["model.arch"] == "vit_tiny_patch16"
    assert "wandb.run_id" not in training, "all trials would share one run"
