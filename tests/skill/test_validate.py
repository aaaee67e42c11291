"""Each rule of the contract is checked: a breach of it is found, and said with its file and value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from openmae.skill import FOLDER, NAME
from openmae.skill.validate import find_breaches

INFO, TRAIN = "references/skill_info.yaml", "schemas/train.schema.json"
SIZE, WARMUP = "dataset.augmentation.input_size", "train.optim.warmup_epochs"
SCHEDULER = "train.optim.lr_scheduler"


@pytest.fixture
def skill(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / NAME))


def test_the_packaged_skill_has_none():
    assert find_breaches(FOLDER) == []


def test_no_folder(tmp_path):
    assert find_breaches(tmp_path / "nowhere") == [f"{tmp_path / 'nowhere'}: is not a folder"]


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("SKILL.md", f"name: {NAME}", "name: other", f"name: must be the folder's, {NAME!r}, got 'other'"),
        ("SKILL.md", "description: Pre", "description: <b>Pre", "description: String should match pattern '^[^<>]+$'"),
        ("SKILL.md", "license: Apache-2.0\n", "", "license: Field required"),
        ("SKILL.md", "allowed-tools: Read Bash\n", "", "allowed-tools: Field required"),
        (
            "SKILL.md",
            "compatibility: N",
            f"compatibility: {'N' * 500}",
            "compatibility: String should have at most 500",
        ),
        ("SKILL.md", "  author: The OpenMAE authors\n", "", "metadata.author: Field required"),
        ("SKILL.md", '  version: "', '  version: "v', "metadata.version: String should match pattern"),
        ("SKILL.md", "# MAE\n", f"# MAE\n{'x' * 18_000}", "the body must have up to 18000 characters, got"),
        ("SKILL.md", "---\nname", "name", "must begin with frontmatter"),
        ("SKILL.md", "tags:", "labels:", "tags: Field required"),
        ("SKILL.md", "python -m venv", "virtualenv", "a quick start, a bash block with python -m venv"),
        ("SKILL.md", "/data/photos", "/home/ann/photos", "/home/ann is a path of one machine"),
        ("SKILL.md", "license: Apache-2.0", "license: [", "the frontmatter does not parse"),
        (INFO, "network_arch: mae", "network_arch: vit", "network_arch: Input should be 'mae', got 'vit'"),
        (INFO, "automl_enabled: true", "automl_enabled: false", "automl_enabled: Input should be True, got False"),
        (INFO, "gpu_spec_key: train.num_gpus\n", "", "gpu_spec_key: Field required"),
        (INFO, "command: mae export -e {config_path}", "command: mae x", "actions.export.command: must be 'mae export"),
        (
            INFO,
            "script: scripts/run_action.py",
            "script: scripts/no.py",
            "script: 'scripts/no.py' does not exist",
        ),
        (INFO, "args: [train, '{config_path}']", "args: [train]", "execution.args: must contain"),
        (INFO, "spec_template_train.yaml", "none.yaml", "spec_templates.train: must be 'references/spec_"),
        (INFO, "type: python_script", "type: shell", "execution.type: Input should be 'python_script', got 'shell'"),
        (
            INFO,
            "results_dir:\n        type: folder",
            "status:\n        type: folder",
            "actions.train: inputs and outputs must be keys of the spec, got status",
        ),
        (
            INFO,
            "results_dir:\n        type: folder",
            "results_dir: out",
            "outputs.results_dir: Input should be a valid dictionary",
        ),
        (
            INFO,
            "train.pretrained_model_path:\n",
            "train.weights:\n",
            "must be keys of the spec, got train.weights",
        ),
        (
            INFO,
            "path: images_train.tar.gz",
            "path: [a, b]",
            "data_sources.train.dataset.train_data_sources.path: Input should be",
        ),
        (TRAIN, '"type": "object"', '"type": "array"', "type: Input should be 'object', got 'array'"),
        (TRAIN, '"x_tao_schema"', '"x_schema"', "x_tao_schema: Field required"),
        (
            TRAIN,
            '"schema_version": 1',
            '"schema_version": 0',
            "x_tao_schema.schema_version: Input should be greater than",
        ),
        (TRAIN, '"maximum": 100', '"maximum": Infinity', "does not parse: Infinity is not allowed: bounds are finite"),
        (TRAIN, '"maximum": 100,', '"maximum": "much",', "train.optim.warmup_epochs: maximum: Input should be a valid"),
        (TRAIN, '"type": "ordered_int"', '"type": ["int", "null"]', "model.in_chans: type: Input should be"),
        (TRAIN, '"type": "ordered_int"', '"type": "integer"', "model.in_chans: type: Input should be 'string', 'int'"),
        (TRAIN, '"train.optim.momentum",', '"train.optim.m",', "train.optim.m is not a key of the schema"),
        ("schemas/manifest.json", '"export"', '"exports"', "actions: must be those of skill_info.yaml"),
        ("references/spec_template_train.yaml", "num_epochs: 10", "num_epochs: 11", "must equal the default of"),
        ("references/spec_template_train.yaml", "train:", "train: [", "does not parse"),
        (
            "evals/evals.json",
            '"id": "policy-off"',
            '"id": "routing-default"',
            "the id 'routing-default' occurs twice",
        ),
        ("evals/evals.json", '"expected_behavior"', '"expected"', "0.expected_behavior: Field required"),
        (
            "evals/evals.json",
            '"question": "Fine',
            '"question": 1, "q": "Fine',
            "0.question: Input should be a valid string",
        ),
    ],
)
def test_a_breach_is_found(skill, file, old, new, said):
    path = skill / file
    text = path.read_text()
    assert old in text, f"{file} no longer holds {old!r}"
    path.write_text(text.replace(old, new, 1))
    found = find_breaches(skill)
    assert any(line.startswith(f"{file}: ") and said in line for line in found), found


def leaf_of(schema: dict, key: str) -> dict:
    for part in key.split("."):
        schema = schema["properties"][part]
    return schema


@pytest.mark.parametrize(
    ("key", "changes", "said"),
    [
        (
            SIZE,
            {"type": None, "anyOf": [{"type": "int"}, {"type": "list"}]},
            "must have a type, or an anyOf of one type and null",
        ),
        (SIZE, {"anyOf": [{"type": "int"}]}, "must have a type, or an anyOf of one type and null"),
        (SIZE, {"type": None}, "must have a type, or an anyOf of one type and null"),
        (SIZE, {"type": None, "anyOf": []}, "must have a type, or an anyOf of one type and null"),
        (SIZE, {"default": None}, "the default None is not a legal value"),
        ("dataset.augmentation", {"properties": {}}, "properties: Dictionary should have at least 1 item"),
        ("dataset.augmentation", {"properties": None}, "properties: Field required"),
        (SIZE, {"type": None, "anyOf": [{"type": "collection"}, {"type": "null"}]}, "properties: Field required"),
        (
            WARMUP,
            {"math_cond": "< train.num_epochs"},
            "math_cond: String should match pattern",
        ),
        (WARMUP, {"math_cond": ">= 0.0", "depends_on": None}, "math_cond must compare with an integer, got '>= 0.0'"),
        (WARMUP, {"math_cond": "depends_on <"}, "math_cond: String should match pattern"),
        (WARMUP, {"depends_on": None}, "math_cond '< depends_on' needs depends_on"),
        (WARMUP, {"depends_on": "train.epochs"}, "depends_on must be a key of this schema, got 'train.epochs'"),
        (WARMUP, {"maximum": None}, "automl_enabled needs a minimum and a maximum, or an enum"),
        ("train.optim.lr", {"math_cond": "> train.optim.weight_decay"}, "math_cond: String should match pattern"),
        ("train.optim.lr", {"minimum": -1e400}, "does not parse: -Infinity is not allowed"),
        ("model.arch", {"minimum": 1}, "minimum and maximum are for numbers"),
        ("model.arch", {"enum": None}, "enum is missing"),
        ("model.in_chans", {"enum": [1, "3"]}, "enum must be a list of legal values"),
        (SCHEDULER, {"option_weights": [0, 0]}, "option_weights must have one number for each value of enum"),
        (SCHEDULER, {"option_weights": [1]}, "option_weights must have one number for each value of enum"),
    ],
)
def test_what_nvidia_s_runner_refuses_is_found(skill, key, changes, said):
    """Rule by rule, on the packaged schema; ``tests/nvidia`` asks NVIDIA's own code."""
    path = skill / TRAIN
    schema = json.loads(path.read_text())
    leaf = leaf_of(schema, key)
    for name, value in changes.items():
        if value is None and name != "default":
            del leaf[name]
        else:
            leaf[name] = value
    path.write_text(json.dumps(schema))
    found = find_breaches(skill)
    assert any(line.startswith(TRAIN) and said in line for line in found), found


def test_a_default_out_of_its_bounds_is_found(skill):
    path = skill / TRAIN
    schema = json.loads(path.read_text())
    schema["properties"]["train"]["properties"]["optim"]["properties"]["lr"]["minimum"] = 0.5
    del schema["properties"]["dataset"]["properties"]["batch_size"]["title"]
    path.write_text(json.dumps(schema))
    assert find_breaches(skill) == [
        f"{TRAIN}: dataset.batch_size: title: Field required",
        f"{TRAIN}: train.optim.lr: the default 0.0002 is not a legal value",
    ]


def test_the_deploy_reference_is_needed(skill):
    for path in (skill / "references").glob("tao-deploy-*.md"):
        path.unlink()
    assert find_breaches(skill) == ["references: there is no tao-deploy-*.md"]


def test_garbage_is_a_breach(skill):
    for path in [p for p in skill.rglob("*") if p.is_file()]:
        before = path.read_bytes()
        for rubbish in (b"", b"[1, 2]", b"\xff\xfe", b"{", b"actions: 3\n", b'{"properties": {"a": 1}, "evals": 1}'):
            path.write_bytes(rubbish)
            found = find_breaches(skill)
            assert found or path.suffix in (".py", ".md"), f"{path.name} with {rubbish!r} was accepted"
        path.write_bytes(before)
    assert find_breaches(skill) == []
