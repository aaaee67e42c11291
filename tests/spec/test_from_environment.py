"""Values of environment variables are used, and not written down."""

from __future__ import annotations

import pytest
import yaml

from openmae.spec.from_environment import environment_of
from openmae.spec.load import load_spec, to_dict, to_yaml

VALUE = "hush-hush"


@pytest.fixture(autouse=True)
def _variables(monkeypatch):
    monkeypatch.setenv("MAE_SECRET", VALUE)
    monkeypatch.setenv("MAE_COUNT", "3")


SPEC = {
    "results_dir": "${oc.env:MAE_SECRET}/results",
    "encryption_key": "${oc.env:MAE_SECRET}",
    "dataset": {
        "train_data_sources": "data/${oc.env:MAE_SECRET}/a",
        "val_data_sources": "${dataset.train_data_sources}/b",
    },
    "train": {"num_epochs": "${oc.env:MAE_COUNT}", "pretrained_model_path": "${oc.env:MAE_UNSET,'it is, here'}"},
    "wandb": {"name": "${oc.env:MAE_SECRET}", "tags": ["plain", "${oc.env:MAE_SECRET}"]},
}


def test_the_recorded_spec_refers_to_variables_and_loads_back():
    spec = load_spec(SPEC)
    assert spec.results_dir == f"{VALUE}/results"
    assert spec.dataset.val_data_sources == f"data/{VALUE}/a/b"
    assert spec.wandb.tags == ("plain", VALUE)
    assert spec.train.pretrained_model_path == "it is, here"
    text = to_yaml(spec)
    assert VALUE not in text
    tree = yaml.safe_load(text)
    assert tree["dataset"]["val_data_sources"] == "data/${oc.env:MAE_SECRET}/a/b", "what it refers to may be changed"
    assert tree["wandb"]["tags"] == ["plain", "${oc.env:MAE_SECRET}"]
    assert tree["train"]["num_epochs"] == 3, "a number is read back by what resumes or evaluates"
    again = load_spec(tree)
    assert again.model_dump() == spec.model_dump()
    assert to_dict(again) == to_dict(spec)


def test_a_reloaded_spec_keeps_references():
    again = load_spec(load_spec(SPEC), ["wandb.name=mine"])
    assert VALUE not in to_yaml(again)
    assert to_dict(again)["wandb"]["name"] == "mine"
    assert again.encryption_key == VALUE


def test_a_reference_inside_another_resolver(monkeypatch):
    spec = load_spec({"model_name": "${oc.decode:${oc.env:MAE_SECRET}}"})
    assert spec.model_name == VALUE
    assert to_dict(spec)["model_name"] == "${oc.decode:${oc.env:MAE_SECRET}}"


@pytest.mark.parametrize(
    ("value", "recorded"),
    [
        ("${wandb.name}", "${oc.env:MAE_SECRET}"),
        ("${wandb.name}/${wandb.group}/${train.seed}", "${oc.env:MAE_SECRET}/${wandb.group}/7"),
        ("${oc.select:wandb.name}", "${oc.select:wandb.name}"),
        ("${wandb.${model_name}}", "${wandb.${model_name}}"),
        ("${oc.env:MAE_UNSET,${wandb.name}}", "${oc.env:MAE_UNSET,${wandb.name}}"),
    ],
)
def test_a_variable_that_is_reached_through_other_keys(value, recorded):
    wandb = {"name": "${oc.env:MAE_SECRET}", "group": "${.name}x"}
    source = {"model_name": "name", "train": {"seed": 7}, "wandb": wandb, "results_dir": value}
    spec = load_spec(source)
    assert VALUE in spec.results_dir
    assert to_dict(spec)["results_dir"] == recorded
    assert load_spec(to_dict(spec)).results_dir == spec.results_dir


def test_a_variable_in_a_section_that_is_a_reference():
    spec = load_spec({"inference": {"checkpoint": "${oc.env:MAE_SECRET}"}, "evaluate": "${inference}"})
    assert spec.evaluate.checkpoint == VALUE
    assert VALUE not in to_yaml(spec)


def test_a_spec_without_variables_is_recorded_unchanged():
    spec = load_spec({"results_dir": "a", "train": {"results_dir": "${results_dir}/b"}})
    assert to_dict(spec)["train"]["results_dir"] == "a/b"
    assert not spec.shown


def test_environment_of_references():
    values = ["${oc.env:MAE_SECRET}/x", ["${oc.env: MAE_COUNT,1}", "${oc.env:MAE_UNSET}"], 3]
    assert environment_of(values) == {"MAE_SECRET": VALUE, "MAE_COUNT": "3"}
