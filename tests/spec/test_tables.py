"""The tables of options, actions and metrics are complete, and agree with each other."""

import pytest

from openmae.spec.actions import ACTIONS, ROWS, SEARCH, SHORTHANDS, TABLE, expand_shorthand
from openmae.spec.describe import choices, fields, file_use, sections, traits, type_words
from openmae.spec.load import load_spec, to_dict
from openmae.spec.metrics import METRICS, is_share, label, metrics_of
from openmae.spec.option import FileUse
from openmae.spec.schema import ExperimentSpec


@pytest.mark.parametrize("key", list(fields()))
def test_every_option_declares_its_traits(key: str) -> None:
    declared, field = traits(key), fields()[key]
    assert field.description
    assert type_words(field)
    assert declared.stages
    assert set(declared.ignored_by_tao) <= set(declared.stages)
    if declared.needs:
        needed, value = declared.condition
        assert needed in fields()
        assert value in (*choices(fields()[needed]), ">0", "true", "")
    if declared.cond:
        sign, other = declared.cond.split()
        assert sign in ("<", "<=", ">", ">=")
        assert other in fields()
    if declared.automl:
        assert declared.search
    if declared.search and not choices(field):
        assert declared.search.low is not None
        assert declared.search.high is not None
    if key.endswith(("_dir", "_path", ".checkpoint", "_file", "_sources")) and not declared.compat:
        assert file_use(key), "declare it as InputPath, OutputPath or LocalFile"


def test_an_option_without_traits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields()["train.optim.lr"], "json_schema_extra", None)
    with pytest.raises(AssertionError, match=r"train\.optim\.lr is not declared with option\(\)"):
        traits("train.optim.lr")


@pytest.mark.parametrize("name", list(ROWS))
def test_every_action_has_a_row_with_keys_that_exist(name: str) -> None:
    action = ROWS[name]
    assert action.title
    assert name in ExperimentSpec.model_fields
    for data in action.data:
        assert file_use(data.key) == FileUse.READ
    for file in action.inputs:
        assert file_use(file.key) == FileUse.READ
    if action.output:
        assert file_use(action.output.key) == FileUse.WRITTEN
    assert action.has_devices == (f"{name}.num_gpus" in fields())
    assert {key for group in action.required for key in group} <= fields().keys()
    for stage, metric in action.metrics.items():
        assert stage in METRICS[metric].stages


def test_every_section_of_an_action_has_a_row() -> None:
    others = {"model", "dataset", "train.optim", "wandb", "automl"}
    with_results = {name for name in sections() - others if f"{name}.results_dir" in fields()}
    assert with_results == set(ACTIONS)
    assert set(TABLE) == set(ACTIONS)
    assert {key for key in fields() if key.endswith(".checkpoint")} <= {f.key for a in TABLE.values() for f in a.inputs}
    assert SEARCH.name not in ACTIONS


@pytest.mark.parametrize("word", list(SHORTHANDS))
@pytest.mark.parametrize("action", ACTIONS)
def test_every_shorthand_stands_for_keys(word: str, action: str) -> None:
    if word == "trt_engine" and action in ("train", "export"):
        with pytest.raises(ValueError, match="trt_engine: the shorthand has no meaning for"):
            expand_shorthand(action, word, "x")
    else:
        assert expand_shorthand(action, word, "x").keys() <= fields().keys()


def test_shorthands_of_export() -> None:
    assert expand_shorthand("export", "image_size", [192, 256]) == {
        "export.input_height": 192,
        "export.input_width": 256,
    }
    assert expand_shorthand("export", "image_size", 192) == {"export.input_height": 192, "export.input_width": 192}
    assert expand_shorthand("train", "image_size", [192, 256]) == {"dataset.augmentation.input_size": [192, 256]}


def test_every_metric_has_labels_and_a_stage() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.label
        assert metric.short
        assert metric.stages
        assert (metric.direction == "maximize") == is_share(name)
    assert set(METRICS) == {*metrics_of("pretrain"), *metrics_of("finetune")}
    assert label("train_loss_epoch") == "training loss"
    assert label("other") == "other"


@pytest.mark.parametrize(
    ("overrides", "monitor"),
    [
        ([], "train_loss"),
        (["dataset.val_data_sources=x", "train.optim.monitor_name=val_loss"], "val_loss"),
        (["dataset.val_data_sources=x"], "val_loss"),
        (["dataset.val_data_sources=x", "train.optim.monitor_name=train_loss"], "train_loss"),
        (["dataset.val_data_sources=x", "train.optim.monitor_name=probe_acc"], "probe_acc"),
        (["dataset.val_data_sources=x", "train.optim.monitor_name=knn_acc"], "knn_acc"),
        (["dataset.val_data_sources=x", "train.stage=finetune"], "ACC_all"),
        (["dataset.val_data_sources=x", "train.stage=finetune", "train.optim.monitor_name=train_loss"], "train_loss"),
        (["dataset.val_data_sources=x", "train.stage=finetune", "train.optim.monitor_name=acc_all"], "ACC_all"),
        (["train.stage=finetune"], "train_loss"),
    ],
)
def test_the_monitored_metric(overrides: list[str], monitor: str) -> None:
    spec = load_spec(None, ["dataset.batch_size=2", *overrides])
    assert spec.train.optim.monitor_name == monitor
    recorded = to_dict(spec)
    assert recorded["train"]["optim"]["monitor_name"] == monitor
    assert load_spec(recorded).train.optim.monitor_name == monitor, (
        "a run from experiment.yaml picks the same checkpoint"
    )
    if not spec.is_set("train.optim.monitor_name"):
        again = load_spec(spec, ["dataset.val_data_sources=", "train.stage=finetune"])
        assert again.train.optim.monitor_name == "train_loss", "a derived value follows the overrides"
