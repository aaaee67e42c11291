"""NVIDIA's AutoML runner and SDK drive the packaged skill folder as it is.

Run by ``make test-nvidia``, which installs nvidia-tao-automl and nvidia-tao-sdk. Versions before 7.1 run containers
only: they load the folder, and nothing more can be run of them here.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import onnxruntime
import pytest

from openmae.results.status import read_status
from openmae.skill import FOLDER
from openmae.skill.validate import find_breaches

pytestmark = pytest.mark.nvidia

VERSIONS = ("7.0.0", "7.0.1", "7.1.0", "7.2.0")
WITH_SCRIPTS = ("7.1.0", "7.2.0")  # those with VirtualEnvSDK and external schemas
SMALL = {
    "train.stage": "finetune",
    "train.num_epochs": 2,
    "model.arch": "vit_tiny_patch16",
    "model.patch_size": 8,
    "model.in_chans": 1,
    "dataset.augmentation.input_size": 32,
    "dataset.batch_size": 20,
    "dataset.num_workers_per_gpu": 0,
    "wandb.enable": False,
}
SETTINGS = {
    "bayesian": {},
    # two rungs, of 1 and 2 epochs, so that a trial is promoted: it resumes a checkpoint of another job
    "asha": {
        "automl_max_epochs": 2,
        "automl_reduction_factor": 2,
        "automl_max_concurrent": 2,
        "automl_max_trials": 3,
    },
}


def ranges() -> dict:
    """Return ``custom_param_ranges``, as SKILL.md has them."""
    code = re.search(r"```python\n(custom_param_ranges = .*?)```", (FOLDER / "SKILL.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code[1], names)
    return names["custom_param_ranges"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_action_is_loaded_and_its_data_filled_in(nvidia, skill, version):
    specs = nvidia(version, "load", skill=skill, data="/data/digits")
    for action, key, file in (
        ("train", "train_data_sources", "images_train.tar.gz"),
        ("train", "val_data_sources", "images_val.tar.gz"),
        ("evaluate", "val_data_sources", "images_val.tar.gz"),
    ):
        assert specs[action]["dataset"][key] == f"/data/digits/{file}", "train_dataset_uri was ignored"


FAULTS = {
    "dataset.augmentation.input_size": [
        {"type": None, "anyOf": [{"type": "int"}, {"type": "list"}]},
        {"type": ["int", "null"]},
        {"anyOf": [{"type": "int"}]},
        {"type": None},
        {"default": None},
        {"type": "collection"},
    ],
    "dataset.augmentation": [{"properties": {}}],
    "model.in_chans": [{"enum": []}, {"enum": [1, "3"]}, {"maximum": 2}],
    "train.optim.lr": [{"maximum": None}, {"minimum": 2}, {"minimum": "0"}, {"math_cond": "> train.num_epochs"}],
    "train.optim.warmup_epochs": [{"math_cond": "< train.num_epochs"}],
    "train.optim.lr_scheduler": [{"option_weights": [1]}, {"option_weights": [0, 0]}, {"default": "linear"}],
}


@pytest.mark.parametrize("version", WITH_SCRIPTS)
def test_what_nvidia_refuses_is_a_breach(nvidia, tmp_path, version):
    """``mae skill validate`` knows the rules of the runner: it finds whatever NVIDIA's code refuses."""
    folder = Path(shutil.copytree(FOLDER, tmp_path / FOLDER.name))
    path = folder / "schemas/train.schema.json"
    good = json.loads(path.read_text())
    schemas, breaches = [good], [[]]
    for key, variants in FAULTS.items():
        for changes in variants:
            schema = copy.deepcopy(good)
            node = schema
            for part in key.split("."):
                node = node["properties"][part]
            node.update(changes)
            for name in [name for name, value in changes.items() if value is None and name != "default"]:
                del node[name]
            path.write_text(json.dumps(schema))
            schemas.append(schema)
            breaches.append(find_breaches(folder))
    said = nvidia(version, "refuse", skill=folder, schemas=schemas)
    assert said[0] == "", "the packaged schema is refused"
    assert all(said[1:]), [breach for text, breach in zip(said, breaches, strict=True) if not text]
    assert all(breaches[1:]), [text for text, breach in zip(said, breaches, strict=True) if not breach]


@pytest.mark.parametrize("version", WITH_SCRIPTS)
@pytest.mark.parametrize("chosen", [None, "the ranges of SKILL.md"])
def test_every_draw_is_a_spec_that_loads(nvidia, skill, version, chosen):
    algorithms = ["bayesian", "asha", "bohb", "hyperband", "hyperband_es", "dehb", "pbt", "bfbo"]
    limits = ranges() if chosen else None
    drawn = nvidia(version, "sample", skill=skill, algorithms=algorithms, ranges=limits, count=50)
    assert list(drawn) == algorithms
    for name, rows in drawn.items():
        assert len(rows) == 50
        for values in rows:
            assert set(values) == set(ranges())
            for key, limit in (limits or {}).items():
                assert limit["valid_min"] <= values[key] <= limit["valid_max"], f"{name}: {key}"


@pytest.mark.parametrize("version", WITH_SCRIPTS)
@pytest.mark.parametrize("algorithm", SETTINGS)
def test_a_search_finishes_three_of_three(nvidia, skill, environment, digits, tmp_path, version, algorithm):
    settings = {"algorithm": algorithm, "metric": "ACC_all", "direction": "maximize", "automl_max_recommendations": 3}
    done = nvidia(
        version,
        "search",
        skill=skill,
        venv=environment,
        work=tmp_path / "work",
        data=digits,
        settings=settings | SETTINGS[algorithm],
        ranges=ranges(),
        overrides=SMALL,
    )
    history, best = done["result"]["history"], done["result"]["best"]
    assert [trial["status"] for trial in history] == ["success"] * 3, done["logs"]
    assert all(0 <= trial["metric"] <= 1 for trial in history)
    assert bool(done["resumed"]) == (algorithm == "asha"), "one trial is promoted"
    (log,) = [Path(path) for path in done["files"] if path.endswith("/results_dir/train/status.json")]
    reported = [entry["kpi"]["ACC_all"] for entry in read_status(log) if "ACC_all" in entry.get("kpi", {})]
    assert best["metric_value"] == pytest.approx(reported[-1], abs=1e-4), "another number was read"
    if (version, algorithm) == (WITH_SCRIPTS[-1], "bayesian"):
        (checkpoint,) = [path for path in done["files"] if path.endswith("model_best.pth")]
        check_the_other_actions(nvidia, skill, environment, digits, tmp_path, checkpoint)


def check_the_other_actions(nvidia, skill, environment, digits, tmp_path, checkpoint):
    """Each as a job of VirtualEnvSDK, which names output files after their keys, without a suffix."""

    def act(action, values):
        place = {"venv": environment, "work": tmp_path / "work"}
        done = nvidia(WITH_SCRIPTS[-1], "act", skill=skill, action=action, values=values, **place)
        assert done["status"] == "Complete", done["log"]
        return {Path(path).name: path for path in done["files"]}

    data = {"dataset.num_workers_per_gpu": 0, "dataset.batch_size": 50}
    held_out = {"dataset.val_data_sources": str(digits / "images_val.tar.gz"), **data}
    act("evaluate", held_out | {"evaluate.checkpoint": checkpoint})
    images = {"dataset.test_data_sources": str(digits / "images_val.tar.gz"), **data}
    assert "results.csv" in act("inference", images | {"inference.checkpoint": checkpoint})
    model = act("export", {"export.checkpoint": checkpoint})["export_onnx_file"]
    assert onnxruntime.InferenceSession(model).get_outputs()[0].shape[-1] == 10
    act("evaluate", held_out | {"evaluate.checkpoint": "", "evaluate.trt_engine": model})
    options = {"compute_capability": ["sm_89"], "backend": "tensorrt_rtx"}
    built = act("gen_trt_engine", {"gen_trt_engine.onnx_file": model, "gen_trt_engine": options})
    assert {"gen_trt_engine_trt_engine", "gen_trt_engine_trt_engine.json"} <= built.keys()
