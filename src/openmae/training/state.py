"""Inputs and state of the training loop: task, settings, outputs and progress."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from openmae.checkpoints.folder import CheckpointFolder
from openmae.data.image_dataset import Batch
from openmae.results.status import StatusLog
from openmae.training.loggers import Loggers
from openmae.training.profiler import StepClock

log = logging.getLogger("openmae")


class Task(Protocol):
    """A training task: see ``PretrainTask`` and ``FinetuneTask``."""

    @property
    def model(self) -> nn.Module:
        """The model to train."""

    @property
    def monitor(self) -> str:
        """The metric that selects the best checkpoint."""

    @property
    def lower_is_better(self) -> bool:
        """True if ``monitor`` is minimised."""

    def training_loss(self, model: nn.Module, batch: Batch, epoch: int) -> Tensor:
        """Return the loss of a batch; ``model`` is the task's model, wrapped by ``Fabric.setup``."""

    def validate(self, fabric: Fabric, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the metrics of a validation set."""


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the loop, named as in the spec.

    Attributes:
        lr: peak learning rate.
        clip_grad_norm: 0 disables clipping.
        ema_decay: 0 disables weight averaging.
        checkpoint_interval_unit: ``epoch`` or ``step`` (an update of the weights).
        last_epoch: the epoch after which the run ends or pauses; the schedule spans ``num_epochs``.
    """

    num_epochs: int
    last_epoch: int
    lr: float
    accum_grad_batches: int = 1
    validation_interval: int = 1
    checkpoint_interval: int = 1
    checkpoint_interval_unit: str = "epoch"
    clip_grad_norm: float = 0.0
    ema_decay: float = 0.0
    seed: int = 1234
    compile: bool = False

    def checkpoint_is_due(self, unit: str, count: int) -> bool:
        """Return whether a checkpoint is due after ``count`` epochs or steps."""
        return self.checkpoint_interval_unit == unit and count % self.checkpoint_interval == 0


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
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    batches_per_epoch: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    bad_steps: int = 0
    best: float | None = None


@dataclass
class Outputs:
    """The outputs of a run; loggers, status log and clock are None on other ranks than 0."""

    checkpoints: CheckpointFolder
    info: Mapping[str, Any]
    loggers: Loggers | None = None
    status: StatusLog | None = None
    clock: StepClock | None = None
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Write metrics to the loggers, if there are any."""
        if self.loggers is not None and values:
            self.loggers.write(step, epoch, values)

    def report(
        self, epoch: int, epochs: int, step: int, metrics: Mapping[str, float], timing: Mapping[str, int | str]
    ) -> None:
        """Report the end of an epoch in the status log and on the terminal; ``epoch`` is counted from 0."""
        if self.status is None:
            return
        message = f"Epoch {epoch + 1} of {epochs}, step {step}"
        self.status.write("RUNNING", message, kpi=metrics, progress=timing)
        shown = {k: f"{v:.0f}" if k == "images_per_s" else f"{v:.4f}" for k, v in metrics.items()}
        log.info("%s: %s", message, "  ".join(f"{k} {v}" for k, v in shown.items()))
