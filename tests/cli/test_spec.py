"""``mae spec``."""

import subprocess
import sys

import pytest
import yaml

from openmae.cli.main import main


@pytest.mark.integration
def test_checking_a_spec_imports_no_torch():
    code = (
        "import sys; from openmae.cli.main import main; assert main(['spec', 'keys']) == 0;"
        "main(['spec', 'check', 'dataset.train_data_sources=x']);"
        "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


def test_spec_check_prints_the_resolved_spec(capsys):
    assert main(["spec", "check", "dataset.train_data_sources=x", "dataset.augmentation.max_scale=2"]) == 0
    out, err = capsys.readouterr()
    resolved = yaml.safe_load(out)
    assert resolved["model"]["mask_ratio"] == 0.6
    assert resolved["dataset"]["augmentation"]["max_scale"] == 1
    assert err.startswith("Notice: dataset.augmentation.max_scale 2 is used as 1")


def test_spec_check_for_an_action(capsys):
    assert main(["spec", "check", "--action", "evaluate"]) == 2
    assert "evaluate.checkpoint: `mae evaluate` needs it" in capsys.readouterr().err


def test_spec_check_of_a_missing_file(capsys, tmp_path):
    assert main(["spec", "check", "-e", str(tmp_path / "nope.yaml")]) == 2
    assert "There is no spec file" in capsys.readouterr().err


def test_spec_template_can_be_used(capsys, tmp_path):
    assert main(["spec", "template", "train"]) == 0
    path = tmp_path / "spec.yaml"
    path.write_text(capsys.readouterr().out)
    assert main(["spec", "check", "-e", str(path)]) == 2
    assert main(["spec", "check", "-e", str(path), "dataset.train_data_sources=photos"]) == 0


def test_spec_keys_is_a_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["spec", "keys", "--action", "evaluate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["key", "type", "default", "bounds", "help"]
    assert max(map(len, lines)) <= 140
    assert any(line.startswith("evaluate.checkpoint ") for line in lines)
    assert not any(line.startswith("inference.") for line in lines)
