"""``openmae.train`` called by a script or a notebook, whose processes have to import the script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from openmae.distributed.launch import build_fabric
from openmae.errors import SpecError
from openmae.main_guard import watch_for_reruns
from openmae.results.status import read_status

SCRIPT = """\
import multiprocessing, openmae
multiprocessing.set_start_method({method!r}, force=True)
openmae.train(None, {overrides!r})
"""


def run_script(path: Path, *, stdin: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a script, and return when all of its processes have closed the pipe of its output."""
    words = [sys.executable, "-"] if stdin else [sys.executable, str(path)]
    with path.open() as text:
        return subprocess.run(words, stdin=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("method", "changes", "key"),
    [
        ("fork", {"train.num_gpus": 2}, "num_gpus=2"),
        ("spawn", {"dataset.num_workers_per_gpu": 2}, "dataset.num_workers_per_gpu=2"),
        pytest.param(
            "forkserver", {"dataset.num_workers_per_gpu": 2}, "dataset.num_workers_per_gpu=2", marks=pytest.mark.slow
        ),
    ],
)
def test_a_script_without_a_guard_gets_one_short_message(tiny_overrides, tmp_path, method, changes, key):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(method=method, overrides=tiny_overrides(tmp_path / "run", changes)))
    done = run_script(script)
    assert done.returncode == 1
    assert done.stdout.count("Traceback") == 1
    assert len(done.stdout[done.stdout.index("Traceback") :].splitlines()) < 16
    assert f"SpecError: {key} starts processes that import the main script ({script}), and it calls" in done.stdout
    assert '    if __name__ == "__main__":\n        openmae.train(...)' in done.stdout
    assert "memory" not in done.stdout
    assert read_status(tmp_path / "run" / "status.json")[-1]["status"] == "FAILURE"


@pytest.mark.slow(reason="five processes import torch")
def test_a_script_with_a_guard_runs_where_processes_are_spawned(tiny_overrides, tmp_path):
    script = tmp_path / "script.py"
    changes = {"train.num_gpus": 2, "dataset.num_workers_per_gpu": 1, "train.num_epochs": 1}
    lines = SCRIPT.format(method="spawn", overrides=tiny_overrides(tmp_path / "run", changes)).splitlines()
    guarded = [lines[0], 'if __name__ == "__main__":', *(f"    {line}" for line in lines[1:])]
    script.write_text("\n".join(guarded))
    done = run_script(script)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("pretrain recipe") == 1


@pytest.mark.integration
def test_a_script_from_standard_input_is_an_error(tiny_overrides, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(method="fork", overrides=tiny_overrides(tmp_path / "run", {"train.num_gpus": 2})))
    done = run_script(script, stdin=True)
    assert done.returncode == 1
    assert "num_gpus=2 starts processes that import the main script, but there is no file <stdin>." in done.stdout
    assert "Save the script as a file" in done.stdout


def test_other_errors_are_passed_through():
    with pytest.raises(ZeroDivisionError), watch_for_reruns("num_gpus=2"):
        raise ZeroDivisionError
    assert "OPENMAE_RERUN" not in os.environ


@pytest.mark.parametrize(
    ("num_gpus", "strategy", "key"),
    [(2, "ddp", "train.num_gpus=1"), (1, "fsdp", "train.distributed_strategy=ddp")],
)
def test_a_notebook_cannot_start_processes(monkeypatch, num_gpus, strategy, key):
    monkeypatch.setattr(sys, "ps1", "In [1]: ", raising=False)  # IPython sets it, in a terminal and in a kernel
    with pytest.raises(SpecError, match="cannot be started from a notebook") as caught:
        build_fabric("train", num_gpus, (0,), 1, strategy=strategy)
    assert caught.value.fix.startswith(f"Set {key}, or put the options into a file and run `mae train -e spec.yaml`")
    build_fabric("train", 1, (0,), 1)
