"""``mae quickstart``: show in a few minutes on a laptop that pretraining on unlabelled images helps.

scikit-learn ships 1,797 scanned handwritten digits. A small ViT is pretrained on 1,297 of them without labels, then
fine-tuned on ten labelled images per digit. It is compared with the same model trained on the labelled images from
random weights: for as many epochs as the fine-tuning, and for about the time of pretraining and fine-tuning together.
All are evaluated on the other 500 digits. Actions, specs and files are the same as in any other run.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from PIL import Image

from openmae.actions import train
from openmae.actions.run import show_table
from openmae.errors import UserError
from openmae.results.images import save_bar_comparison
from openmae.results.metrics_csv import read_metrics
from openmae.results.report import Code, Figure, Numbers, Section, Table, Text, write_report
from openmae.spec.load import load_spec
from openmae.spec.tree import nest
from openmae.storage import layout
from openmae.storage.atomic import make_folder, write_atomically

SIZE = 32  # px; the scans are 8 x 8
HELD_OUT = 500
LABELS_PER_DIGIT = 10
PRETRAIN_EPOCHS = 18
FINETUNE_EPOCHS = 40
_MADE_BY = "made by mae quickstart"

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class Outcome:
    """A finished training run.

    Attributes:
        metrics: its last metrics.
        seconds: how long it took.
        pace: images per second in training.
    """

    metrics: Mapping[str, float]
    seconds: float
    pace: float


def run(results_dir: Path, seed: int) -> dict[str, float]:
    """Pretrain and fine-tune a model, train the same model from scratch twice, and compare them.

    Args:
        results_dir: folder for the images, the specs, one folder per training run, and report.html. The results of an
            earlier quickstart in it are replaced.
        seed: random seed of all runs.

    Returns:
        Accuracies on the held-out digits, in [0, 1]: ``pretrained``, ``scratch`` (with the epochs of the fine-tuning)
        and ``scratch_equal_time`` (for about the time of pretraining and fine-tuning).

    Raises:
        UserError: ``results_dir`` contains anything but the results of an earlier quickstart.
    """
    folder = _clear(results_dir)
    write_digits(folder / "images")
    log.info("Step 1 of 4: pretraining on unlabelled digits.")
    pretraining = _train(folder, "pretrain", _pretrain_spec(folder, seed))
    backbone = folder / "pretrain" / "train" / layout.BACKBONE
    log.info("Step 2 of 4: fine-tuning the pretrained model on %d labelled images per digit.", LABELS_PER_DIGIT)
    pretrained = _train(folder, "finetune", _finetune_spec(folder, "finetune", seed, backbone))
    log.info("Step 3 of 4: training the same model from scratch, for comparison.")
    scratch = _train(folder, "scratch", _finetune_spec(folder, "scratch", seed, None))
    log.info("Step 4 of 4: training it from scratch for about as long as steps 1 and 2 together.")
    seconds = pretraining.seconds + pretrained.seconds
    epochs = FINETUNE_EPOCHS + round((seconds - scratch.seconds) * scratch.pace / (10 * LABELS_PER_DIGIT))
    longer = _train(folder, "scratch_longer", _finetune_spec(folder, "scratch_longer", seed, None, epochs))
    rows = [
        ("pretrained, then fine-tuned", pretrained.metrics["ACC_all"], seconds),
        ("from scratch, same epochs", scratch.metrics["ACC_all"], scratch.seconds),
        ("from scratch, same time", longer.metrics["ACC_all"], longer.seconds),
    ]
    show_table(
        f"Accuracy on {HELD_OUT} held-out digits, {LABELS_PER_DIGIT} labelled images per digit",
        [(label, f"{accuracy:.1%}   in {seconds:.0f} s") for label, accuracy, seconds in rows],
    )
    log.info("Open %s to see the comparison and the reconstructions.", _report(folder, rows))
    runs = {"pretrained": pretrained, "scratch": scratch, "scratch_equal_time": longer}
    return {name: outcome.metrics["ACC_all"] for name, outcome in runs.items()}


def write_digits(folder: Path) -> None:
    """Write PNG files to ``unlabelled/``, ``labelled/<digit>/`` (ten each) and ``held_out/<digit>/``."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    labelled = dict.fromkeys(range(10), 0)
    for position, number in enumerate(order):
        digit = int(digits.target[number])
        pixels = (255 - digits.images[number] * (255 / 16)).astype(np.uint8)  # ink is 0 to 16
        image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        if position < HELD_OUT:
            _save(image, folder / "held_out" / str(digit) / f"{number:04d}.png")
            continue
        _save(image, folder / "unlabelled" / f"{number:04d}.png")
        if labelled[digit] < LABELS_PER_DIGIT:
            labelled[digit] += 1
            _save(image, folder / "labelled" / str(digit) / f"{number:04d}.png")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _clear(folder: Path) -> Path:
    """Create the folder, or empty one that an earlier quickstart has created; refuse any other non-empty folder."""
    marker = folder / "README.txt"
    if folder.is_dir() and any(folder.iterdir()):
        if not marker.is_file() or _MADE_BY not in marker.read_text(encoding="utf-8", errors="replace"):
            raise UserError(
                f"--results_dir: {folder} is not empty, and was not created by an earlier quickstart.",
                "Choose a new folder: mae quickstart --results_dir DIR.",
            )
        shutil.rmtree(folder)
    make_folder(folder)
    write_atomically(marker, f"This folder was {_MADE_BY}. The next quickstart with this results_dir replaces it.\n")
    return folder


def _train(folder: Path, name: str, spec: Mapping[str, Any]) -> Outcome:
    """Write the spec to ``<name>.yaml`` and run it like ``mae train -e <name>.yaml``."""
    path = folder / f"{name}.yaml"
    write_atomically(path, yaml.safe_dump(dict(spec), sort_keys=False))
    start = time.perf_counter()
    metrics = train.run(load_spec(path, action="train"))
    seconds = time.perf_counter() - start
    rows = read_metrics(folder / name / "train" / layout.METRICS)
    return Outcome(metrics, seconds, median(row["images_per_s"] for row in rows if "images_per_s" in row))


def _pretrain_spec(folder: Path, seed: int) -> dict[str, Any]:
    settings = {
        "model.mask_ratio": 0.5,
        "model.decoder_depth": 1,
        "model.decoder_embed_dim": 128,
        "dataset.batch_size": 32,
        "train.num_epochs": PRETRAIN_EPOCHS,
        "train.validation_interval": 9,
        "train.checkpoint_interval": 9,
        "train.optim.lr": 7e-4,
        "train.optim.warmup_epochs": 2,
    }
    return _spec(folder, "pretrain", "unlabelled", seed, settings)


def _finetune_spec(
    folder: Path, name: str, seed: int, backbone: Path | None, epochs: int = FINETUNE_EPOCHS
) -> dict[str, Any]:
    settings = {
        "dataset.batch_size": 10,
        "dataset.augmentation.auto_aug": "",
        "dataset.augmentation.mixup": 0.0,
        "dataset.augmentation.cutmix": 0.0,
        "train.stage": "finetune",
        "train.pretrained_model_path": str(backbone or ""),
        "train.num_epochs": epochs,
        "train.validation_interval": max(1, epochs // 2),
        "train.checkpoint_interval": epochs,
        "train.optim.lr": 5e-4,
        "train.optim.warmup_epochs": 5,
        # layer decay protects pretrained layers; randomly initialized ones need the full learning rate
        "train.optim.layer_decay": 0.75 if backbone else 1.0,
    }
    return _spec(folder, name, "labelled", seed, settings)


def _spec(folder: Path, name: str, images: str, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    common = {
        "results_dir": str(folder / name),
        "model.arch": "vit_tiny_patch16",
        "model.patch_size": 8,
        "model.in_chans": 1,
        "dataset.train_data_sources": str(folder / "images" / images),
        "dataset.val_data_sources": str(folder / "images" / "held_out"),
        "dataset.num_workers_per_gpu": 0,
        "dataset.augmentation.input_size": SIZE,
        "dataset.augmentation.min_scale": 0.6,
        "dataset.augmentation.hflip": 0.0,
        "train.keep_checkpoints": 1,
        "train.seed": seed,
        "train.optim.lr_scheduler": "cosine",
        "wandb.enable": False,
    }
    return nest({**common, **settings})


def _report(folder: Path, rows: list[tuple[str, float, float]]) -> Path:
    """Write ``report.html`` from label, accuracy and seconds of each model."""
    cells = [(label, f"{accuracy:.1%}", f"{seconds:.0f} s") for label, accuracy, seconds in rows]
    bars = save_bar_comparison(
        {label: accuracy for label, accuracy, _ in rows},
        folder / "accuracies.png",
        title="Gain from pretraining on unlabelled images",
        subtitle=f"accuracy on {HELD_OUT} held-out digits, {LABELS_PER_DIGIT} labelled images per digit",
        notes={label: seconds for label, _, seconds in cells},
    )
    pretraining = folder / "pretrain" / "train"
    sections: list[Section] = [
        Numbers("", {label: accuracy for label, accuracy, _ in cells}),
        Figure("Accuracy", bars, "All have the same architecture and the same labelled images."),
        Figure(
            "Reconstructions",
            pretraining / layout.RECONSTRUCTIONS / "last.png",
            "Held-out digits: original, masked, prediction, and prediction with visible patches.",
        ),
        Figure("Pretraining", pretraining / layout.CURVES, "kNN and the linear probe classify the frozen features."),
        Table("Time", ("model", "accuracy", "time"), cells, caption="The time of the first row includes pretraining."),
        Text(
            "Your own images",
            "The specs below are in this folder. To use one for your images, copy it and change results_dir, "
            "dataset.train_data_sources, dataset.val_data_sources, model.in_chans (3 for colour) and "
            "dataset.augmentation.input_size. The README describes the next steps.",
        ),
        *(
            Code(f"{name}.yaml", (folder / f"{name}.yaml").read_text(encoding="utf-8"))
            for name in ("pretrain", "finetune")
        ),
    ]
    return write_report(folder, "OpenMAE quickstart", sections, subtitle="handwritten digits · ViT-tiny, 8-px patches")
