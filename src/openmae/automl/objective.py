"""The objective of a search: a metric of the stage, read from the ``status.json`` of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openmae.errors import SpecError
from openmae.results.status import read_status
from openmae.spec.actions import TABLE
from openmae.spec.describe import traits
from openmae.spec.metrics import METRICS, is_share, metrics_of
from openmae.spec.schema import ExperimentSpec
from openmae.storage import layout

MISLEADING = (
    "Reconstruction losses can be compared only at the same difficulty: with a lower mask ratio more of the image is "
    "visible, so the loss is lower whether or not the features are better. To search mask ratios, decoders or "
    "norm_pix_loss, use validation images with classes and automl.metric=knn_acc."
)


@dataclass(frozen=True)
class Objective:
    """The metric to optimize.

    Attributes:
        metric: its name in ``status.json``.
        maximize: whether larger is better.
        of_best_epoch: whether the best epoch counts, which ``model_best.pth`` is from; otherwise the last one counts.
    """

    metric: str
    maximize: bool
    of_best_epoch: bool

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """The direction as Optuna names it."""
        return "maximize" if self.maximize else "minimize"

    def shown(self, value: float) -> str:
        """Format a value, an accuracy as a percentage; NaN is a missing value."""
        if math.isnan(value):
            return "-"
        return f"{value:.2%}" if is_share(self.metric) else f"{value:.4f}"

    def value_of(self, folder: Path) -> float | None:
        """Return the value of the training run in a results folder; None if there is no finite value."""
        path = folder / layout.STATUS
        entries = read_status(path) if path.is_file() else []
        epochs = [entry["kpi"] for entry in entries if entry.get("kpi")]
        values = [float(kpi[self.metric]) for kpi in epochs if self.metric in kpi]
        if not values:
            return None
        if self.of_best_epoch:
            return max(values) if self.maximize else min(values)
        return values[-1] if self.metric in epochs[-1] else None  # a value that is not finite is missing in its entry


def make_objective(spec: ExperimentSpec) -> Objective:
    """Return the objective of a spec: ``automl.metric``, or the default metric of its stage.

    Raises:
        SpecError: the stage has no such metric, validation images are missing, or ``automl.direction`` does not fit.
    """
    stage = spec.train.stage
    name = spec.automl.metric or TABLE["train"].metrics[stage]
    if name not in metrics_of(stage):
        raise SpecError(
            f"automl.metric: {stage} has no metric {name!r}.", f"Use one of: {', '.join(metrics_of(stage))}."
        )
    metric = METRICS[name]
    if metric.needs and not spec.dataset.val_data_sources:
        raise SpecError(
            f"automl.metric: {name} is measured on {metric.needs}, but dataset.val_data_sources is not set.",
            "Set it" + (", or use automl.metric=train_loss." if stage == "pretrain" else "."),
        )
    if spec.automl.direction not in ("", metric.direction):
        raise SpecError(
            f"automl.direction: {name} is better when {'larger' if metric.is_share else 'smaller'}, "
            f"got {spec.automl.direction}.",
            f"Remove automl.direction, or set it to {metric.direction}.",
        )
    # In pbt, a trial may start from the weights of another one, so only its last epoch is a result of its parameters.
    of_best_epoch = name == spec.train.optim.monitor_name and spec.automl.algorithm != "pbt"
    return Objective(name, metric.is_share, of_best_epoch)


def find_misleading(spec: ExperimentSpec, objective: Objective, searched: tuple[str, ...]) -> str:
    """Return why the metric does not compare the searched options fairly; empty if it does."""
    of_pixels = not objective.maximize and spec.train.stage == "pretrain"
    return MISLEADING if of_pixels and any(traits(key).changes_loss for key in searched) else ""
