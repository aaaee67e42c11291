"""What the training loop is given and where it stands: a task, length and rhythm, the outputs, the place."""

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
    """What is trained: see ``PretrainTask`` and ``FinetuneTask``."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def monitor(self) -> str:
        """Metric that picks the best checkpoint."""

    @property
    def lower_is_better(self) -> bool:
        """Whether ``monitor`` is minimised."""

    def training_loss(self, model: nn.Module, batch: Batch, epoch: int) -> Tensor:
        """The loss of a batch; ``model`` is the task's own, wrapped for the run's processes and precision."""

    def validate(self, fabric: Fabric, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Metrics of a validation set."""


@dataclass(frozen=True)
class LoopSettings:
    """Length and rhythm of a run; the names are the spec's.

    Attributes:
        lr: peak learning rate.
        clip_grad_norm, ema_decay: 0 is off.
        checkpoint_interval_unit: ``epoch`` or ``step`` (an update of the weights).
        stop_after_epoch: pause there; the schedule is that of ``num_epochs`` all the same.
    """

    num_epochs: int
    lr: float
    accum_grad_batches: int = 1
    validation_interval: int = 1
    checkpoint_interval: int = 1
    checkpoint_interval_unit: str = "epoch"
    clip_grad_norm: float = 0.0
    ema_decay: float = 0.0
    seed: int = 1234
    stop_after_epoch: int | None = None
    compile: bool = False

    @property
    def last_epoch(self) -> int:
        """How many epochs are done when the run ends or pauses."""
        return min(self.num_epochs, self.stop_after_epoch or self.num_epochs)

    def checkpoint_is_due(self, unit: str, count: int) -> bool:
        """Whether a checkpoint belongs after so many epochs or steps."""
        return self.checkpoint_interval_unit == unit and count % self.checkpoint_interval == 0


@dataclass
class Progress:
    """The place of a run; a checkpoint carries it as a plain dict.

    Attributes:
        epoch: epochs finished.
        batch: batches finished in the epoch under way.
        step: updates of the weights, skipped ones included.
        batches_per_epoch: of the run that wrote it.
        loss_sum, loss_count: of the epoch under way.
        bad_steps: skipped updates in a row.
        best: the monitored metric's best value, or None.
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
    """Where a run writes and measures; ranks other than 0 hold no loggers, no status and no clock."""

    checkpoints: CheckpointFolder
    info: Mapping[str, Any]
    loggers: Loggers | None = None
    status: StatusLog | None = None
    clock: StepClock | None = None
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Metrics for the loggers, if there are any."""
        if self.loggers is not None and values:
            self.loggers.write(step, epoch, values)

    def report(
        self, epoch: int, epochs: int, step: int, metrics: Mapping[str, float], timing: Mapping[str, int | str]
    ) -> None:
        """Report the end of an epoch in the status log, with the fields of ``timing``, and on the terminal."""
        if self.status is None:
            return
        message = f"Epoch {epoch + 1} of {epochs}, step {step}"
        self.status.write("RUNNING", message, kpi=metrics, progress=timing)
        shown = {k: f"{v:.0f}" if k == "images_per_s" else f"{v:.4f}" for k, v in metrics.items()}
        log.info("%s: %s", message, "  ".join(f"{k} {v}" for k, v in shown.items()))
