"""What a search gives its user to go on with, and what it refuses before it begins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from openmae.automl import search
from openmae.automl.trial_jobs import TrialJobs
from openmae.errors import DataError, SpecError
from openmae.spec.load import load_spec
from openmae.spec.schema import ExperimentSpec

TEMPLATE = Path(search.__file__).parents[1] / "skill/tao-train-mask-auto-encoder/references/spec_template_train.yaml"


def best_of(spec: ExperimentSpec, params: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(search.best_spec(spec, params, 7))
    return tree


def test_the_best_spec_of_a_whole_template_loads(tmp_path):
    spec = load_spec(TEMPLATE, ["dataset.train_data_sources=photos", f"results_dir={tmp_path}"], action="automl")
    tree = best_of(spec, {"train.optim.lr": 0.003, "train.optim.warmup_epochs": 2})
    loaded = load_spec(tree, action="train")
    assert loaded.train.optim.lr == 0.003
    assert loaded.train.num_epochs == 7
    assert loaded.results_dir == f"{tmp_path}/best", "the search's own folder is taken"
    assert "automl" not in tree


def test_the_best_spec_holds_what_was_typed_and_no_more():
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
def test_what_is_of_one_training_is_refused(override, problem, tmp_path):
    spec = load_spec(None, ["dataset.train_data_sources=photos", f"results_dir={tmp_path}", override], action="automl")
    with pytest.raises(SpecError, match=problem):
        search.run(spec)
    assert not list(tmp_path.iterdir()), "something was made for a request that is refused"


def test_a_shared_study_with_results_in_a_store_is_refused():
    overrides = ["dataset.train_data_sources=photos", "results_dir=s3://bucket/a", "automl.storage=postgresql://h/d"]
    with pytest.raises(SpecError, match="must share the results too"):
        search.run(load_spec(None, overrides, action="automl"))


def test_neighbours_need_classes(tmp_path, pictures):
    folder = pictures / "train" / "blue"
    overrides = [f"dataset.train_data_sources={folder}", f"dataset.val_data_sources={folder}", "automl.metric=knn_acc"]
    with pytest.raises(DataError, match=r"automl.metric: knn_acc needs classes"):
        search.count_images(load_spec(None, overrides, action="automl"))


def test_a_pretraining_counts_the_classes_of_its_validation_images(pictures):
    sources = [f"dataset.{part}_data_sources={pictures / part}" for part in ("train", "val")]
    counts = search.count_images(load_spec(None, sources, action="automl"))
    assert counts["classes"] == 2


def test_an_evaluation_gets_what_is_of_the_data_alone(tmp_path, monkeypatch):
    """The checkpoint says what the model is: the spec of the training may contradict it."""
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
    assert "wandb.run_id" not in training, "all trainings would be one run"
