"""Systems that lack what Linux has: a stand-in for macOS, in processes that believe to run there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.integration

# Read by every Python process of the run, those that are spawned among them. psutil, which would load its library for
# macOS, is imported before; and it alone still sees /proc, in place of the calls of macOS.
_SYSTEM = """
import os, pathlib, signal, sys, sysconfig, urllib.request  # these load libraries by the name of the system
import psutil
sysconfig.get_config_vars()
for module, names in (
    (signal, ("sigwaitinfo", "sigtimedwait", "pidfd_send_signal")),
    (os, ("sched_getaffinity", "sched_setaffinity", "memfd_create", "pidfd_open", "posix_fadvise", "getrandom")),
):
    for name in names:
        vars(module).pop(name, None)
sys.platform = "darwin"
def hide(name):
    real = getattr(pathlib.Path, name)
    def call(self, *arguments, **options):
        if str(self).startswith(("/proc", "/dev/shm")):
            if name in ("is_dir", "is_file", "exists"):
                return False
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return real(self, *arguments, **options)
    setattr(pathlib.Path, name, call)
for name in ("is_dir", "is_file", "exists", "read_text", "open"):
    hide(name)
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def mae(tmp_path: Path, *arguments: str) -> str:
    """Run ``mae`` there, and return what it printed."""
    folder = tmp_path / "system"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SYSTEM)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OPENMAE_CACHE": str(tmp_path / "cache"),
    }
    words = [sys.executable, "-m", "openmae", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert "Traceback" not in text, text
    return text


def arguments(images: Path, *more: str) -> list[str]:
    return [
        f"dataset.{source}_data_sources={images}" for source in ("train", "val", "test")
    ] + [
        "dataset.batch_size=4",
        "dataset.augmentation.input_size=32",
        "model.arch=vit_tiny_patch16",
        "train.num_epochs=1",
        "wandb.enable=false",
        *more,
    ]  # fmt: skip


@pytest.mark.slow(reason="three commands whose workers import torch again")
def test_actions_run_with_workers_that_are_spawned(images, tmp_path):
    common = arguments(images, f"results_dir={tmp_path}", "train.stage=finetune", "dataset.num_workers_per_gpu=1")
    mae(tmp_path, "train", *common)
    (checkpoint,) = (tmp_path / "train").glob("model_epoch_*.pth")
    in_one = "dataset.num_workers_per_gpu=0"
    mae(tmp_path, "evaluate", *common, in_one, f"evaluate.checkpoint={checkpoint}")
    mae(tmp_path, "inference", *common, in_one, f"inference.checkpoint={checkpoint}")
    assert (tmp_path / "inference" / "results.csv").is_file()


@pytest.mark.slow(reason="a job of two processes that are spawned")
def test_a_job_runs_and_is_seen(images, tmp_path):
    root = ["--root", str(tmp_path / "jobs")]
    spec = arguments(images, f"results_dir={tmp_path}", "train.num_gpus=2", "dataset.num_workers_per_gpu=0")
    mae(tmp_path, "jobs", "submit", "train", *spec, *root, "--automl", "off", "--wait")
    assert "COMPLETE" in mae(tmp_path, "jobs", "list", *root)
