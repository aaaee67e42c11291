"""The cost of cheaper decoders: the quickstart's accuracies with each decoder, over seeds.

The quickstart's model is pretrained with a decoder, probed, and fine-tuned with the quickstart's specs. Finished runs
are kept in a table, and unfinished ones resume from their last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from openmae import quickstart
from openmae.actions import run_report, train
from openmae.spec.load import load_spec
from openmae.storage.atomic import write_atomically

from .decoding import DECODERS, Decoder
from .report import RESULTS, Report

FOLDER = RESULTS / "decoding_cost"
PRETRAIN, FINETUNE = "pretrain", "finetune"
_SHOWN = {"knn_acc": PRETRAIN, "probe_acc": PRETRAIN, "ACC_all": FINETUNE}  # metric -> the training that has it

Train = Callable[[dict[str, Any]], Mapping[str, float]]


@dataclass(frozen=True)
class Plan:
    """The size of the benchmark.

    Attributes:
        decoders: the first is what the others are compared with.
        seeds: of pretraining and fine-tuning.
        epochs: of both; None: the quickstart's.
    """

    decoders: Sequence[Decoder] = DECODERS
    seeds: Sequence[int] = (0, 1, 2)
    epochs: int | None = None


def run(quick: bool) -> Report:
    """Pretrain and fine-tune with every decoder and seed.

    Raises:
        RunError: a training fails.
    """
    plan = Plan((DECODERS[0], DECODERS[-1]), (0,), epochs=2) if quick else Plan()
    table = Table(FOLDER.with_name(f"{FOLDER.name}-quick") if quick else FOLDER, plan.epochs)
    for number, (decoder, seed, stage) in enumerate(trainings := trainings_of(plan), 1):
        value = table.metrics(decoder, seed, stage)
        told = ", ".join(f"{name} {value[name]:.1%}" for name, of in _SHOWN.items() if of == stage)
        seconds = f"{value['seconds']:.0f} s"
        print(f"{number} of {len(trainings)}: {decoder}, seed {seed}, {stage}: {told}, {seconds}", file=sys.stderr)
    return report(table, plan)


def trainings_of(plan: Plan) -> list[tuple[Decoder, int, str]]:
    """In their order: seed by seed, so that a part of them can be looked at already."""
    return [(one, seed, stage) for seed in plan.seeds for one in plan.decoders for stage in (PRETRAIN, FINETUNE)]


class Table:
    """Metrics by decoder, seed and stage; what is not in it yet is trained.

    Args:
        folder: gets ``table.json``, the digits, and what is being trained.
        epochs: of each training; None: the quickstart's.
        trained: trains a spec and gives its last metrics.
    """

    def __init__(self, folder: Path, epochs: int | None, trained: Train | None = None) -> None:
        self.folder, self.epochs = folder, epochs
        self._path, self._train = folder / "table.json", trained or _trained
        self.values: dict[str, dict[str, Any]] = (
            json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}
        )

    def metrics(self, decoder: Decoder, seed: int, stage: str) -> dict[str, float]:
        """The last epoch's metrics of a training, accuracies as shares in [0, 1], and the seconds that it took."""
        name = f"{decoder} seed {seed} {stage}"
        tree = self._spec(decoder, seed, stage)
        facts = {"torch": torch.__version__, "spec": _digest(tree, self.folder), "threads": torch.get_num_threads()}
        kept = self.values.get(name)
        if kept is None or kept["facts"] != facts:
            if kept is not None:  # of other facts, as is the other stage's
                shutil.rmtree(self._place(decoder, seed), ignore_errors=True)
                self.values = {
                    key: value for key, value in self.values.items() if not key.startswith(f"{decoder} seed {seed} ")
                }
            self._make_sure_of(decoder, seed, stage)
            start = time.perf_counter()
            found = dict(self._train(tree))
            kept = {"facts": facts, "metrics": {**found, "seconds": time.perf_counter() - start}}
            self.values[name] = kept
            write_atomically(self._path, json.dumps(self.values, indent=1) + "\n")
            if stage == FINETUNE:
                shutil.rmtree(self._place(decoder, seed), ignore_errors=True)
        return dict(kept["metrics"])

    def _place(self, decoder: Decoder, seed: int) -> Path:
        return self.folder / "trainings" / f"{decoder} {seed}".replace(" ", "-")

    def _backbone(self, decoder: Decoder, seed: int) -> Path:
        return self._place(decoder, seed) / PRETRAIN / "train" / "backbone.safetensors"

    def _spec(self, decoder: Decoder, seed: int, stage: str) -> dict[str, Any]:
        """Return the quickstart's spec as a tree; all decoders share the folder of digits."""
        place, backbone = self._place(decoder, seed), self._backbone(decoder, seed)
        pretraining = quickstart._pretrain_spec(place, seed)
        pretraining["model"] |= {"decoder_attention": decoder.attention, "decoder_targets": decoder.targets}
        tree = pretraining if stage == PRETRAIN else quickstart._finetune_spec(place, FINETUNE, seed, backbone)
        for name, source in tree["dataset"].items():
            if name.endswith("_data_sources"):
                tree["dataset"][name] = source.replace(str(place), str(self.folder))
        if self.epochs is not None:
            tree["train"] |= {"num_epochs": self.epochs, "validation_interval": 1, "checkpoint_interval": 1}
            tree["train"]["optim"]["warmup_epochs"] = 1
        return tree

    def _make_sure_of(self, decoder: Decoder, seed: int, stage: str) -> None:
        """Create what a run needs: the digits, and the backbone of the same decoder and seed."""
        if not (self.folder / "images").is_dir():
            parts = self.folder / "images.part"
            shutil.rmtree(parts, ignore_errors=True)
            quickstart.write_digits(parts)
            parts.rename(self.folder / "images")
        if stage == FINETUNE and not self._backbone(decoder, seed).is_file():
            self._train(self._spec(decoder, seed, PRETRAIN))


def _trained(tree: dict[str, Any]) -> Mapping[str, float]:
    """Run ``mae train`` in this process, resuming if possible, without its report and figures."""
    with patch.object(run_report, "train_report"), patch.object(train, "show_table"):
        return train.run(load_spec(tree, action="train"))


def _digest(tree: Mapping[str, Any], folder: Path) -> str:
    """Tells a spec from others wherever it lies."""
    text = json.dumps(tree, sort_keys=True).replace(str(folder), "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def report(table: Table, plan: Plan) -> Report:
    """Accuracies in per cent: mean over the seeds, smallest to largest; differences of a seed's own, in points."""
    first = plan.decoders[0]
    rows, data = [], []
    for decoder in plan.decoders:
        cells, line = [], {"attention": decoder.attention, "targets": decoder.targets, "seeds": list(plan.seeds)}
        for metric, stage in _SHOWN.items():
            values = [100 * table.metrics(decoder, seed, stage)[metric] for seed in plan.seeds]
            bases = [100 * table.metrics(first, seed, stage)[metric] for seed in plan.seeds]
            cells.append(_spread(values))
            line[metric] = values
        differences = [value - base for value, base in zip(values, bases, strict=True)]
        line["val_loss"] = [table.metrics(decoder, seed, PRETRAIN)["val_loss"] for seed in plan.seeds]
        cells += ["" if decoder == first else _spread(differences), f"{statistics.mean(line['val_loss']):.4f}"]
        rows.append((decoder.attention, f"{decoder.targets:g}", *cells))
        data.append(line)
    own = quickstart.PRETRAIN_EPOCHS, quickstart.FINETUNE_EPOCHS
    epochs = own if plan.epochs is None else (plan.epochs, plan.epochs)
    notes = [
        f"The quickstart's ViT-tiny (32 px, 16 patches of which 8 are masked, a decoder of one block of width 128): "
        f"{epochs[0]} epochs of pretraining, then {epochs[1]} of fine-tuning on {quickstart.LABELS_PER_DIGIT} labels a "
        f"digit; accuracies on the {quickstart.HELD_OUT} digits held out, in per cent; kNN and linear probe of the "
        f"frozen features on halves of these. Seeds {', '.join(map(str, plan.seeds))}: mean (smallest to largest).",
        "Cost: points of the fine-tuned accuracy above that of the same seed with the first decoder; below 0 is worse. "
        "Validation predicts all masked units, whatever a training step does: val_loss of self with fewer targets is "
        "that of a decoder among more mask tokens than it was trained with.",
        f"{torch.get_num_threads()} threads.",
    ]
    columns = ("decoder_attention", "decoder_targets", "kNN", "linear probe", "fine-tuned", "cost", "val_loss")
    return Report("What a decoder that does less costs on the quickstart's digits", columns, rows, data, notes)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
