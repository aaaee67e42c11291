"""``mae quickstart``: in a few minutes on a laptop, see that pretraining without labels helps.

scikit-learn ships 1,797 scanned handwritten digits. A small ViT is pretrained on 1,297 of them without labels, then
fine-tuned on ten labelled ones of each digit; the same fine-tuning from random weights stands beside it. Both are
measured on the 500 digits that neither saw. Everything is done by the same actions, specs and files as real work.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from openmae.actions import train
from openmae.actions.run import show_table
from openmae.errors import UserError
from openmae.results.images import save_bar_comparison
from openmae.results.report import Code, Figure, Numbers, Section, Table, Text, write_report
from openmae.spec.load import load_spec
from openmae.storage.atomic import make_folder, write_atomically

SIZE = 32  # px; the scans are 8 x 8
HELD_OUT = 500
LABELS_PER_DIGIT = 10
PRETRAIN_EPOCHS = 20
FINETUNE_EPOCHS = 40
_MADE_BY = "made by mae quickstart"

log = logging.getLogger("openmae")


@dataclass(frozen=True)
class Outcome:
    """One training: its last metrics and the seconds it took."""

    metrics: Mapping[str, float]
    seconds: float


def run(results_dir: Path, seed: int) -> dict[str, float]:
    """Pretrain, fine-tune, fine-tune from scratch; print and draw the comparison.

    Args:
        results_dir: gets images/, the specs, a folder for each training, and report.html. An earlier quickstart there
            is replaced.
        seed: of everything random.

    Returns:
        ``pretrained`` and ``scratch``: accuracies on the held-out digits, shares in [0, 1].

    Raises:
        UserError: ``results_dir`` holds something else.
    """
    folder = _clear(results_dir)
    write_digits(folder / "images")
    log.info("Step 1 of 3: pretraining on digits without labels.")
    pretraining = _train(folder, "pretrain", _pretrain_spec(folder, seed))
    backbone = folder / "pretrain" / "train" / "backbone.safetensors"
    log.info("Step 2 of 3: fine-tuning the pretrained model on %d labels a digit.", LABELS_PER_DIGIT)
    pretrained = _train(folder, "finetune", _finetune_spec(folder, "finetune", seed, backbone))
    log.info("Step 3 of 3: the same from scratch, for comparison.")
    scratch = _train(folder, "scratch", _finetune_spec(folder, "scratch", seed, None))
    accuracies = {"pretrained": pretrained.metrics["ACC_all"], "scratch": scratch.metrics["ACC_all"]}
    rows = [
        (
            "pretrained, then fine-tuned",
            f"{accuracies['pretrained']:.1%}",
            f"{pretraining.seconds + pretrained.seconds:.0f} s",
        ),
        ("fine-tuned from scratch", f"{accuracies['scratch']:.1%}", f"{scratch.seconds:.0f} s"),
    ]
    show_table(
        f"Accuracy on {HELD_OUT} held-out digits, {LABELS_PER_DIGIT} labels a digit",
        [(label, f"{accuracy}   in {seconds}") for label, accuracy, seconds in rows],
    )
    report = _report(folder, rows, accuracies)
    log.info("Open %s to see the reconstructions.", report)
    return accuracies


def write_digits(folder: Path) -> None:
    """Render the digits to PNG: ``unlabelled/``, ``labelled/<digit>/`` (ten of each) and ``held_out/<digit>/``."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    labelled = dict.fromkeys(range(10), 0)
    for place, number in enumerate(order):
        digit = int(digits.target[number])
        pixels = (255 - digits.images[number] * (255 / 16)).astype(np.uint8)  # ink is 0 to 16
        picture = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        if place < HELD_OUT:
            _save(picture, folder / "held_out" / str(digit) / f"{number:04d}.png")
            continue
        _save(picture, folder / "unlabelled" / f"{number:04d}.png")
        if labelled[digit] < LABELS_PER_DIGIT:
            labelled[digit] += 1
            _save(picture, folder / "labelled" / str(digit) / f"{number:04d}.png")


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _clear(folder: Path) -> Path:
    """An empty folder; what an earlier quickstart left in it goes, anything else is refused."""
    marker = folder / "README.txt"
    if folder.is_dir() and any(folder.iterdir()):
        if not marker.is_file() or _MADE_BY not in marker.read_text(encoding="utf-8", errors="replace"):
            raise UserError(
                f"--results_dir: {folder} is not empty, and not of an earlier quickstart.",
                "Give a new folder: mae quickstart --results_dir DIR.",
            )
        shutil.rmtree(folder)
    make_folder(folder)
    write_atomically(marker, f"This folder was {_MADE_BY}; the next quickstart into it replaces it.\n")
    return folder


def _train(folder: Path, name: str, spec: Mapping[str, Any]) -> Outcome:
    """Write the spec to ``<name>.yaml``, and train as ``mae train -e <name>.yaml`` would."""
    path = folder / f"{name}.yaml"
    write_atomically(path, yaml.safe_dump(dict(spec), sort_keys=False))
    start = time.perf_counter()
    metrics = train.run(load_spec(path, action="train"))
    return Outcome(metrics, time.perf_counter() - start)


def _pretrain_spec(folder: Path, seed: int) -> dict[str, Any]:
    return {
        "results_dir": str(folder / "pretrain"),
        "model": {**_MODEL, "mask_ratio": 0.5, "decoder_depth": 1, "decoder_embed_dim": 128},
        "dataset": {
            "train_data_sources": str(folder / "images" / "unlabelled"),
            "val_data_sources": str(folder / "images" / "held_out"),
            "batch_size": 32,
            "num_workers_per_gpu": 0,
            "augmentation": {"input_size": SIZE, "min_scale": 0.6, "hflip": 0.0},
        },
        "train": {
            "num_epochs": PRETRAIN_EPOCHS,
            "validation_interval": 5,
            "checkpoint_interval": 5,
            "keep_checkpoints": 1,
            "seed": seed,
            "optim": {"lr": 7e-4, "lr_scheduler": "cosine", "warmup_epochs": 2},
        },
        "wandb": {"enable": False},
    }


def _finetune_spec(folder: Path, name: str, seed: int, backbone: Path | None) -> dict[str, Any]:
    return {
        "results_dir": str(folder / name),
        "model": _MODEL,
        "dataset": {
            "train_data_sources": str(folder / "images" / "labelled"),
            "val_data_sources": str(folder / "images" / "held_out"),
            "batch_size": 10,
            "num_workers_per_gpu": 0,
            "augmentation": {
                "input_size": SIZE,
                "min_scale": 0.6,
                "hflip": 0.0,
                "auto_aug": "",
                "mixup": 0.0,
                "cutmix": 0.0,
            },
        },
        "train": {
            "stage": "finetune",
            "pretrained_model_path": str(backbone or ""),
            "num_epochs": FINETUNE_EPOCHS,
            "validation_interval": FINETUNE_EPOCHS // 4,
            "checkpoint_interval": FINETUNE_EPOCHS,
            "keep_checkpoints": 1,
            "seed": seed,
            # layer decay protects pretrained layers; random ones have to learn at the full rate
            "optim": {
                "lr": 5e-4,
                "lr_scheduler": "cosine",
                "warmup_epochs": 5,
                "layer_decay": 0.75 if backbone else 1.0,
            },
        },
        "wandb": {"enable": False},
    }


_MODEL = {"arch": "vit_tiny_patch16", "patch_size": 8, "in_chans": 1}


def _report(folder: Path, rows: list[tuple[str, str, str]], accuracies: Mapping[str, float]) -> Path:
    labels = {"pretrained": rows[0][0], "scratch": rows[1][0]}
    bars = save_bar_comparison(
        {labels[name]: value for name, value in accuracies.items()},
        folder / "accuracies.png",
        title="What pretraining without labels is worth",
        subtitle=f"accuracy on {HELD_OUT} held-out digits, {LABELS_PER_DIGIT} labels a digit",
        notes={row[0]: row[2] for row in rows},
    )
    pretraining = folder / "pretrain" / "train"
    sections: list[Section] = [
        Numbers("", {label: row[1] for label, row in zip(labels.values(), rows, strict=True)}),
        Figure("Accuracy", bars, "Both models had the same labels, architecture and number of epochs with labels."),
        Figure(
            "Reconstructions",
            pretraining / "reconstructions" / "last.png",
            "Held-out digits: from the units in the second column the model predicted those in the third.",
        ),
        Figure("Pretraining", pretraining / "curves.png", "kNN and linear probe read the frozen features."),
        Table("Time", ("model", "accuracy", "time"), rows, caption="The first row's time includes pretraining."),
        Text(
            "Your own images",
            "The specs below are in this folder. Change dataset.train_data_sources to a folder of your pictures and "
            "run mae train -e pretrain.yaml; README tells how to go on.",
        ),
        *(
            Code(f"{name}.yaml", (folder / f"{name}.yaml").read_text(encoding="utf-8"))
            for name in ("pretrain", "finetune")
        ),
    ]
    return write_report(folder, "OpenMAE quickstart", sections, subtitle="handwritten digits · ViT-tiny, 8-px patches")
