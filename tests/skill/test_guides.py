"""SKILL.md and the deploy reference: every command runs, every spec resolves, every error is what is really printed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from openmae.cli.main import main
from openmae.jobs.policy import route
from openmae.skill import FOLDER
from openmae.spec.actions import ACTIONS
from openmae.spec.load import load_spec

GUIDES = {
    path.name: path.read_text(encoding="utf-8") for path in (FOLDER / "SKILL.md", *FOLDER.rglob("tao-deploy-*.md"))
}
BLOCKS = [
    (name, language, text)
    for name, guide in GUIDES.items()
    for language, text in re.findall(r"```([\w ]+)\n(.*?)```", guide, re.DOTALL)
]
SPECS = {
    match[1]: (match[2], text)
    for _, language, text in BLOCKS
    if language == "yaml" and (match := re.match(r"# (\S+\.yaml), for mae (\w+)\n", text))
}
LINES = [
    shlex.split(line.replace("\\\n", " "))
    for _, language, text in BLOCKS
    if language == "bash"
    for line in re.findall(r"(?m)^(?:.*\\\n)*.*\S.*$", text)
]
INSTALLATION = [["python", "-m", "venv", ".venv"], [".", ".venv/bin/activate"], ["pip", "install", "openmae"]]
COMMANDS = [words for words in LINES if words not in INSTALLATION]
PRINTED = [
    match
    for _, language, text in BLOCKS
    if language == "console"
    for match in re.findall(r"(?m)^\$ (.*)\n((?:(?!\$ ).*\n)*)", text)
]


@pytest.fixture
def specs(place: Path) -> Path:
    for name, (_, text) in SPECS.items():
        (place / name).write_text(text)
    return place


def test_the_guides_are_parsed_completely():
    assert {language for _, language, _ in BLOCKS} == {"bash", "yaml", "python", "console"}
    assert len(SPECS) == sum(language == "yaml" for _, language, _ in BLOCKS), "a YAML block without its head"
    assert LINES[:3] == INSTALLATION, "the quick start of NVIDIA's skill bank"
    assert {words[0] for words in COMMANDS} == {"mae"}
    assert {action for action in ACTIONS if any(words[1] == action for words in COMMANDS)} == set(ACTIONS)
    assert len(PRINTED) >= 8


def test_the_body_is_within_its_limit():
    assert len(GUIDES["SKILL.md"].split("---\n", 2)[2]) <= 18_000


def test_files_that_the_guides_name_exist():
    for name in re.findall(r"`((?:references|schemas|evals|scripts)/[\w.-]+)`", "".join(GUIDES.values())):
        assert "ACTION" in name or (FOLDER / name).is_file(), name


def test_keys_that_the_guides_name_exist():
    named = set(
        re.findall(
            r"`((?:train|model|dataset|export|evaluate|inference|gen_trt_engine)\.[a-z_.]+)`", GUIDES["SKILL.md"]
        )
    )
    assert len(named) > 25
    unknown = [key for key in named if not key.endswith((".md", ".pth")) and not knows(key)]
    assert not unknown, unknown


def knows(key: str) -> bool:
    from openmae.spec.describe import fields, sections

    return key in fields() or key in sections()


@pytest.mark.parametrize("name", SPECS)
def test_every_spec_resolves(name, specs):
    action = SPECS[name][0]
    load_spec(specs / name, action=action)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_can_be_resolved(words, specs, capsys):
    """The fast pass: the spec of each action is checked, other commands run."""
    if words[1] in (*ACTIONS, "automl"):
        words = ["mae", "spec", "check", "--action", words[1], *words[2:]]
    code = main(words[1:])
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize(("command", "printed"), PRINTED, ids=[command for command, _ in PRINTED])
def test_quoted_errors_match_the_output(command, printed, specs, capsys, monkeypatch):
    for name in ("WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):  # of a launch in this process
        monkeypatch.delenv(name, raising=False)
    if "pretrain.yaml" in command:  # it speaks of a run that is there
        assert main(["train", "-e", "pretrain.yaml"]) == 0
        capsys.readouterr()
    code = main(shlex.split(command)[1:])
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("Notice", "No GPU"))]
    shown = "\n".join(told).replace(str(specs), "/data")
    assert shown == printed.rstrip("\n")
    assert code == 2


@pytest.mark.slow(reason="trains six times, exports and builds an engine")
def test_the_commands_run(specs):
    for words in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", "openmae", *words[1:]], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    for made in (
        "photos/train/backbone.safetensors",
        "photos/inference/embeddings.parquet",
        "classes/train/model_best.pth",
        "classes/evaluate/status.json",
        "classes/inference/results.csv",
        "deploy/model.onnx",
        "deploy/model.engine",
        "deploy/model.engine.json",
        *(f"tuned/automl/{name}" for name in ("best.yaml", "model_best.pth", "report.html", "status.json")),
    ):
        assert (specs / "runs" / made).is_file(), made


def python_blocks(part: str) -> list[str]:
    found = [text for _, language, text in BLOCKS if language == "python" and part in text]
    assert found, f"no Python that has {part}"
    return found


def test_the_policy_example_runs(capsys):
    for code in python_blocks("import route"):
        exec(compile(code, "SKILL.md", "exec"), {})
    assert "plain training" in capsys.readouterr().out


def test_the_overrides_are_valid():
    (code,) = python_blocks("S3_TRAIN")
    names: dict = {}
    exec(compile(code, "SKILL.md", "exec"), names)
    for action in ("train", "evaluate", "inference", "export"):
        load_spec(None, [f"{key}={value}" for key, value in names[action].items()], action=action)
    assert names["train"]["dataset.train_data_sources"] == "s3://bucket/data/train/images_train.tar.gz"


@pytest.mark.slow(reason="trains and exports as two jobs")
def test_the_jobs_example_runs(place):
    (code,) = python_blocks("Client()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("COMPLETE"), done.stdout
    assert "parent_model" in done.stdout


def test_the_ranges_for_other_runners_are_legal():
    (code,) = python_blocks("custom_param_ranges")
    names: dict = {}
    exec(compile(code, "SKILL.md", "exec"), names)
    schema = json.loads((FOLDER / "schemas/train.schema.json").read_text())
    assert list(names["custom_param_ranges"]) == schema["automl_default_parameters"]
    for key, chosen in names["custom_param_ranges"].items():
        for value in (chosen["valid_min"], chosen["valid_max"]):
            load_spec(None, [f"{key}={value}", "dataset.train_data_sources=photos"], action="train")
    warmup = names["custom_param_ranges"]["train.optim.warmup_epochs"]
    assert warmup["valid_max"] < schema["default"]["train"]["num_epochs"]


def test_the_evals_agree_with_the_policy(tmp_path, monkeypatch):
    cases = json.loads((FOLDER / "evals/evals.json").read_text())
    assert len(cases) >= 8
    for case in cases:
        policy, skill = case["policy"], FOLDER
        if missing := policy.get("missing"):
            skill = tmp_path / case["id"]
            for path in FOLDER.rglob("*"):
                if path.is_file() and path.relative_to(FOLDER).as_posix() != missing:
                    target = skill / path.relative_to(FOLDER)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())
        monkeypatch.setattr("openmae.jobs.policy.SKILL", skill)
        found = route(policy["action"], policy["explicit"], case["question"])
        assert (found.policy, found.where) == (policy["policy"], policy["where"]), f"{case['id']}: {found.reason}"


def test_templates_can_be_filled_in_and_used(place):
    filled = {
        "train": {"dataset": {"train_data_sources": "photos"}},
        "evaluate": {"dataset": {"val_data_sources": "photos"}, "evaluate": {"checkpoint": "a.pth"}},
        "inference": {"dataset": {"test_data_sources": "photos"}, "inference": {"checkpoint": "a.pth"}},
        "export": {"export": {"checkpoint": "a.pth", "onnx_file": "a.onnx"}},
        "gen_trt_engine": {"gen_trt_engine": {"onnx_file": "a.onnx", "trt_engine": "a.engine"}},
    }
    for path in (FOLDER / "references").glob("spec_template_*.yaml"):
        action = re.sub(r"spec_template_(deploy_)?", "", path.stem)
        spec = yaml.safe_load(path.read_text())
        for section, values in filled[action].items():
            spec[section].update(values)
        resolved = load_spec(spec, action=action)
        assert not (action != "train" and resolved.is_set("model.arch")), "the checkpoint decides the architecture"
