"""Accuracies of models trained with each recipe on small image sets, with equal time for every recipe.

A model is pretrained on the unlabelled images of a set with a recipe, and fine-tuned on a few labelled ones with the
same recipe; the same model is also trained from scratch. ``auto`` is also run without one of its rules at a time.
Architecture, image size and patch size are the same for all. ``auto`` chooses the length of fine-tuning itself; every
other training gets as long as the same one with ``auto``, or as many epochs. Every core makes one training at a time,
with one thread. Finished trainings are kept, so an interrupted benchmark continues where it was.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from openmae.actions import train
from openmae.actions.facts import find_facts, measure
from openmae.actions.sources import open_training_data
from openmae.results.metrics_csv import read_metrics
from openmae.spec.load import load_spec
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
_FROM_SCRATCH = "layer decay 1 from scratch"
_CHANGES_SPEED = ("small decoder", "bf16")
_PRETRAINED = {
    "vit_tiny_patch16": 24_000,
    "vit_small_patch16": 16_000,
    "convnextv2_atto": 16_000,
    "hiera_tiny_224": 8_000,
}
_NEVER = 10_000  # epochs
_ARCHS = ("vit_tiny_patch16", "convnextv2_atto", "hiera_tiny_224")


@dataclass(frozen=True)
class Plan:
    """The size of the benchmark.

    Attributes:
        archs: the architectures; all is measured for the first.
        decoders: architectures whose small decoder is compared with the paper's.
        part: sets for ablations, for trainings with equal epochs, and for the other architectures.
        pretrained: images of a pretraining with auto, counted once per epoch, by architecture.
        images: most images of a set.
        epochs: of a fine-tuning with auto; None: as many as it chooses.
    """

    sets: Sequence[str] = tuple(SETS)
    archs: Sequence[str] = _ARCHS
    decoders: Sequence[str] = ("vit_tiny_patch16", "vit_small_patch16", "hiera_tiny_224")
    recipes: Sequence[str] = ("auto", "tao", "paper")
    labels: Sequence[int] = (10, 5, 50)
    seeds: Sequence[int] = (0, 1, 2)
    without: Sequence[str] = tuple(WITHOUT)
    part: Sequence[str] = ("digits", "glyphs")
    pretrained: Mapping[str, int] = field(default_factory=lambda: dict(_PRETRAINED))
    images: int = 2000
    epochs: int | None = None


QUICK = Plan(("textures",), _ARCHS[:1], (), ("auto",), LABELS[:1], (0,), (), (), {_ARCHS[0]: 120}, 120, 1)


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        labels: labelled images per class; 0 for pretraining.
        without: a rule that is switched off.
        equal: what it has in common with other recipes: "time", or the "epochs" of auto's training.
    """

    set: str
    arch: str
    recipe: str
    seed: int
    labels: int = 0
    pretrained: bool = False
    without: str = ""
    equal: str = "time"

    @property
    def name(self) -> str:
        """Return a name for its results."""
        start = "" if not self.labels else "-pretrained" if self.pretrained else "-scratch"
        rule = f"-without-{self.without.replace(' ', '-')}" if self.without else ""
        equal = "-epochs" if self.equal == "epochs" else ""
        return f"{self.set}-{self.arch}-{self.recipe}-{self.labels}{start}{rule}{equal}-seed{self.seed}"

    @property
    def source(self) -> Training:
        """Return the pretraining that it starts from: without the same rule, if that is one of pretraining.

        With equal epochs, recipes differ in fine-tuning only.
        """
        if self.without in _PRETRAINING_RULES:
            return replace(self, labels=0, pretrained=False)
        recipe = "auto" if self.equal == "epochs" else self.recipe
        return Training(self.set, self.arch, recipe, self.seed)


def run(quick: bool) -> Report:
    """Make all trainings that are missing, and return the table.

    Raises:
        RunError: a training failed.
    """
    plan = QUICK if quick else Plan()
    folder = FOLDER.with_name(f"{FOLDER.name}-quick") if quick else FOLDER
    for name in plan.sets:
        write_set(name, folder / "images" / name, plan.images)
    trainings = list(dict.fromkeys(trainings_of(plan)))
    cores = os.sched_getaffinity(0)
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for core in cores:
        free.put(core)
    with context.Pool(len(cores), _take_core, (free, folder)) as workers:
        jobs = [(folder, plan, group) for group in _groups(trainings)]
        finished = itertools.chain.from_iterable(workers.imap_unordered(_make, jobs))
        for done, (training, accuracy) in enumerate(finished, 1):
            print(f"{done} of {len(trainings)}: {training.name}: {accuracy:.1%}", file=sys.stderr, flush=True)
    return report(Results(folder, plan), plan)


def _groups(trainings: Iterable[Training]) -> Iterator[list[Training]]:
    """Yield neighbours that start from the same pretraining together."""
    for _, group in itertools.groupby(trainings, key=lambda training: training.source):
        yield list(group)


def _take_core(free: Any, folder: Path) -> None:
    """Let this process use one core, and write what it prints to a file."""
    core = free.get()
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    log = os.open(folder / f"core-{core}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _make(job: tuple[Path, Plan, list[Training]]) -> list[tuple[Training, float]]:
    folder, plan, trainings = job
    table = Results(folder, plan)
    return [(training, table.metrics(training)["ACC_all"]) for training in trainings]


def trainings_of(plan: Plan) -> Iterator[Training]:
    """Yield all trainings, the most important ones first, so that a part of them can be looked at already."""
    first, *others = plan.archs
    usual, *rest = plan.labels
    yield from _compared(plan, [first], plan.recipes[:1], [usual])
    for arch in plan.decoders:
        for name in plan.part:
            for seed in plan.seeds:
                yield Training(name, arch, "auto", seed, usual, pretrained=True)
                yield Training(name, arch, "auto", seed, usual, True, "small decoder", equal="epochs")
    for name in plan.part:
        for rule in plan.without:
            for seed in plan.seeds:
                yield Training(name, first, "auto", seed, usual, rule != _FROM_SCRATCH, rule)
    yield from _compared(plan, [first], plan.recipes[1:], [usual])
    few = replace(plan, sets=plan.part)
    yield from _compared(few, others, plan.recipes, [usual])
    for name in plan.part:
        for recipe in plan.recipes[1:]:
            for seed in plan.seeds:
                for pretrained in (True, False):
                    yield Training(name, first, recipe, seed, usual, pretrained, equal="epochs")
    yield from _compared(plan, [first], plan.recipes, rest)
    yield from _compared(few, others, plan.recipes, rest)


def _compared(plan: Plan, archs: Sequence[str], recipes: Sequence[str], labels: Sequence[int]) -> Iterator[Training]:
    """Yield fine-tuning of pretrained models and of new ones."""
    for seed in plan.seeds:
        for arch in archs:
            for name in plan.sets:
                for recipe in recipes:
                    for count in labels:
                        yield Training(name, arch, recipe, seed, count, pretrained=True)
                        yield Training(name, arch, recipe, seed, count, pretrained=False)


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

    def known(self, training: Training, metric: str = "ACC_all") -> float | None:
        """Return a metric of a training if it is finished."""
        path = self.folder / "metrics" / f"{training.name}.json"
        return json.loads(path.read_text(encoding="utf-8"))[metric] if path.is_file() else None

    def _train(self, training: Training) -> dict[str, float]:
        folder = self.folder / "runs" / training.name
        overrides = self._overrides(training)
        if training.pretrained:
            backbone = self.folder / "runs" / training.source.name / "train" / layout.BACKBONE
            if not backbone.is_file():
                self.metrics(training.source)
            overrides["train.pretrained_model_path"] = str(backbone)
        if epochs := self._epochs(training, overrides):
            overrides["train.num_epochs"] = epochs
        overrides |= {"train.validation_interval": _NEVER, "train.checkpoint_interval": _NEVER}  # except at the end
        overrides |= {"results_dir": str(folder), "train.keep_checkpoints": 1}
        shutil.rmtree(folder, ignore_errors=True)
        start = time.process_time()  # other processes do not count
        metrics = train.run(_spec(overrides))
        took = time.process_time() - start
        for checkpoint in (folder / "train").glob("*.pth"):
            checkpoint.unlink()
        return {**metrics, "epochs": _epochs_of(folder / "train"), "seconds": took}

    def _epochs(self, training: Training, overrides: Mapping[str, Any]) -> int | None:
        """Return the epochs; those of other recipes from a step that is measured once for all seeds."""
        auto = replace(training, recipe="auto", without="", equal="time")
        if training == auto:
            if training.labels:
                return self.plan.epochs
            unlabelled = sum(1 for _ in (self._set(training.set).folder / "unlabelled").iterdir())
            return max(1, self.plan.pretrained[training.arch] // unlabelled)
        if training.equal == "epochs" or (training.recipe == "auto" and training.without not in _CHANGES_SPEED):
            return int(self.metrics(auto)["epochs"])
        path = self.folder / "epochs" / f"{replace(training, seed=0).name}.txt"
        if not path.is_file():
            seconds = self.metrics(replace(auto, seed=0))["seconds"]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, str(_epochs_in(seconds, overrides)))
        return int(path.read_text(encoding="utf-8"))

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


def _epochs_of(folder: Path) -> int:
    """Return the epochs of a finished training."""
    return int(read_metrics(folder / layout.METRICS)[-1]["epoch"])


def _epochs_in(seconds: float, overrides: Mapping[str, Any]) -> int:
    """Return the epochs that fit into some seconds, by a measured step."""
    spec = _spec(overrides)
    images, held_out = open_training_data(spec)
    facts = measure(spec, find_facts(spec, images, held_out, None), images)
    return max(1, int(seconds / ((facts.seconds_per_image or 1.0) * len(images))))


def report(table: Results, plan: Plan) -> Report:
    """Return mean and range of the accuracies over the seeds; a dash where no training is finished."""
    columns = ("set", "architecture", "labels", "recipe", "pretrained", "from scratch", "kNN before", "epochs")
    rows, data = [], []
    kinds = dict.fromkeys(replace(training, seed=0, pretrained=True) for training in trainings_of(plan))
    for kind in kinds:
        seeds = [replace(kind, seed=seed) for seed in plan.seeds]
        pretrained = [table.known(training) for training in seeds]
        scratch = [table.known(replace(training, pretrained=False)) for training in seeds]
        knn = [table.known(training.source, "knn_acc") for training in seeds]
        epochs = [table.known(training, "epochs") for training in (kind.source, kind)]
        passes = " + ".join(f"{number:.0f}" for number in epochs if number)
        recipe = kind.recipe + (f" without {kind.without}" if kind.without else "")
        recipe += ", epochs of auto" if kind.equal == "epochs" else ""
        start = (kind.set, kind.arch, str(kind.labels), recipe)
        rows.append((*start, *map(_cell, (pretrained, scratch, knn)), passes))
        values = {"pretrained": pretrained, "scratch": scratch, "knn": knn, "epochs": epochs}
        data.append({"set": kind.set, "arch": kind.arch, "labels": kind.labels, "recipe": recipe, **values})
    notes = [
        f"Accuracy on held-out images in %, mean and range over seeds {', '.join(map(str, plan.seeds))}. All recipes "
        "had as long as auto took, or as many epochs in rows with epochs of auto.",
        "labels: labelled images per class. kNN before: of the features before fine-tuning, with the labels of the "
        "held-out images. epochs: of pretraining and fine-tuning.",
        "tao: TAO's published defaults, but batches of 2 images instead of 1, which Mixup needs.",
    ]
    return Report("What the recipes are worth", columns, rows, data, notes)


def _cell(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.mean(known):.1f} ({min(known):.1f} to {max(known):.1f})"
