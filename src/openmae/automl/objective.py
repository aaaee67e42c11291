"""Objective of a search: the metric of the stage, and its value in the ``status.json`` of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openmae.errors import SpecError
from openmae.results.status import read_status
from openmae.spec.schema import ExperimentSpec

_SHARES = ("ACC_all", "ACC_top5", "knn_acc", "probe_acc")
_OF_STAGE = {
    "pretrain": ("train_loss", "val_loss", "knn_acc", "probe_acc"),
    "finetune": ("ACC_all", "ACC_top5", "val_loss", "train_loss"),
}
MISLEADING = (
    "train_loss only compares reconstructions of the same difficulty: a lower mask ratio leaves more to copy from, so "
    "the loss is lower whether or not the features are better. Across mask ratios, decoders or norm_pix_loss, use "
    "validation images with classes and automl.metric=knn_acc."
)
_DIFFICULTY = (  # options that change how hard a reconstruction is
    "model.arch",
    "model.mask_ratio",
    "model.norm_pix_loss",
    "model.decoder_depth",
    "model.decoder_embed_dim",
    "model.decoder_targets",
    "dataset.augmentation.min_scale",
)


@dataclass(frozen=True)
class Objective:
    """The metric to optimize.

    Attributes:
        metric: its name in ``status.json``.
        maximize: whether larger is better.
        of_best_epoch: whether the best epoch counts, because ``model_best.pth`` is of it; otherwise the last one.
    """

    metric: str
    maximize: bool
    of_best_epoch: bool

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Optuna's name of the direction."""
        return "maximize" if self.maximize else "minimize"

    def shown(self, value: float | None) -> str:
        """Return a value as text, an accuracy as a percentage."""
        if value is None:
            return "-"
        return f"{value:.2%}" if self.metric in _SHARES else f"{value:.4f}"

    def value_of(self, folder: Path) -> float | None:
        """Return the value of the training run in a results folder; None if it has no finite one."""
        path = folder / "status.json"
        entries = read_status(path) if path.is_file() else []
        epochs = [entry["kpi"] for entry in entries if entry.get("kpi")]
        values = [float(kpi[self.metric]) for kpi in epochs if self.metric in kpi]
        if not values:
            return None
        if self.of_best_epoch:
            return max(values) if self.maximize else min(values)
        return values[-1] if self.metric in epochs[-1] else None  # values that are not finite are missing there


def make_objective(spec: ExperimentSpec) -> Objective:
    """Return the metric of a spec, or the default of its stage.

    Raises:
        SpecError: the stage has no such metric, or validation images are missing.
    """
    stage, has_val = spec.train.stage, bool(spec.dataset.val_data_sources)
    metric = spec.automl.metric or ("ACC_all" if stage == "finetune" else "train_loss")
    if metric not in _OF_STAGE[stage]:
        raise SpecError(
            f"automl.metric: {stage} has no metric {metric!r}.", f"Use one of: {', '.join(_OF_STAGE[stage])}."
        )
    is_share = metric in _SHARES
    if metric != "train_loss" and not has_val:
        data = "validation images with classes" if is_share else "validation images"
        raise SpecError(
            f"automl.metric: {metric} is measured on {data}, but dataset.val_data_sources is not set.",
            "Set it" + (", or use automl.metric=train_loss." if stage == "pretrain" else "."),
        )
    direction = "maximize" if is_share else "minimize"
    if spec.automl.direction not in ("", direction):
        raise SpecError(
            f"automl.direction: {metric} is better when {'larger' if is_share else 'smaller'}, "
            f"got {spec.automl.direction}.",
            f"Remove automl.direction, or set it to {direction}.",
        )
    typed = spec.typed("train.optim.monitor_name")
    monitor = "ACC_all" if stage == "finetune" and has_val and not typed else spec.train.optim.monitor_name
    # a generation of pbt starts from the weights of another trial, so only its last epoch is its own result
    return Objective(metric, is_share, of_best_epoch=metric == monitor and spec.automl.algorithm != "pbt")


def find_misleading(spec: ExperimentSpec, objective: Objective, searched: tuple[str, ...]) -> str:
    """Return why the metric does not compare the searched options fairly; empty if it does."""
    of_pixels = objective.metric in ("train_loss", "val_loss") and spec.train.stage == "pretrain"
    return MISLEADING if of_pixels and any(key in _DIFFICULTY for key in searched) else ""
