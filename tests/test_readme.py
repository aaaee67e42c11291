"""The commands of README run in its order, with fewer epochs, and README stays short."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import boto3
import botocore.exceptions
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, flags=re.DOTALL)


def test_readme_is_short() -> None:
    assert README.count("\n") < 200


def make_images(folder: Path, count: int, hue: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(hue)
    for number in range(count):
        pixels = rng.integers(0, 120, (12, 15, 3)).astype(np.uint8)
        pixels[:, :, hue % 3] += 120
        Image.fromarray(pixels).resize((300, 240), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


def check_serving(command: str, folder: Path, environment: dict[str, str]) -> None:
    """Start the server as README does, and ask it once."""
    server = subprocess.Popen(["bash", "-euc", f"exec {command.strip()}"], cwd=folder, env=environment)
    try:
        for _ in range(600):
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=5) as answer,
            ):
                assert answer.status == 200
                break
            assert server.poll() is None, "mae serve exited"
            time.sleep(0.1)
        image = next((folder / "labelled/val/red").iterdir()).read_bytes()
        request = urllib.request.Request("http://127.0.0.1:8000/predict", image, {"Content-Type": "image/jpeg"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)["predictions"][0]["class"] in ("red", "green")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)


def write_short_search(folder: Path) -> None:
    spec = {
        "model": {"arch": "convnextv2_atto"},
        "dataset": {
            "train_data_sources": "labelled/train",
            "val_data_sources": "labelled/val",
            "batch_size": 8,
            "num_workers_per_gpu": 0,
            "augmentation": {"input_size": 64},
        },
        "train": {"stage": "finetune", "num_epochs": 3},
        "automl": {"max_recommendations": 3},
        "wandb": {"enable": False},
    }
    (folder / "results/quickstart").mkdir(parents=True)
    (folder / "results/quickstart/finetune.yaml").write_text(json.dumps(spec), encoding="utf-8")


@pytest.mark.slow(reason="trains three times, searches, and builds an engine")
def test_commands_run(tmp_path: Path) -> None:
    make_images(tmp_path / "photos", 48, 0)
    for part, count in (("train", 16), ("val", 6)):
        for hue, name in enumerate(("red", "green")):
            make_images(tmp_path / "labelled" / part / name, count, hue)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    for language, text in BLOCKS:
        if "make quickstart" in text or "pip install" in text:  # test_make_quickstart_in_a_fresh_clone
            continue
        if "mae automl" in text:  # of the quickstart's fine-tuning: replaced by a short one of the images here
            write_short_search(tmp_path)
        if "mae export" in text:  # of the quickstart's checkpoint: replaced by the classifier that was just trained
            shutil.copytree(tmp_path / "runs/classes/train", tmp_path / "results/quickstart/finetune/train")
            shutil.copytree(tmp_path / "labelled/val", tmp_path / "results/quickstart/images/held_out")
        if "mae serve" in text:
            check_serving(text, tmp_path, environment)
            ran += 1
            continue
        text = re.sub(r"num_epochs=\d+", "num_epochs=2", text)
        text = text.replace("mae train ", "mae train train.num_epochs=2 ")
        command = ["bash", "-euc", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 7, "README shows fewer commands than it did"
    for made in (
        "runs/photos/train/report.html",
        "runs/api/train/report.html",
        "runs/classes/evaluate/report.html",
        "runs/classes/inference/results.csv",
        "results/tuned/automl/report.html",
        "results/tuned/automl/best.yaml",
        "deploy/digits.onnx",
        "deploy/digits.engine.json",
    ):
        assert (tmp_path / made).is_file(), made


@pytest.mark.slow(reason="trains, evaluates and exports as three jobs")
def test_the_jobs_example_runs_against_a_store(tmp_path: Path) -> None:
    """The only configuration is the environment's variables."""
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    (code,) = (text for text in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "import Client" in text)
    for part, count in (("train", 16), ("val", 6)):
        for hue, name in enumerate(("red", "green")):
            make_images(tmp_path / part / name, count, hue)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    store = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "reader",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    folders = {"OPENMAE_CACHE": str(tmp_path / "cache"), "OPENMAE_JOBS": str(tmp_path / "jobs")}
    environment = os.environ | store | folders | {"WANDB_MODE": "disabled"}
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL)
    try:
        client = boto3.client("s3", endpoint_url=store["AWS_ENDPOINT_URL"], region_name="us-east-1",
                              aws_access_key_id="reader", aws_secret_access_key="secret")  # fmt: skip
        for _ in range(300):
            with contextlib.suppress(botocore.exceptions.EndpointConnectionError):
                client.create_bucket(Bucket="bucket")
                break
            time.sleep(0.1)
        for part, folder in (("train", "train"), ("val", "eval")):
            archive = shutil.make_archive(str(tmp_path / f"images_{part}"), "gztar", tmp_path / part)
            client.upload_file(archive, "bucket", f"data/{folder}/images_{part}.tar.gz")
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("['COMPLETE', 'COMPLETE']"), done.stdout + done.stderr
        assert "parent_model" in done.stdout, "explain_job does not name the function that found the checkpoint"
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.mark.slow(reason="installs into a new environment, then runs the demonstration")
def test_make_quickstart_in_a_fresh_clone(tmp_path: Path) -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone")
    subprocess.run([git, "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    done = subprocess.run(["make", "quickstart"], cwd=tmp_path / "clone", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pretrained, then fine-tuned" in done.stdout + done.stderr
    assert (tmp_path / "clone" / "results" / "quickstart" / "report.html").is_file()
