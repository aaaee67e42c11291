"""The training loop's task, steps, progress and outputs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console
from torch import Tensor

from openmae.checkpoints.folder import CheckpointFolder
from openmae.distributed.signals import Stop
from openmae.results.status import StatusLog
from openmae.training.finetune import FinetuneTask
from openmae.training.loggers import Loggers
from openmae.training.pretrain import PretrainTask
from openmae.training.profiler import StepClock

EPOCH_LINE_SECONDS = 3.0  # between the lines of two epochs on the terminal

log = logging.getLogger("openmae")

Task = PretrainTask | FinetuneTask


@dataclass(frozen=True)
class Step:
    """A step of this process whose backward pass has been started.

    Attributes:
        number: counted from 1.
        rate: the learning rate.
        indices: image indices ``[B]`` of each batch, on the host.
        losses: the share of each batch in the loss, on the device.
        stop: the exception with which this process was asked to stop, or None.
    """

    number: int
    rate: float
    indices: Sequence[Tensor]
    losses: Sequence[Tensor]
    stop: Stop | None

    def images(self, *, at_fault: bool = False) -> list[int]:
        """Return the indices of all images, or of the batches with a non-finite loss if ``at_fault`` is true."""
        pairs = zip(self.indices, self.losses, strict=True)
        return [int(index) for batch, loss in pairs if not (at_fault and loss.isfinite()) for index in batch]


@dataclass
class Progress:
    """The progress of a run; a checkpoint holds it as a plain dict.

    Attributes:
        epoch: epochs finished.
        batch: batches finished in the current epoch.
        step: updates of the weights, including skipped ones.
        batches_per_epoch: may differ in the run that resumes.
        loss_sum, loss_count: sum and number of the finite losses in the current epoch.
        bad_steps: skipped updates in a row.
        best: best value of the monitored metric, or None.
        best_metric: the metric that ``best`` is a value of; empty in checkpoints of older versions.
        seconds: duration of the run; 0 in checkpoints of older versions.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    batches_per_epoch: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    bad_steps: int = 0
    best: float | None = None
    best_metric: str = ""
    seconds: float = 0.0


class RunReporter(Protocol):
    """Keeps the report of a run up to date."""

    def after_epoch(self) -> None:
        """Report a finished epoch. Called in every process."""

    def after_stop(self) -> None:
        """Report an interrupted run, whose checkpoint has been written. Called on rank 0."""


@dataclass
class Outputs:
    """The outputs of a run; loggers, status log and clock are None on other ranks than 0."""

    checkpoints: CheckpointFolder
    info: Mapping[str, Any]
    loggers: Loggers | None = None
    status: StatusLog | None = None
    clock: StepClock | None = None
    console: Console = field(default_factory=lambda: Console(stderr=True))
    logged_at: float = -math.inf  # when the last epoch was logged

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Write metrics to the loggers, if there are any."""
        if self.loggers is not None and values:
            self.loggers.write(step, epoch, values)

    def report_untrained(self, metrics: Mapping[str, float]) -> None:
        """Log the metrics before the first step: with step 0, as they are the result of no epoch."""
        self.log(0, 0, metrics)
        if self.status is not None:
            log.info("Before the first step: %s", _shown(metrics))

    def report(
        self,
        epoch: int,
        epochs: int,
        step: int,
        metrics: Mapping[str, float],
        timing: Mapping[str, int | str],
        *,
        last: bool = False,
    ) -> None:
        """Report the end of an epoch in the status log and on the terminal; ``epoch`` is counted from 0.

        Of epochs shorter than ``EPOCH_LINE_SECONDS``, the terminal shows only some, the first and the ``last``.
        """
        if self.status is None:
            return
        message = f"Epoch {epoch + 1} of {epochs}, step {step}"
        self.status.write("RUNNING", message, kpi=metrics, progress=timing)
        now = time.monotonic()
        if now - self.logged_at < EPOCH_LINE_SECONDS and not last:
            return
        self.logged_at = now
        log.info("%s: %s", message, _shown(metrics))


def _shown(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{k} {v:.0f}" if k == "images_per_s" else f"{k} {v:.4f}" for k, v in metrics.items())
