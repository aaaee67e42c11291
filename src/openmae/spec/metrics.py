"""The table of quality metrics.

A metric has the same name in ``status.json``, ``metrics.csv``, TensorBoard and the spec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Direction = Literal["minimize", "maximize"]
Needs = Literal["", "validation images", "validation images with classes"]
EPOCH_TRAIN_LOSS = "train_loss_epoch"  # column of metrics.csv: train_loss is per step, this its mean over an epoch


@dataclass(frozen=True)
class Metric:
    """A metric of quality.

    Attributes:
        label: its name in reports.
        short: its name at a curve.
        kind: a share is in [0, 1], shown as a percentage, and best at its maximum; a loss is best at its minimum.
        stages: those that measure it.
        needs: data that it is measured on, in addition to the training images.
    """

    name: str
    label: str
    short: str
    kind: Literal["share", "loss"]
    stages: tuple[str, ...]
    needs: Needs = "validation images with classes"

    @property
    def is_share(self) -> bool:
        """True for values in [0, 1], which are shown as percentages."""
        return self.kind == "share"

    @property
    def direction(self) -> Direction:
        """The direction in which the metric improves."""
        return "maximize" if self.is_share else "minimize"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("ACC_all", "top-1 accuracy", "top-1", "share", ("finetune",)),
        Metric("ACC_top5", "top-5 accuracy", "top-5", "share", ("finetune",)),
        Metric("probe_acc", "linear probe accuracy", "linear probe", "share", ("pretrain",)),
        Metric("knn_acc", "kNN accuracy", "kNN", "share", ("pretrain",)),
        Metric("val_loss", "validation loss", "validation", "loss", ("pretrain", "finetune"), "validation images"),
        Metric("train_loss", "training loss", "train", "loss", ("pretrain", "finetune"), ""),
    )
}


def metrics_of(stage: str) -> list[str]:
    """Return the names of the metrics that a stage measures."""
    return [name for name, metric in METRICS.items() if stage in metric.stages]


def informative(metrics: Mapping[str, float], num_classes: int) -> dict[str, float]:
    """Return the metrics to show: without ``ACC_top5`` if there are at most 5 classes, where it is always 1."""
    return {name: value for name, value in metrics.items() if name != "ACC_top5" or num_classes > 5}


def is_share(name: str) -> bool:
    """Return whether a metric is a share in [0, 1]; False for an unknown name."""
    return name in METRICS and METRICS[name].is_share


def label(name: str) -> str:
    """Return the name of a metric in reports; an unknown name is returned unchanged."""
    name = "train_loss" if name == EPOCH_TRAIN_LOSS else name
    return METRICS[name].label if name in METRICS else name
