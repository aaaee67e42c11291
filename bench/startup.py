"""Seconds until commands answer, and until a training has made its first step."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml

from openmae.errors import RunError
from openmae.results.metrics_csv import read_metrics

from .input import write_photographs
from .measure import compare, load_average
from .report import Report

HELP, CHECK, FIRST_STEP = "mae --help", "mae spec check", "mae train, until the first step is done"
PYTHON, TORCH = "python -c pass", "python -c 'import torch'"
TARGETS = {HELP: 0.25, CHECK: 0.6}  # seconds
_TURNS = {False: 5, True: 2}  # by quick
_TRAININGS = {False: 3, True: 1}
_BATCH = 8
_PATIENCE = 300.0  # seconds for a first step
_POLL = 0.005


def run(quick: bool) -> Report:
    """Time processes from their start; files are in memory, as after the first time.

    Raises:
        RunError: a command fails.
    """
    load = load_average()
    with TemporaryDirectory() as name:
        folder = Path(name)
        spec = write_spec(folder, quick)
        found = _commands(spec, _TURNS[quick])
        found[FIRST_STEP] = tuple(first_step(spec, folder / f"run{turn}") for turn in range(_TRAININGS[quick]))
    rows, data = [], []
    for what, seconds in found.items():
        median, target = statistics.median(seconds), None if quick else TARGETS.get(what)
        met = None if target is None else median <= target
        verdict = "" if target is None else f"{target:g} s: {'met' if met else 'MISSED'}"
        rows.append((what, f"{median:.2f}", f"{min(seconds):.2f} to {max(seconds):.2f}", verdict))
        data.append({"what": what, "seconds": list(seconds), "median": median, "target": target, "met": met})
    notes = [
        f"Wall time of new processes, run alternately; median of {_TURNS[quick]} ({_TRAININGS[quick]} trainings). The "
        "files are in memory, as after the first time.",
        f"First step: {_arch(quick)}, {_side(quick)} px, batch {_BATCH}, {torch.get_num_threads()} threads, two "
        "workers that load JPEG files, from the start of the process to the first row of metrics.csv.",
        f"Load before the start: {load}; above 1 others were at work, and the figures are noisy.",
    ]
    columns = ("command", "seconds", "shortest to longest", "target")
    return Report("Start-up", columns, rows, {"load": load, "commands": data}, notes)


def write_spec(folder: Path, quick: bool) -> Path:
    """Write the images and the spec of a pretraining run of two batches."""
    (folder / "images").mkdir()
    write_photographs(folder / "images", (500, 375), 2 * _BATCH)
    tree = {
        "model": {"arch": _arch(quick)},
        "dataset": {
            "train_data_sources": str(folder / "images"),
            "batch_size": _BATCH,
            "augmentation": {"input_size": _side(quick)},
        },
        "train": {"num_epochs": 1, "optim": {"warmup_epochs": 0}},
        "wandb": {"enable": False},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def first_step(spec: Path, results: Path) -> float:
    """Seconds from the start of a training to its first row of metrics.

    Raises:
        RunError: it ended before, or took minutes.
    """
    metrics = results / "train" / "metrics.csv"
    with (results.with_suffix(".log")).open("w+") as log:
        start = time.perf_counter()
        arguments = ["train", "-e", str(spec), f"results_dir={results}"]
        training = subprocess.Popen([*_mae(), *arguments], stdout=log, stderr=log, env=_environment())
        try:
            while not (metrics.is_file() and any("train_loss" in row for row in read_metrics(metrics))):
                if training.poll() is not None or time.perf_counter() - start > _PATIENCE:
                    log.seek(0)
                    raise RunError(f"mae train made no step: {log.read()}", "Try it by hand: mae train --help.")
                time.sleep(_POLL)
            return time.perf_counter() - start
        finally:
            training.terminate()
            training.wait()


def _commands(spec: Path, turns: int) -> dict[str, tuple[float, ...]]:
    commands = {
        PYTHON: [sys.executable, "-c", "pass"],
        TORCH: [sys.executable, "-c", "import torch"],
        HELP: [*_mae(), "--help"],
        CHECK: [*_mae(), "spec", "check", "-e", str(spec)],
    }
    contestants = {name: _call(command) for name, command in commands.items()}
    found = compare(contestants, items=1, turns=turns, warm_up=1, turn_seconds=0)
    return {name: timing.seconds for name, timing in found.timings.items()}


def _call(command: list[str]) -> Callable[[], object]:
    def call() -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
        if done.returncode:
            raise RunError(f"{' '.join(command[1:])} failed: {done.stderr}", "Try it by hand.")

    return call


def _mae() -> list[str]:
    return [sys.executable, "-m", "openmae"]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def _arch(quick: bool) -> str:
    return "vit_tiny_patch16" if quick else "convnextv2_atto"


def _side(quick: bool) -> int:
    return 32 if quick else 224
