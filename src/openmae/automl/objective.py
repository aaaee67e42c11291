"""What a search judges by: the metric that a stage has, and its value from a training's ``status.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openmae.errors import SpecError
from openmae.results.status import read_status
from openmae.spec.schema import ExperimentSpec
from openmae.storage import layout

_SHARES = ("ACC_all", "ACC_top5", "knn_acc", "probe_acc")
_OF_STAGE = {
    "pretrain": ("train_loss", "val_loss", "knn_acc", "probe_acc"),
    "finetune": ("ACC_all", "ACC_top5", "val_loss", "train_loss"),
}
MISLEADS = (
    "train_loss compares reconstructions of the same difficulty only: a lower mask ratio leaves more to copy from, "
    "and blurs less, so its loss is lower whether or not the features are better. Across mask ratios, decoders or "
    "norm_pix_loss, use validation images with classes and automl.metric=knn_acc."
)
_CHANGES_THE_TASK = (
    *(f"model.{name}" for name in ("mask_ratio", "norm_pix_loss", "arch")),
    *(f"model.decoder_{name}" for name in ("depth", "embed_dim", "targets")),
    "dataset.augmentation.min_scale",
)


@dataclass(frozen=True)
class Objective:
    """The metric of a search.

    Attributes:
        metric: its name in ``status.json``.
        maximize: whether larger is better.
        of_best_epoch: whether ``model_best.pth`` is picked by it, so that the best epoch counts; else the last one.
    """

    metric: str
    maximize: bool
    of_best_epoch: bool

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """As Optuna calls it."""
        return "maximize" if self.maximize else "minimize"

    @property
    def is_share(self) -> bool:
        """Whether its values are shares in [0, 1], best read as per cent."""
        return self.metric in _SHARES

    def shown(self, value: float | None) -> str:
        """A value as people read it."""
        if value is None:
            return "-"
        return f"{value:.2%}" if self.is_share else f"{value:.4f}"

    def value_of(self, folder: Path) -> float | None:
        """The value of a training; None where it has told none that is finite."""
        path = folder / layout.STATUS
        entries = read_status(path) if path.is_file() else []
        epochs = [entry["kpi"] for entry in entries if entry.get("kpi")]
        values = [float(kpi[self.metric]) for kpi in epochs if self.metric in kpi]
        if not values:
            return None
        if self.of_best_epoch:
            return max(values) if self.maximize else min(values)
        return values[-1] if self.metric in epochs[-1] else None  # what is not finite is left out there


def make_objective(spec: ExperimentSpec) -> Objective:
    """The metric that a spec asks for, or the stage's.

    Raises:
        SpecError: the stage has no such metric, or it needs validation images that are not there.
    """
    stage, has_val = spec.train.stage, bool(spec.dataset.val_data_sources)
    metric = spec.automl.metric or ("ACC_all" if stage == "finetune" else "train_loss")
    if metric not in _OF_STAGE[stage]:
        raise SpecError(
            f"automl.metric: {stage} has no metric {metric!r}.", f"Use one of: {', '.join(_OF_STAGE[stage])}."
        )
    if metric != "train_loss" and not has_val:
        what = "validation images with classes" if metric in _SHARES else "validation images"
        raise SpecError(
            f"automl.metric: {metric} is measured on {what}, but dataset.val_data_sources is not set.",
            "Set it" + (", or judge by automl.metric=train_loss." if stage == "pretrain" else "."),
        )
    maximize = metric in _SHARES if not spec.automl.direction else spec.automl.direction == "maximize"
    if maximize != (metric in _SHARES):
        right = "maximize" if metric in _SHARES else "minimize"
        raise SpecError(
            f"automl.direction: {metric} is better when {'larger' if right == 'maximize' else 'smaller'}, "
            f"got {spec.automl.direction}.",
            f"Remove automl.direction, or set it to {right}.",
        )
    typed = spec.typed("train.optim.monitor_name")
    monitor = "ACC_all" if stage == "finetune" and has_val and not typed else spec.train.optim.monitor_name
    # a generation of a population is judged by where it has come to, and not by the weights that it began with
    return Objective(metric, maximize, of_best_epoch=metric == monitor and spec.automl.algorithm != "pbt")


def misleading(spec: ExperimentSpec, objective: Objective, searched: tuple[str, ...]) -> str:
    """Why the metric says little of what is searched; empty where it is a fair judge."""
    of_pixels = objective.metric in ("train_loss", "val_loss") and spec.train.stage == "pretrain"
    return MISLEADS if of_pixels and any(key in _CHANGES_THE_TASK for key in searched) else ""
