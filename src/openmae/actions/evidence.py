"""Collect the facts of a finished training run that its verdict is based on."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from openmae.actions.plan import Plan
from openmae.actions.sections import row_of_best
from openmae.checkpoints.folder import list_checkpoints
from openmae.data.index import ImageIndex
from openmae.evaluation.probes import scored_labels
from openmae.results.metrics_csv import read_metrics
from openmae.results.verdict import Evidence, ScoredImages
from openmae.storage import layout
from openmae.training.elastic import BatchLayout


def collect_evidence(plan: Plan, best: float | None) -> Evidence:
    """Return the facts of a run whose checkpoints and metrics are written; ``best`` is its best monitored value."""
    rows = read_metrics(plan.folder / layout.METRICS)
    positions = {path.name: layout.checkpoint_progress(path.name) for path in list_checkpoints(plan.folder)}
    kept = {position.step: name for name, position in positions.items() if position is not None}
    row = row_of_best(rows, plan.spec.train.optim.monitor_name, best)
    if row is not None:
        kept[int(row["step"])] = layout.BEST
    return Evidence(
        stage=plan.spec.train.stage,
        rows=rows,
        scored=_scored_images(plan.val, probed=not plan.config.num_classes) if plan.val else None,
        images_per_step=BatchLayout.of(plan.info.spec).global_batch,
        kept=kept,
    )


def _scored_images(val: ImageIndex, *, probed: bool) -> ScoredImages | None:
    """Return the images that accuracies are measured on: those that the probes score, or all; None without labels."""
    labels = np.array(val.labels or [], dtype=int)
    if not probed:
        return ScoredImages.of(labels.tolist())
    with suppress(ValueError):  # too few labels for a probe
        return ScoredImages.of(scored_labels(labels).tolist())
    return None
