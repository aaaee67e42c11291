"""What the recipes are worth: accuracies on small image sets, with equal time for every recipe.

A model is pretrained on the unlabelled images of a set with a recipe, and fine-tuned on a few labelled ones with the
same recipe; the same model is also trained from scratch. ``auto`` is also run without one of its rules at a time.
Architecture, image size and patch size are the same for all. Every training gets the same seconds, by the epochs that a
measured step allows. Finished trainings are kept, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openmae.actions import train
from openmae.actions.facts import find_facts, measure_step
from openmae.actions.sources import open_training_data
from openmae.spec.load import load_spec
from openmae.spec.recipe import choose
from openmae.storage import layout
from openmae.storage.atomic import write_atomically

from .image_sets import LABELS, SETS, ImageSet, write_set
from .report import RESULTS, Report

FOLDER = RESULTS / "recipes"
_AUGMENTATION = "dataset.augmentation"
#: Rules of ``auto`` that are switched off, by the published default of the options that they choose.
WITHOUT: dict[str, dict[str, Any]] = {
    "small decoder": {"model.decoder_depth": 8, "model.decoder_embed_dim": 512},
    "no mixing": {f"{_AUGMENTATION}.mixup": 0.8, f"{_AUGMENTATION}.cutmix": 1.0},
    "no RandAugment": {f"{_AUGMENTATION}.auto_aug": "rand-m9-mstd0.5-inc1"},
    "gentle crops": {f"{_AUGMENTATION}.min_scale": 0.1},
    "learning rate": {"train.optim.lr": 2e-4},
    "layer decay 1 from scratch": {"train.optim.layer_decay": 0.75},
    "bf16": {"train.precision": "fp32"},
}
_PRETRAINING_RULES = ("small decoder", "learning rate", "bf16")
_ARCHS = ("vit_tiny_patch16", "convnextv2_atto", "hiera_tiny_224")


@dataclass(frozen=True)
class Plan:
    """The size of the benchmark; ``pretrain_seconds`` and ``finetune_seconds`` are the time of one training."""

    sets: Sequence[str] = tuple(SETS)
    archs: Sequence[str] = _ARCHS
    recipes: Sequence[str] = ("auto", "tao", "paper")
    labels: Sequence[int] = LABELS
    seeds: Sequence[int] = (0, 1, 2)
    without: Sequence[str] = tuple(WITHOUT)
    pretrain_seconds: float = 120.0
    finetune_seconds: float = 40.0
    images: int = 2000


QUICK = Plan(("textures",), _ARCHS[:1], ("auto",), LABELS[:1], (0,), (), 1.0, 1.0, 120)


@dataclass(frozen=True)
class Training:
    """One training; ``labels`` is 0 for pretraining, and ``without`` a rule that is switched off."""

    set: str
    arch: str
    recipe: str
    seed: int
    labels: int = 0
    pretrained: bool = False
    without: str = ""

    @property
    def name(self) -> str:
        """Return a name for its results."""
        start = "" if not self.labels else "-pretrained" if self.pretrained else "-scratch"
        rule = f"-without-{self.without.replace(' ', '-')}" if self.without else ""
        return f"{self.set}-{self.arch}-{self.recipe}-{self.labels}{start}{rule}-seed{self.seed}"

    @property
    def source(self) -> Training:
        """Return the pretraining that it starts from: without the same rule, if that is one of pretraining."""
        rule = self.without if self.without in _PRETRAINING_RULES else ""
        return Training(self.set, self.arch, self.recipe, self.seed, without=rule)


def run(quick: bool) -> Report:
    """Make all trainings that are missing, and return the table.

    Raises:
        RunError: a training failed.
    """
    plan = QUICK if quick else Plan()
    table = Results(FOLDER.with_name(f"{FOLDER.name}-quick") if quick else FOLDER, plan)
    for number, training in enumerate(trainings := list(trainings_of(plan)), 1):
        metrics = table.metrics(training)
        accuracy = metrics.get("ACC_all", metrics.get("probe_acc", 0.0))
        print(f"{number} of {len(trainings)}: {training.name}: {accuracy:.1%}", file=sys.stderr)
    return report(table, plan)


def trainings_of(plan: Plan) -> Iterator[Training]:
    """Yield all trainings, seed by seed, so that a part of them can be looked at already."""
    for seed in plan.seeds:
        for arch in plan.archs:
            for name in plan.sets:
                for recipe in plan.recipes:
                    for labels in plan.labels:
                        yield Training(name, arch, recipe, seed, labels, pretrained=True)
                        yield Training(name, arch, recipe, seed, labels, pretrained=False)
                for rule in plan.without if arch == plan.archs[0] else ():
                    pretrained = rule != "layer decay 1 from scratch"
                    yield Training(name, arch, "auto", seed, 10, pretrained, rule)


@dataclass
class Results:
    """The metrics of finished trainings, in ``folder``; what is missing is trained."""

    folder: Path
    plan: Plan
    _sets: dict[str, ImageSet] = field(default_factory=dict)

    def metrics(self, training: Training) -> dict[str, float]:
        """Return the last metrics of a training."""
        path = self.folder / "metrics" / f"{training.name}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(self._train(training)))
        return json.loads(path.read_text(encoding="utf-8"))

    def known(self, training: Training) -> float | None:
        """Return the accuracy of a training if it is finished."""
        path = self.folder / "metrics" / f"{training.name}.json"
        return json.loads(path.read_text(encoding="utf-8"))["ACC_all"] if path.is_file() else None

    def _train(self, training: Training) -> dict[str, float]:
        folder = self.folder / "runs" / training.name
        overrides = self._overrides(training)
        if training.pretrained:
            backbone = self.folder / "runs" / training.source.name / "train" / layout.BACKBONE
            if not backbone.is_file():
                self.metrics(training.source)
            overrides["train.pretrained_model_path"] = str(backbone)
        seconds = self.plan.finetune_seconds if training.labels else self.plan.pretrain_seconds
        epochs = _epochs_in(seconds, overrides)
        shutil.rmtree(folder, ignore_errors=True)
        more = {"results_dir": str(folder), "train.num_epochs": epochs, "train.keep_checkpoints": 1}
        rare = {"train.checkpoint_interval": epochs, "train.validation_interval": max(1, epochs // 4)}
        start = time.perf_counter()
        metrics = train.run(_spec({**overrides, **more, **rare}))
        took = time.perf_counter() - start
        for checkpoint in (folder / "train").glob("*.pth"):
            checkpoint.unlink()
        return {**metrics, "epochs": epochs, "seconds": took}

    def _overrides(self, training: Training) -> dict[str, Any]:
        images = self._set(training.set)
        source = images.labelled(training.labels) if training.labels else images.folder / "unlabelled"
        vit = training.arch.startswith("vit")
        return {
            "model.arch": training.arch,
            **({"model.patch_size": images.size // 8} if vit else {}),
            f"{_AUGMENTATION}.input_size": images.size if vit else 128,
            "dataset.train_data_sources": str(source),
            "dataset.val_data_sources": str(images.folder / "held_out"),
            "dataset.num_workers_per_gpu": 0,
            "train.stage": "finetune" if training.labels else "pretrain",
            "train.recipe": training.recipe,
            "train.seed": training.seed,
            "wandb.enable": False,
            # TAO's batch of 1 image cannot be mixed
            **({"dataset.batch_size": 2} if training.recipe == "tao" else {}),
            **WITHOUT.get(training.without, {}),
        }

    def _set(self, name: str) -> ImageSet:
        if name not in self._sets:
            self._sets[name] = write_set(name, self.folder / "images" / name, self.plan.images)
        return self._sets[name]


def _spec(overrides: Mapping[str, Any]) -> Any:
    return load_spec(None, [f"{key}={json.dumps(value)}" for key, value in overrides.items()], action="train")


def _epochs_in(seconds: float, overrides: Mapping[str, Any]) -> int:
    """Return the epochs that fit into some seconds, by a measured step."""
    spec = _spec(overrides)
    images, held_out = open_training_data(spec)
    facts = find_facts(spec, images, held_out, None)
    chosen = choose(spec, facts)
    pace = measure_step(chosen, facts, images).seconds_per_image or 1.0
    return max(1, int(seconds / (pace * len(images))))


def report(table: Results, plan: Plan) -> Report:
    """Return mean and spread of the accuracies over the seeds; a dash where a training is missing."""
    columns = ["set", "architecture", "labels per class"]
    columns += [f"{recipe}, {start}" for recipe in plan.recipes for start in ("pretrained", "scratch")]
    rows, data = [], []
    for name in plan.sets:
        for arch in plan.archs:
            for labels in plan.labels:
                cells = [
                    [table.known(Training(name, arch, recipe, seed, labels, pretrained)) for seed in plan.seeds]
                    for recipe in plan.recipes
                    for pretrained in (True, False)
                ]
                rows.append([name, arch, str(labels), *map(_cell, cells)])
                data.append({"set": name, "arch": arch, "labels": labels, "accuracies": cells})
    for rule in plan.without:
        pretrained = rule != "layer decay 1 from scratch"
        for name in plan.sets:
            with_rule, without = (
                [table.known(Training(name, plan.archs[0], "auto", seed, 10, pretrained, off)) for seed in plan.seeds]
                for off in ("", rule)
            )
            rows.append([name, plan.archs[0], "10", f"with {rule}", _cell(with_rule), "without", _cell(without)])
            data.append({"set": name, "rule": rule, "with": with_rule, "without": without})
    width = len(columns)
    rows = [[*row, *[""] * (width - len(row))][:width] for row in rows]
    notes = [
        f"Accuracy on held-out images in %, mean and range over {len(plan.seeds)} seeds. Each pretraining got "
        f"{plan.pretrain_seconds:g} s, each fine-tuning {plan.finetune_seconds:g} s.",
        "tao: TAO's published defaults, but batches of 2 images instead of 1, which Mixup needs.",
    ]
    return Report("What the recipes are worth", columns, rows, data, notes)


def _cell(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.mean(known):.1f} ({min(known):.1f} to {max(known):.1f})"
