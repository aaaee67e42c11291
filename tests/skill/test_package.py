"""The generated files are up to date, ship in the wheel, and can be installed elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from openmae import __version__
from openmae.cli.parser import Parser
from openmae.cli.skill import add_arguments
from openmae.errors import UserError
from openmae.skill import COMMAND, FOLDER, NAME
from openmae.skill.info import DEPLOY, skill_info
from openmae.skill.package import build, render
from openmae.spec.actions import ACTIONS

ROOT = Path(__file__).parents[2]


def differences(folder: Path = FOLDER) -> list[str]:
    """Return the generated files that are missing or outdated, and files that do not belong to the skill."""
    files = render(folder)
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    present = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    known = {*files, "evals/evals.json", f"references/{DEPLOY}.md", "scripts/run_action.py"}
    outdated = {name for name, text in files.items() if present.get(name) != text}
    return sorted(outdated | (present.keys() - known))


@pytest.fixture
def skill(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / NAME))


def run(*argv: str) -> None:
    parser = Parser()
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.run(args)


def test_the_committed_skill_is_up_to_date():
    wrong = differences()
    assert not wrong, f"{', '.join(wrong)} in {FOLDER} is outdated: run `{COMMAND}`"


def test_build_updates_outdated_files(skill):
    (skill / "schemas/train.schema.json").write_text("{}")
    (skill / "references/spec_template_export.yaml").unlink()
    (skill / "SKILL.md").write_text(
        (skill / "SKILL.md").read_text().replace('"valid_min": 2e-05', '"valid_min": 1e-09')
    )
    (skill / "notes.txt").write_text("mine")
    broken = ["SKILL.md", "references/spec_template_export.yaml", "schemas/train.schema.json"]
    assert differences(skill) == [*broken[:1], "notes.txt", *broken[1:]]
    assert sorted(build(skill)) == broken
    assert differences(skill) == ["notes.txt"], "an unknown file is reported and not deleted"
    assert build(skill) == []


def test_an_unknown_placeholder_is_an_error(skill):
    path = skill / "SKILL.md"
    path.write_text(path.read_text().replace("generated: data", "generated: dates"))
    with pytest.raises(UserError, match="there is no generated part 'dates'"):
        render(skill)


def test_the_version_is_that_of_the_package():
    front = yaml.safe_load((FOLDER / "SKILL.md").read_text().split("---\n")[1])
    assert front["metadata"]["version"] == __version__


def test_every_action_has_its_files():
    manifest = json.loads((FOLDER / "schemas/manifest.json").read_text())
    assert tuple(manifest["actions"]) == ACTIONS
    for entry in manifest["actions"].values():
        assert all((FOLDER / path).is_file() for path in entry.values()), entry


def test_shorthands():
    assert skill_info()["spec_shorthand_keys"]["image_size"] == "dataset.augmentation.input_size"


def test_spec_params_are_those_of_the_contract():
    expected = {
        "train": {
            "encryption_key": "key",
            "results_dir": "output_dir",
            "train.pretrained_model_path": "ptm_if_no_resume_model",
            "train.resume_training_checkpoint_path": "resume_model",
        },
        "evaluate": {
            "encryption_key": "key",
            "results_dir": "output_dir",
            "evaluate.checkpoint": "parent_model",
            "evaluate.trt_engine": "parent_model",
        },
        "inference": {
            "encryption_key": "key",
            "results_dir": "output_dir",
            "inference.checkpoint": "parent_model",
            "inference.trt_engine": "parent_model",
        },
        "export": {
            "encryption_key": "key",
            "results_dir": "output_dir",
            "export.checkpoint": "parent_model",
            "export.onnx_file": "create_onnx_file",
        },
        "gen_trt_engine": {
            "encryption_key": "key",
            "results_dir": "output_dir",
            "gen_trt_engine.onnx_file": "parent_model",
            "gen_trt_engine.trt_engine": "create_engine_file",
        },
    }
    assert skill_info()["spec_params"] == expected


def test_install_replaces_only_with_overwrite(tmp_path, capsys):
    run("install", str(tmp_path / "skills"))
    target = tmp_path / "skills" / NAME
    assert capsys.readouterr().out == f"{target}\n"
    assert differences(target) == []
    (target / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        run("install", str(tmp_path / "skills"))
    assert (target / "mine.txt").is_file()
    run("install", str(tmp_path / "skills"), "--overwrite")
    assert differences(target) == []
    (tmp_path / "other" / NAME).mkdir(parents=True)
    with pytest.raises(UserError, match=r"is not a skill: it has no SKILL\.md"):
        run("install", str(tmp_path / "other"), "--overwrite")


def test_validate_reports_every_breach(skill, capsys):
    run("validate", str(skill))
    assert "is valid." in capsys.readouterr().out
    (skill / "schemas/manifest.json").unlink()
    (skill / "evals/evals.json").unlink()
    with pytest.raises(UserError, match="has 2 problems:") as caught:
        run("validate", str(skill))
    assert "schemas/manifest.json: cannot be read" in str(caught.value)
    assert "evals/evals.json: cannot be read" in str(caught.value)


def test_the_commands_import_nothing_heavy_before_they_run():
    code = (
        "import sys; from openmae.cli.parser import Parser; from openmae.cli.skill import add_arguments;"
        "add_arguments(Parser()); print(sorted({'torch', 'yaml', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_wheel_contains_the_skill(tmp_path):
    pytest.importorskip("hatchling", reason="builds the wheel without a network")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = set(zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).namelist())
    for path in FOLDER.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert f"openmae/skill/{NAME}/{path.relative_to(FOLDER).as_posix()}" in names
