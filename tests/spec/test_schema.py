import csv
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from openmae.errors import SpecError
from openmae.spec.describe import choices, fields, traits
from openmae.spec.load import load_spec
from openmae.spec.schema import ExperimentSpec
from openmae.spec.sections.model import ModelSpec
from openmae.spec.sections.train import OptimSpec, TrainSpec
from openmae.spec.tree import nest

with (Path(__file__).parent / "data" / "published_keys.tsv").open(encoding="utf-8") as file:
    PUBLISHED = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

# Defaults that differ from the published ones on purpose.
OTHER_DEFAULTS = {
    "dataset.augmentation.max_scale", "dataset.augmentation.mean", "dataset.augmentation.std",
    "train.optim.backbone_multiplier", "train.mask_ratio", "train.norm_pix_loss",
    "model.num_classes", "model.decoder_depth", "model.decoder_embed_dim", "model.drop_path_rate",
    "export.input_channel", "export.input_height", "export.input_width",
    "gen_trt_engine.tensorrt.data_type", "wandb.name", "wandb.project", "wandb.tags",
}  # fmt: skip


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["key"])
def test_every_published_key_loads_with_its_published_default(row):
    key, default = row["key"], row["default_in_published_schema"]
    examples = {"dataset.augmentation.cutmix_minmax": 0.5, "dataset.test_data_sources": "photos"}
    value = json.loads(default) if default else examples[key]
    spec = load_spec(nest({key: value}))
    field = fields()[key]
    if key not in OTHER_DEFAULTS and default and value != "???":
        assert (list(field.default) if isinstance(field.default, tuple) else field.default) == value
    if row["enum"]:
        assert set(map(str, json.loads(row["enum"]))) <= set(choices(field))
    alias = {"train.mask_ratio": "model.mask_ratio", "train.norm_pix_loss": "model.norm_pix_loss"}
    assert spec.is_set(alias.get(key, key)) == (value != "???")


def test_the_automl_parameters_are_the_published_five():
    searched = {key for key in fields() if traits(key).automl}
    names = ("lr", "weight_decay", "momentum", "warmup_epochs", "backbone_multiplier")
    assert searched == {f"train.optim.{name}" for name in names}


def test_specs_are_frozen_and_closed():
    with pytest.raises(ValidationError, match="frozen"):
        ModelSpec().arch = "vit_base_patch16"
    with pytest.raises(ValidationError, match="Extra inputs"):
        ModelSpec(arhc="vit_base_patch16")


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), "much"])
def test_numbers_must_be_numbers(value):
    with pytest.raises(ValidationError):
        OptimSpec(lr=value)


def test_a_bool_is_not_an_integer_in_a_list():
    with pytest.raises(ValidationError, match="must not be true or false"):
        TrainSpec(gpu_ids=[True])


def test_text_may_be_a_path_or_an_integer(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    assert ExperimentSpec(results_dir=Path("runs/1")).results_dir == "runs/1"
    assert ExperimentSpec(results_dir=2026).results_dir == "2026"
    assert ExperimentSpec(results_dir="~/runs").results_dir == "/home/anna/runs"


def test_input_size_is_a_side_or_height_and_width():
    def size(value):
        return load_spec({"dataset": {"augmentation": {"input_size": value}}}).dataset.augmentation.size

    assert size(192) == size("192") == (192, 192)
    assert size([160, 320]) == (160, 320)


def test_effective_lr():
    assert OptimSpec(lr=3e-4).effective_lr(4096) == 3e-4
    assert OptimSpec(base_lr=1.5e-4).effective_lr(4096) == pytest.approx(2.4e-3)


def test_results_folders():
    assert ExperimentSpec().results_folder("train") == "results/train"
    assert ExperimentSpec(results_dir="/r").results_folder("evaluate") == "/r/evaluate"
    spec = ExperimentSpec(results_dir="/r", train=TrainSpec(results_dir="/elsewhere"))
    assert spec.results_folder("train") == "/elsewhere"


def test_batch_size_of_an_action():
    spec = load_spec({"dataset": {"batch_size": 8}, "inference": {"batch_size": 3}})
    assert [spec.batch_size(action) for action in ("train", "evaluate", "inference")] == [8, 8, 3]


def test_is_set():
    spec = ExperimentSpec(model=ModelSpec(arch="vit_base_patch16"))
    assert spec.is_set("model.arch")
    assert not spec.is_set("model.num_classes")
    with pytest.raises(KeyError):
        spec.is_set("model.nope")


def test_replaced_values_do_not_count_as_set():
    spec = load_spec({"model": {"arch": "vit_base_patch16"}})
    other = spec.replaced({"model.num_classes": 7, "train.optim.lr": 0.1})
    assert (other.model.num_classes, other.train.optim.lr, spec.model.num_classes) == (7, 0.1, None)
    assert other.is_set("model.arch")
    assert not other.is_set("model.num_classes")
    with pytest.raises(KeyError):
        spec.replaced({"model.nope": 1})


def test_replaced_values_of_a_constructed_spec_do_not_count_as_set():
    spec = ExperimentSpec(train=TrainSpec(seed=3)).replaced({"train.num_epochs": 5})
    assert spec.set_keys == {"train.seed"}
    assert load_spec(spec).set_keys == {"train.seed"}
    assert load_spec(spec).train.num_epochs == 5


@pytest.mark.parametrize(
    ("text", "value"), [("on", "on"), ("off", "off"), ("true", "on"), ("'On'", "on"), ("auto", "off")]
)
def test_on_and_off_are_no_numbers_and_no_booleans(text, value):
    assert load_spec(None, [f"dataset.cache={text}"]).dataset.cache == value
    with pytest.raises(SpecError, match=r"dataset.cache .override.: must be one of off, auto, on, got 1\."):
        load_spec(None, ["dataset.cache=1"])


def test_auto_counts_as_unset():
    assert not load_spec(None, ["dataset.cache=auto"]).is_set("dataset.cache")
    assert load_spec(None, ["dataset.cache=off"]).is_set("dataset.cache")
