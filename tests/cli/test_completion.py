"""``mae completion``: candidates, and the scripts in the shells that are installed."""

import os
import shutil
import subprocess
import sys

import pytest

from openmae.cli.main import main

_SHELLS = {
    "bash": """
        source <(mae completion bash)
        complete_line() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _mae; printf '%s\\n' "${COMPREPLY[@]}"; }
        complete_line mae ex
        complete_line mae jobs ""
        complete_line mae train train.optim.warm
    """,
    "zsh": """
        compdef() { :; }
        compadd() { while [[ $1 != -- ]]; do shift; done; shift; (( $# )) && print -l -- "$@"; return 0; }
        source <(mae completion zsh)
        complete_line() { words=("$@"); CURRENT=$#; PREFIX=$words[$CURRENT]; _mae; }
        complete_line mae ex
        complete_line mae jobs ""
        complete_line mae train train.optim.warm
    """,
    "fish": """
        mae completion fish | source
        complete --do-complete "mae ex"
        complete --do-complete "mae jobs "
        complete --do-complete "mae train train.optim.warm"
    """,
}


def candidates(line, monkeypatch, capsys):
    monkeypatch.setenv("MAE_LINE", line)
    assert main(["completion", "words"]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mae tr", ["train"]),
        ("mae spec ", ["check", "template", "keys"]),
        ("mae spec template e", ["evaluate", "export"]),
        ("mae jobs submit train --platform ", ["local", "slurm", "ray"]),
        ("mae jobs logs --f", ["--follow"]),
        ("mae train train.num_e", ["train.num_epochs="]),
        ("mae train -e spec.yaml model.mask_r", ["model.mask_ratio="]),
        ("mae train dataset.train_data_sources=ph", []),
        ("mae train --enc", []),
        ("mae completion ", ["bash", "zsh", "fish"]),
    ],
)
def test_candidates(line, expected, monkeypatch, capsys):
    assert candidates(line, monkeypatch, capsys) == expected


def test_all_commands_are_candidates(monkeypatch, capsys):
    found = candidates("mae ", monkeypatch, capsys)
    assert {"train", "jobs", "quickstart", "completion"} <= set(found)
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in found)


@pytest.mark.integration
@pytest.mark.parametrize("shell", _SHELLS)
def test_the_script_of_a_shell(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    mae = tmp_path / "mae"
    mae.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m openmae "$@"\n')
    mae.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    options = {"zsh": ["-f"], "fish": ["--no-config"], "bash": ["--norc"]}[shell]
    done = subprocess.run([shell, *options, "-c", _SHELLS[shell]], capture_output=True, text=True, env=environment)
    found = done.stdout.split()
    assert {"export", "submit", "train.optim.warmup_epochs="} <= set(found), done.stdout + done.stderr
    assert not {"train", "evaluate", "words"} & set(found)
