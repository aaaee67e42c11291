"""The merged spec of a job, and the values that the parent and the job decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.job_records import make_record

from openmae.errors import CheckpointError, SpecError
from openmae.jobs.job import Record, State
from openmae.jobs.parameters import JobSpec, fill, merge, nested
from openmae.spec.actions import ACTIONS, TABLE

_KEYS = {
    "train.num_epochs": "num_epochs",
    "dataset.batch_size": "batch_size",
    "train.optim.lr": "learning_rate",
    "model.num_classes": "num_classes",
    "model.arch": "arch",
    "train.optim.momentum": None,
    "dataset.augmentation.mean": None,
}
_values = st.integers(1, 99) | st.text("ab", min_size=1) | st.lists(st.integers(), max_size=2)
_typed = st.dictionaries(st.sampled_from(list(_KEYS)), _values)


def _written(deep: Mapping[str, Any], dotted: Mapping[str, Any], short: Mapping[str, Any]) -> dict[str, Any]:
    words = {_KEYS[key]: value for key, value in short.items() if _KEYS[key]}
    return {**dotted, **nested(deep), **words}


@given(_typed, st.data())
def test_nested_sections_and_dotted_keys_are_equivalent(typed: dict[str, Any], data: st.DataObject) -> None:
    deep = {key: value for key, value in typed.items() if data.draw(st.booleans())}
    rest = {key: value for key, value in typed.items() if key not in deep}
    assert merge("train", nested(typed)).values == typed
    assert merge("train", typed).values == typed
    assert merge("train", _written(deep, rest, {})).values == typed
    assert merge("train", None, _written(deep, rest, {})).values == typed


@given(st.tuples(*[_typed] * 6))
def test_precedence(layers: tuple[dict[str, Any], ...]) -> None:
    """spec_overrides before specs; in each, dotted keys before nested sections before shorthands."""
    specs, overrides = _written(layers[1], layers[2], layers[0]), _written(layers[4], layers[5], layers[3])
    expected: dict[str, Any] = {}
    for number, layer in enumerate(layers):
        expected |= {key: value for key, value in layer.items() if number % 3 or _KEYS[key]}
    merged = merge("train", specs, overrides)
    assert merged.values == expected
    for key, origin in merged.origins.items():
        from_overrides = key in layers[4] or key in layers[5] or (key in layers[3] and bool(_KEYS[key]))
        assert origin.function == ("spec_overrides" if from_overrides else "specs")


@given(_typed, _typed)
def test_merging_again_changes_nothing(specs: dict[str, Any], overrides: dict[str, Any]) -> None:
    once = merge("train", nested(specs), overrides)
    assert merge("train", nested(once.values)).values == once.values
    assert merge("train", nested(once.values), nested(once.values)).values == once.values
    assert merge("train", nested(once.values), overrides).values == once.values


def test_missing_values_count_as_not_given() -> None:
    merged = merge("evaluate", {"evaluate": {"checkpoint": "???", "trt_engine": None}, "model": {"arch": "vit"}})
    assert merged.values == {"model.arch": "vit"}
    # a null that has precedence does not remove a value
    assert merge("train", {"train": {"seed": 3}}, {"train.seed": None}).values == {"train.seed": 3}
    assert merge("train", {"train": {"seed": 3}, "train.seed": None}).values == {"train.seed": 3}


@pytest.mark.parametrize(
    ("action", "word", "key"),
    [
        ("train", "batch_size", "dataset.batch_size"),
        ("evaluate", "batch_size", "dataset.batch_size"),
        ("export", "batch_size", "export.batch_size"),
        ("gen_trt_engine", "batch_size", "gen_trt_engine.batch_size"),
        ("train", "stage", "train.stage"),
        ("train", "arch", "model.arch"),
        ("train", "image_size", "dataset.augmentation.input_size"),
        ("train", "resume_checkpoint", "train.resume_training_checkpoint_path"),
        ("gen_trt_engine", "trt_data_type", "gen_trt_engine.tensorrt.data_type"),
        ("gen_trt_engine", "trt_engine", "gen_trt_engine.trt_engine"),
        ("inference", "trt_engine", "inference.trt_engine"),
    ],
)
def test_shorthands(action: str, word: str, key: str) -> None:
    merged = merge(action, None, {word: "x"})
    assert merged.values == {key: "x"}
    assert merged.origins[key].why == f"shorthand {word} in spec_overrides"


def test_image_size_sets_two_keys_of_an_export() -> None:
    assert merge("export", None, {"image_size": 64}).values == {"export.input_height": 64, "export.input_width": 64}
    assert merge("export", {"image_size": [32, 64]}).values == {"export.input_height": 32, "export.input_width": 64}


def test_a_shorthand_without_a_meaning_is_refused() -> None:
    with pytest.raises(SpecError, match="trt_engine: the shorthand has no meaning for export"):
        merge("export", None, {"trt_engine": "x"})


def test_a_key_below_a_plain_value_is_refused() -> None:
    with pytest.raises(SpecError, match=r"model\.arch: cannot be set, since model is 5 and not a section"):
        nested(merge("train", {"model": 5}, {"model.arch": "vit"}).values)


def _parent(tmp_path: Path, action: str, files: tuple[str, ...] = (), state: State = "COMPLETE", **more: Any) -> Record:
    folder = tmp_path / "parent" / action
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("x", encoding="utf-8")
    return make_record("p1", (state,), action=action, results_folder=str(folder), **more)


def _filled(action: str, typed: dict[str, Any], parent: Record | None, own: str = "/jobs/1/results") -> JobSpec:
    filled = merge(action, None, typed)
    fill(filled, parent, own)
    return filled


@pytest.mark.parametrize("action", ACTIONS)
def test_every_key_of_the_table_is_explained(action: str) -> None:
    filled = _filled(action, {}, None)
    assert {"encryption_key", "results_dir", *TABLE[action].filled} == set(filled.origins)
    assert filled.values["results_dir"] == "/jobs/1/results"
    assert filled.origins["results_dir"].function == "output_dir"
    assert filled.origins["encryption_key"].function == "key"
    for key, function in TABLE[action].filled.items():
        assert filled.origins[key].function == function
        assert filled.origins[key].why


def test_outputs_are_written_to_the_results_folder_of_the_job() -> None:
    filled = _filled("export", {"export.checkpoint": "c"}, None)
    assert filled.values["export.onnx_file"] == "/jobs/1/results/export/model.onnx"
    filled = _filled("gen_trt_engine", {"results_dir": "s3://bucket/out"}, None)
    assert filled.values["gen_trt_engine.trt_engine"] == "s3://bucket/out/gen_trt_engine/model.engine"
    filled = _filled("export", {"export": {"results_dir": "/elsewhere", "onnx_file": "mine.onnx"}}, None)
    assert filled.values["export.onnx_file"] == "mine.onnx"


@pytest.mark.parametrize("action", ["evaluate", "inference"])
def test_the_checkpoint_of_a_training_run_is_used(tmp_path: Path, action: str) -> None:
    parent = _parent(tmp_path, "train", ("model_epoch_001_step_00009.pth", "model_best.pth", "backbone.safetensors"))
    filled = _filled(action, {}, parent)
    assert filled.values[f"{action}.checkpoint"] == f"{parent.results_folder}/model_best.pth"
    assert filled.origins[f"{action}.checkpoint"].why == "the parent's best (job p1)"
    assert f"{action}.trt_engine" not in filled.values
    assert filled.origins[f"{action}.trt_engine"].why == "a job of train writes checkpoint, which does not fit"


@pytest.mark.parametrize(("kind", "name"), [("export", "m.onnx"), ("gen_trt_engine", "m.engine")])
def test_an_export_or_an_engine_leaves_the_checkpoint_unset(tmp_path: Path, kind: str, name: str) -> None:
    parent = _parent(tmp_path, kind, (name, "backbone.safetensors"))
    filled = _filled("evaluate", {}, parent)
    assert filled.values["evaluate.trt_engine"] == f"{parent.results_folder}/{name}"
    assert "evaluate.checkpoint" not in filled.values
    assert "does not fit" in filled.origins["evaluate.checkpoint"].why


def test_given_values_are_kept(tmp_path: Path) -> None:
    parent = _parent(tmp_path, "train", ("model_best.pth",), spec={"model": {"arch": "vit_tiny_patch16"}})
    typed = {"evaluate.checkpoint": "/mine.pth", "model.arch": "hiera_tiny_224", "results_dir": "/out"}
    filled = _filled("evaluate", typed, parent)
    assert {key: filled.values[key] for key in typed} == typed
    assert {filled.origins[key].function for key in typed} == {"spec_overrides"}
    other = _filled("evaluate", {"evaluate.trt_engine": "/mine.onnx"}, parent)
    assert "evaluate.checkpoint" not in other.values, "both would be set, and only one of them may be"
    assert other.origins["evaluate.checkpoint"].why == "evaluate.trt_engine is set, and only one of them is used"


def test_resuming_has_precedence_over_the_weights_of_the_parent(tmp_path: Path) -> None:
    parent = _parent(tmp_path, "train", ("model_epoch_004_step_00050.pth",))
    fresh = _filled("train", {}, parent, str(tmp_path / "own"))
    assert fresh.values["train.pretrained_model_path"] == f"{parent.results_folder}/model_epoch_004_step_00050.pth"
    assert "train.resume_training_checkpoint_path" not in fresh.values
    own = tmp_path / "own" / "train"
    own.mkdir(parents=True)
    for name in ("model_epoch_000_step_00003.pth", "model_epoch_001_step_00006.pth", "model_best.pth"):
        (own / name).touch()
    resumed = _filled("train", {}, parent, str(tmp_path / "own"))
    assert resumed.values["train.resume_training_checkpoint_path"] == str(own / "model_epoch_001_step_00006.pth")
    assert "train.pretrained_model_path" not in resumed.values
    assert "resumes" in resumed.origins["train.pretrained_model_path"].why


_TRAINED = """
train: {stage: finetune}
model: {arch: vit_tiny_patch16, num_classes: 3, in_chans: 1, patch_size: 8}
dataset: {augmentation: {input_size: [32, 48]}}
"""


def test_stage_architecture_classes_and_size_are_carried_forward(tmp_path: Path) -> None:
    parent = _parent(tmp_path, "train", ("model_best.pth",), spec={"model": {"arch": "vit_tiny_patch16"}})
    Path(parent.results_folder, "experiment.yaml").write_text(_TRAINED, encoding="utf-8")
    filled = _filled("evaluate", {}, parent)
    carried = {key: origin.value for key, origin in filled.origins.items() if origin.function == "carried"}
    assert carried == {
        **{"train.stage": "finetune", "model.arch": "vit_tiny_patch16", "model.num_classes": 3},
        **{"dataset.augmentation.input_size": [32, 48], "model.in_chans": 1, "model.patch_size": 8},
    }
    assert filled.origins["model.num_classes"].why == "resolved spec of job p1"
    # the classes of other data may differ
    child = _filled("train", {}, parent, str(tmp_path / "own"))
    assert "model.num_classes" not in child.values
    assert child.origins["model.num_classes"].why == "the data of this job decides (the parent's: 3)"


@pytest.mark.parametrize("name", ["experiment.yaml", "best.yaml"])
def test_a_damaged_spec_of_the_parent_is_named(tmp_path: Path, name: str) -> None:
    parent = _parent(tmp_path, "train", ("model_best.pth",))
    Path(parent.results_folder, name).write_text("model: {", encoding="utf-8")
    with pytest.raises(SpecError, match=rf"{name} of job p1 is damaged: .*\n  Fix: Restore it"):
        _filled("evaluate", {}, parent)


def test_a_grandchild_inherits_the_values_of_its_parents_spec(tmp_path: Path) -> None:
    spec = {"train": {"stage": "finetune"}, "model": {"arch": "vit_tiny_patch16", "num_classes": 3}}
    parent = _parent(tmp_path, "export", ("model.onnx", "experiment.yaml"), spec=spec)
    filled = _filled("gen_trt_engine", {}, parent)
    assert filled.values["model.num_classes"] == 3
    assert filled.origins["dataset.augmentation.input_size"].why == "job p1 does not set it"


def test_a_parent_whose_model_no_key_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        _filled("gen_trt_engine", {}, _parent(tmp_path, "train", ("model_best.pth",)))
    assert str(caught.value) == (
        "parent_job_id: gen_trt_engine takes onnx, but p1 is a job of train, which writes checkpoint.\n"
        "  Fix: Use a job of export as the parent, or set gen_trt_engine.onnx_file."
    )
    with pytest.raises(SpecError, match="export takes checkpoint, but p1 is a job of export, which writes onnx"):
        _filled("export", {}, _parent(tmp_path, "export", ("m.onnx",)))
    with pytest.raises(SpecError, match=r"p1 is a job of evaluate, whose results have no model\.\n  Fix: Use a train"):
        _filled("inference", {}, _parent(tmp_path, "evaluate"))


def test_a_parent_without_its_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"export\.checkpoint: job p1 \(train, RUNNING\) has no checkpoint"):
        _filled("export", {}, _parent(tmp_path, "train", ("status.json",), state="RUNNING"))


def test_a_file_outside_the_parents_results_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.onnx").touch()
    parent = _parent(tmp_path, "export", outputs=[str(tmp_path / "mine.onnx")])
    assert _filled("gen_trt_engine", {}, parent).values["gen_trt_engine.onnx_file"] == str(tmp_path / "mine.onnx")


def test_the_encryption_key_follows_the_model(tmp_path: Path) -> None:
    parent = _parent(tmp_path, "train", ("model_best.pth",), spec={"encryption_key": "env:MAE_KEY"})
    filled = _filled("export", {}, parent)
    assert filled.values["encryption_key"] == "env:MAE_KEY"
    assert filled.origins["encryption_key"].why == "the parent's"
    hidden = replace(parent, spec={"encryption_key": "***"})
    with pytest.raises(SpecError, match=r"which is never stored .*p1.*\n  Fix: Give the same key again"):
        _filled("export", {}, hidden)
    literal = _filled("export", {"encryption_key": "hunter2"}, hidden)
    assert "hunter2" not in str(literal.explanation())
