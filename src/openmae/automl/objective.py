"""What a search judges by: the metric that a stage has, and its value from a training's ``status.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openmae.errors import SpecError
from openmae.results.status import read_status
from openmae.spec.actions import TABLE
from openmae.spec.describe import traits
from openmae.spec.metrics import METRICS, metrics_of, monitored_metric
from openmae.spec.schema import ExperimentSpec
from openmae.storage import layout

MISLEADS = (
    "train_loss compares reconstructions of the same difficulty only: a lower mask ratio leaves more to copy from, "
    "and blurs less, so its loss is lower whether or not the features are better. Across mask ratios, decoders or "
    "norm_pix_loss, use validation images with classes and automl.metric=knn_acc."
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
        return METRICS[self.metric].is_share

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
    metric = spec.automl.metric or TABLE["train"].metrics[stage]
    if metric not in metrics_of(stage):
        raise SpecError(
            f"automl.metric: {stage} has no metric {metric!r}.", f"Use one of: {', '.join(metrics_of(stage))}."
        )
    row = METRICS[metric]
    if row.needs and not has_val:
        raise SpecError(
            f"automl.metric: {metric} is measured on {row.needs}, but dataset.val_data_sources is not set.",
            "Set it" + (", or judge by automl.metric=train_loss." if stage == "pretrain" else "."),
        )
    if spec.automl.direction not in ("", row.direction):
        raise SpecError(
            f"automl.direction: {metric} is better when {'larger' if row.is_share else 'smaller'}, "
            f"got {spec.automl.direction}.",
            f"Remove automl.direction, or set it to {row.direction}.",
        )
    # a generation of a population is judged by where it has come to, and not by the weights that it began with
    best = metric == monitored_metric(spec) and spec.automl.algorithm != "pbt"
    return Objective(metric, row.is_share, of_best_epoch=best)


def misleading(spec: ExperimentSpec, objective: Objective, searched: tuple[str, ...]) -> str:
    """Why the metric says little of what is searched; empty where it is a fair judge."""
    of_pixels = not objective.is_share and spec.train.stage == "pretrain"
    return MISLEADS if of_pixels and any(traits(key).changes_loss for key in searched) else ""
