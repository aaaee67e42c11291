"""The script for runners without containers, and a runner that knows the contract alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tests.helpers.contract_runner import tune

from openmae.skill import FOLDER, NAME

ROOT = Path(__file__).parents[2]
SCRIPT = FOLDER / "scripts" / "run_action.py"
SEARCHED = {
    f"train.optim.{name}" for name in ("lr", "weight_decay", "momentum", "warmup_epochs", "backbone_multiplier")
}
SMALL = {
    "train.stage": "finetune",
    "train.num_epochs": 1,
    "model.arch": "vit_tiny_patch16",
    "dataset.augmentation.input_size": 32,
    "dataset.batch_size": 8,
    "dataset.num_workers_per_gpu": 0,
    "wandb.enable": False,
}


def start(action: str, spec: dict, folder: Path, **more) -> subprocess.CompletedProcess:
    path = folder / "request.yaml"
    path.write_text(yaml.safe_dump(spec))
    return subprocess.run([sys.executable, SCRIPT, action, path], capture_output=True, text=True, check=False, **more)


def status(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "status.json").read_text().splitlines()]


def test_invalid_input_exits_with_2_and_is_in_status_json(tmp_path):
    done = start("train", {"results_dir": str(tmp_path / "out"), "train": {"num_epochs": 0}}, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "train.num_epochs (line 3): must be an integer >= 1, got 0." in done.stderr
    (line,) = status(tmp_path / "out" / "train")
    assert (line["status"], line["verbosity"]) == ("FAILURE", "ERROR")
    assert "must be an integer >= 1, got 0" in line["message"]


def test_missing_data_is_reported_once(tmp_path):
    spec = {"results_dir": str(tmp_path / "out"), "dataset": {"train_data_sources": str(tmp_path / "none")}}
    assert start("train", spec, tmp_path).returncode == 2
    lines = status(tmp_path / "out" / "train")
    assert [line["status"] for line in lines].count("FAILURE") == 1
    assert "There is no file or folder" in lines[-1]["message"]


@pytest.mark.parametrize("arguments", [(), ("train",), ("train", "a.yaml", "b=1")])
def test_wrong_arguments_exit_with_2(arguments):
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: run_action.py ACTION SPEC.yaml\n")


@pytest.mark.parametrize("text", [None, "train: [", "- 1", "train: 1", "results_dir: s3://bucket/x\n"])
def test_the_exit_code_without_a_results_folder(text, tmp_path):
    if text is not None:
        (tmp_path / "a.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, SCRIPT, "train", tmp_path / "a.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("status.json"))


@pytest.mark.slow(reason="starts a training run")
def test_sigterm_writes_a_checkpoint_first(place):
    spec = {
        "results_dir": str(place / "out"),
        "model": {"arch": "vit_tiny_patch16"},
        "dataset": {
            "train_data_sources": str(place / "photos"),
            "batch_size": 4,
            "num_workers_per_gpu": 0,
            "augmentation": {"input_size": 32},
        },
        "train": {"num_epochs": 100_000},
        "wandb": {"enable": False},
    }
    (place / "request.yaml").write_text(yaml.safe_dump(spec))
    process = subprocess.Popen([sys.executable, SCRIPT, "train", place / "request.yaml"], stderr=subprocess.DEVNULL)
    try:
        log, deadline = place / "out/train/status.json", time.monotonic() + 120
        while not (log.is_file() and '"kpi"' in log.read_text()):
            assert process.poll() is None, "the training ended by itself"
            assert time.monotonic() < deadline, "no epoch ended in 120 s"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75, "it asks to be started again"
    finally:
        process.kill()
        process.wait()
    assert list((place / "out/train").glob("model_epoch_*_step_*.pth"))
    assert status(place / "out/train")[-1]["status"] == "FAILURE"


def test_the_exit_code_with_a_read_only_folder(tmp_path):
    (tmp_path / "file").write_text("")
    done = start("train", {"results_dir": str(tmp_path / "file"), "train": {"num_epochs": 0}}, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "status.json could not be written" in done.stderr


def check_tuning(done: list, longer: tuple, base: dict) -> None:
    epochs = base["train.num_epochs"]
    assert [code for code, *_ in done] == [0] * len(done)
    assert all(0 <= metric <= 1 for _, metric, *_ in done)
    drawn = [{key: value for key, value in values.items() if key not in base} for *_, values in done]
    assert all(set(values) == SEARCHED for values in drawn)
    assert len({json.dumps(values) for values in drawn}) == len(done), "the draws are all the same"
    assert all(checkpoints[-1].name.startswith(f"model_epoch_{epochs:03d}_") for _, _, checkpoints, _ in done)
    code, metric, checkpoints = longer
    assert (code, 0 <= metric <= 1) == (0, True)
    written = [int(path.name.split("_")[2]) for path in checkpoints]
    assert written == list(range(epochs + 1, 2 * epochs + 1)), "it began anew and did not resume"


@pytest.mark.slow(reason="trains three times")
def test_a_runner_by_the_contract_tunes(place):
    """The mechanism, on a handful of pictures."""
    skill = Path(shutil.copytree(FOLDER, place / "skills" / NAME))
    base = SMALL | {
        "dataset.train_data_sources": str(place / "labelled/train"),
        "dataset.val_data_sources": str(place / "labelled/val"),
    }
    check_tuning(*tune(skill, sys.executable, base, place / "tuned", trials=2), base)


@pytest.mark.slow(reason="installs the wheel and all that it needs into a new environment, then trains five times")
def test_in_a_fresh_environment_with_only_the_wheel(tmp_path, monkeypatch):
    """Done when: wheel, install, validate, four trials on the quickstart's digits."""
    pytest.importorskip("hatchling", reason="builds the wheel")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    made = subprocess.run([sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True, check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python, mae = tmp_path / "venv/bin/python", tmp_path / "venv/bin/mae"
    wheel = tmp_path / made.stdout.split()[-1]
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(pip, check=True, cwd=tmp_path)
    digits = "from pathlib import Path; from openmae.quickstart import write_digits; write_digits(Path('images'))"
    subprocess.run([python, "-c", digits], check=True, cwd=tmp_path)
    subprocess.run([mae, "skill", "install", tmp_path / "skills"], check=True, cwd=tmp_path)
    valid = subprocess.run(
        [mae, "skill", "validate", tmp_path / "skills" / NAME], check=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert "is valid." in valid.stdout
    base = SMALL | {
        "train.num_epochs": 2,
        "model.patch_size": 8,
        "model.in_chans": 1,
        "dataset.batch_size": 20,
        "dataset.train_data_sources": str(tmp_path / "images/labelled"),
        "dataset.val_data_sources": str(tmp_path / "images/held_out"),
    }
    check_tuning(*tune(tmp_path / "skills" / NAME, python, base, tmp_path / "tuned", trials=4), base)
    shutil.rmtree(tmp_path / "venv")
