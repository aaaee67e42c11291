"""The training loop. Lightning Fabric provides devices, precision and processes.

The random generators are seeded for every batch from (seed, epoch, batch, rank), and a checkpoint holds the exact
position of the run. So on a CPU a resumed run is bit-identical to an uninterrupted one, wherever it was interrupted.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, NoReturn

import numpy as np
import torch
from lightning_fabric import Fabric
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from openmae.data.image_dataset import Batch
from openmae.data.loaders import EvaluationLoader, TrainingLoader
from openmae.distributed.collectives import sum_over_ranks
from openmae.distributed.fsdp import distributed, gathered, gathered_model, is_sharded
from openmae.distributed.rendezvous import watchdog_of
from openmae.distributed.signals import InterruptWatch, Stop, stop_from_counts, stop_to_counts
from openmae.spec.sections.train import TrainSpec
from openmae.training.divergence import DivergenceGuard
from openmae.training.optim import Schedule, load_moments, set_learning_rate
from openmae.training.progress import PaceMeter, RunBar
from openmae.training.state import Outputs, Progress, RunReporter, Step, Task
from openmae.training.step import DeferredOrder, ImmediateOrder, StepResult, can_defer, compile_errors, compiled

_ROWS_PER_EPOCH = 100  # at most this many steps of an epoch are logged in metrics.csv
_PREFIX = "model."  # of the weights' names in a checkpoint

log = logging.getLogger("openmae")


class Trainer:
    """Trains a task to its last epoch.

    Args:
        fabric: a launched Fabric.
        optimizer: optimizer of the task's model; each group has an ``lr_scale``.
        train_loader: this process's share of the training set.
        val_loader: this process's share of the validation set, or None.
    """

    def __init__(
        self,
        fabric: Fabric,
        task: Task,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        settings: TrainSpec,
        train_loader: TrainingLoader,
        val_loader: EvaluationLoader | None,
        outputs: Outputs,
    ) -> None:
        self.fabric = fabric
        self.task = task
        self.schedule = schedule
        self.settings = settings
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.outputs = outputs
        self._watchdog = watchdog_of(fabric)
        self._watchdog.arrive()
        self._watchdog.status = outputs.status
        # saving, averaging and validation use the task's model, whose parameter names compiling does not change
        module = compiled(task.model, fabric.device) if settings.compile else task.model
        self.model, self.optimizer = fabric.setup(module, optimizer)
        averages = settings.stage == "finetune" and settings.ema_decay > 0
        self.ema = ModelEmaV3(task.model, decay=settings.ema_decay) if averages else None
        self.progress = Progress(batches_per_epoch=len(train_loader))
        self.guard = DivergenceGuard(
            fabric, task, self.model, self.optimizer, schedule, settings, outputs, self.progress, train_loader.file_of
        )
        self.pace = PaceMeter()
        self._interrupt = InterruptWatch()
        self._order = (DeferredOrder if can_defer(fabric) else ImmediateOrder)(self.guard, self._finish_step)
        self._loss: float | None = None  # of the last finished step
        self._stop: Stop | None = None  # the exception with which all processes must stop
        self._began = time.monotonic()
        self._reporter: RunReporter | None = None

    def resume(self, payload: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint. The optimizer's moments are loaded, but its settings are kept.

        Raises:
            CheckpointError: the optimizer's state does not fit the parameters that are trained.
        """
        payload = distributed(payload, self.task.model, self.optimizer)
        self.task.model.load_state_dict({k.removeprefix(_PREFIX): v for k, v in payload["state_dict"].items()})
        if self.ema is not None:
            averaged = payload.get("ema_state_dict", payload["state_dict"])
            self.ema.module.load_state_dict({k.removeprefix(_PREFIX): v for k, v in averaged.items()})
        load_moments(self.optimizer, payload["optimizer"])
        if payload["precision"]:
            self.fabric.strategy.precision.load_state_dict(payload["precision"])
        progress, batches = Progress(**payload["progress"]), len(self.train_loader)
        if progress.batches_per_epoch != batches:
            if progress.batch:
                log.warning(
                    "The data, the batch size or the number of processes has changed since the checkpoint "
                    "(%d batches per epoch, now %d): epoch %d starts again.",
                    progress.batches_per_epoch, batches, progress.epoch + 1,
                )  # fmt: skip
            progress.batch, progress.loss_sum, progress.loss_count = 0, 0.0, 0
            progress.batches_per_epoch = batches
        vars(self.progress).update(vars(progress))

    @property
    def seconds(self) -> float:
        """The duration of the run so far, with its earlier parts up to the checkpoint that it was resumed from."""
        return self.progress.seconds + time.monotonic() - self._began

    def fit(self, reporter: RunReporter | None = None) -> dict[str, float]:
        """Train to the last epoch, or to ``stop_after_epoch``; return the metrics of the last epoch.

        ``reporter`` is called after each epoch and after an interruption.

        Raises:
            RunError: the run diverged, too many steps were skipped, or a checkpoint cannot be written.
            KeyboardInterrupt: Ctrl-C, or Preempted; a checkpoint of the last finished step has been written.
        """
        metrics: dict[str, float] = {}
        errors = compile_errors() if self.settings.compile else nullcontext()
        progress, batches, outputs = self.progress, len(self.train_loader), self.outputs
        self._began, self._reporter = time.monotonic(), reporter
        total, done = self.settings.last_epoch * batches, progress.epoch * batches + progress.batch
        bar = RunBar(total, done, lambda: self.seconds, outputs.console, quiet=outputs.status is None)
        with self._interrupt, outputs.checkpoints, errors, bar:
            if self.val_loader is not None and progress.step == 0:
                outputs.report_untrained(self._validate())
            while progress.epoch < self.settings.last_epoch:
                self._train_epoch(bar)
                metrics = self._finish_epoch()
                if reporter is not None:
                    reporter.after_epoch()
                    self._mark("other")
        return metrics

    def _train_epoch(self, bar: RunBar) -> None:
        self.model.train()
        self.pace.restart()
        progress, batches = self.progress, len(self.train_loader)
        where = f"epoch {progress.epoch + 1} of {self.settings.num_epochs}"
        for group in self._groups():
            self._train_step(group)
            bar.show(where, progress.step + 1, len(group), self._loss, self.pace.read())
            progress.batch += len(group)
            progress.step += 1
            epoch_done = progress.batch == batches  # the epoch's checkpoint is written after its validation
            due = self._checkpoint_is_due("step", progress.step) and not epoch_done
            if due or epoch_done or self._stop:
                self._order.settle()
            if due or self._stop:
                self._save()
            if self._stop:
                self._leave()
            self._mark("other", ends_step=True)

    def _groups(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step; the last step of an epoch may have fewer."""
        progress, group = self.progress, []
        for batch in self.pace.watch(self.train_loader.from_position(progress.epoch, progress.batch)):
            self._mark("data wait")
            group.append(batch)
            left = len(self.train_loader) - progress.batch
            if len(group) == min(self.settings.accum_grad_batches, left):
                yield group
                group = []

    def _rate(self) -> float:
        """Return the rate for the current position in the epoch, not for a step count: the batch size may change."""
        progress, accumulated = self.progress, self.settings.accum_grad_batches
        done = progress.epoch * self.schedule.steps_per_epoch + -(-progress.batch // accumulated)
        return self.schedule.rate(done)

    def _checkpoint_is_due(self, unit: str, count: int) -> bool:
        """Return whether a checkpoint is due after ``count`` epochs or steps."""
        settings = self.settings
        return settings.checkpoint_interval_unit == unit and count % settings.checkpoint_interval == 0

    def _train_step(self, group: Sequence[Batch]) -> None:
        rate = self._rate()
        set_learning_rate(self.optimizer, rate)
        losses = self._backward(group)
        indices = [batch.indices for batch in group]
        self._order.take(Step(self.progress.step + 1, rate, indices, losses, self._interrupt.reason))
        self.optimizer.zero_grad()
        self._mark("optimizer")

    def _backward(self, group: Sequence[Batch]) -> list[Tensor]:
        """Compute the gradients of the mean loss of a group; return the share of each batch in the loss."""
        losses = []
        for number, batch in enumerate(group):
            self._seed_batch(self.progress.batch + number)
            batch = self.fabric.to_device(batch)
            self._mark("host to device")
            with self.fabric.no_backward_sync(self.model, enabled=number + 1 < len(group)):
                loss = self.task.training_loss(self.model, batch, self.progress.epoch) / len(group)
                self._mark("forward")
                self.fabric.backward(loss)
                self._mark("backward")
            losses.append(loss.detach())
        return losses

    def _seed_batch(self, batch: int) -> None:
        """Seed the global generators (drop path, Mixup) by (seed, epoch, batch, rank)."""
        address = (self.settings.seed, self.progress.epoch, batch, self.fabric.global_rank)
        words = np.random.SeedSequence([part % 2**32 for part in address]).generate_state(3)
        torch.manual_seed((int(words[0]) << 32) | int(words[1]))
        np.random.seed(words[2])
        self._mark("other")

    def _finish_step(self, step: Step, result: StepResult, made: bool) -> None:
        """Update the moving average of the weights, and log; called before the next optimizer step."""
        self._stop = result.stop
        self._loss = result.loss
        self.pace.count(result.images)
        if made:
            if self.ema is not None:
                self.ema.update(self.task.model, step=step.number - 1)
            self.progress.bad_steps = 0
        if math.isfinite(result.loss):
            self.progress.loss_sum += result.loss
            self.progress.loss_count += 1
            if step.number % math.ceil(self.schedule.steps_per_epoch / _ROWS_PER_EPOCH) == 0:
                values = {"train_loss": result.loss, "lr": step.rate} | self.pace.lap()
                self.outputs.log(step.number, self.progress.epoch + 1, values)

    def _leave(self) -> NoReturn:
        assert self._stop is not None
        self._on_rank_zero(self.outputs.checkpoints.wait)  # when one process ends, the others may be killed
        log.warning("A checkpoint of step %d was written; the same command resumes from it.", self.progress.step)
        if self._reporter is not None:
            self._on_rank_zero(self._reporter.after_stop)
        raise self._stop

    def _finish_epoch(self) -> dict[str, float]:
        """Validate, log, and write the epoch's checkpoint; return the epoch's metrics."""
        progress, settings = self.progress, self.settings
        pace = self.pace.read()
        pace = pace if pace["images_per_s"] else {}  # the run resumed after the last step: only the validation was left
        metrics = {"train_loss": progress.loss_sum / max(progress.loss_count, 1)} if progress.loss_count else {}
        last = progress.epoch + 1 == settings.last_epoch
        if last and progress.bad_steps:
            self.guard.blame(progress.step, fails=progress.bad_steps == progress.step)
        if self.val_loader is not None and ((progress.epoch + 1) % settings.validation_interval == 0 or last):
            metrics |= self._validate()
        # log before the checkpoint: if the run is killed in between, the resumed run writes these rows again
        epoch, step = progress.epoch, progress.step
        self.outputs.log(
            step, epoch + 1, {"train_loss_epoch" if k == "train_loss" else k: v for k, v in metrics.items()}
        )
        due = last or self._checkpoint_is_due("epoch", epoch + 1) or self._checkpoint_is_due("step", step)
        improved = (due or self.task.monitor != "train_loss") and self._note_best(metrics)
        progress.epoch, progress.batch, progress.loss_sum, progress.loss_count = epoch + 1, 0, 0.0, 0
        if due:
            self._save(best=improved)
        elif improved:
            self.guard.require_finite_weights(self.ema)
            payload = self._payload()
            self._on_rank_zero(lambda: self.outputs.checkpoints.save_best(payload))
        timing = self.pace.timing(epoch, settings.num_epochs, step, self.schedule.steps_per_epoch)
        self.outputs.report(epoch, settings.num_epochs, step, metrics | pace, timing, last=last)
        return metrics

    def _validate(self) -> dict[str, float]:
        assert self.val_loader is not None
        self._mark("other")
        model = self.evaluated_model()
        metrics = self.task.validate(self.fabric, model, self._interruptible(self.val_loader))
        self.task.model.train()
        self._mark("validation")
        return metrics

    def evaluated_model(self) -> nn.Module:
        """Return the model to validate, in eval mode: the averaged model if ``ema_decay`` is set.

        All processes must call this, because a sharded model is gathered in each of them.
        """
        model = self.ema.module if self.ema is not None else self.task.model
        if is_sharded(model):
            model = gathered_model(model, self.outputs.info, self.fabric.device)
        return model.eval()

    def _interruptible(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches of the validation; on Ctrl-C or preemption, save a checkpoint and stop all processes."""
        yield from self._interrupt.until_asked(batches, self._watchdog)
        self._watchdog.arrive()
        self._stop = stop_from_counts(*sum_over_ranks(self.fabric, [*stop_to_counts(self._interrupt.reason)]))
        if self._stop:
            self._save()
            self._leave()

    def _note_best(self, metrics: Mapping[str, float]) -> bool:
        value, best = metrics.get(self.task.monitor), self.progress.best
        if value is None or not np.isfinite([*metrics.values()]).all():
            return False
        if best is not None and not (value < best if self.task.lower_is_better else value > best):
            return False
        self.progress.best, self.progress.best_metric = value, self.task.monitor
        return True

    def _payload(self) -> dict[str, Any]:
        """Return the payload of a checkpoint, with complete tensors on rank 0; all processes must call this."""
        self._mark("other")
        payload: dict[str, Any] = {
            "openmae": dict(self.outputs.info),
            "state_dict": {f"{_PREFIX}{k}": v for k, v in self.task.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "progress": {**asdict(self.progress), "seconds": self.seconds},
        }
        if self.ema is not None:
            payload["ema_state_dict"] = {f"{_PREFIX}{k}": v for k, v in self.ema.module.state_dict().items()}
        payload = gathered(payload, keep=self.fabric.is_global_zero)
        self._mark("checkpoints")
        return payload

    def _save(self, *, best: bool = False) -> None:
        self.guard.require_finite_weights(self.ema)
        progress, payload = self.progress, self._payload()
        save, rotate = self.outputs.checkpoints.save, progress.bad_steps == 0
        self._on_rank_zero(lambda: save(payload, progress.epoch, progress.step, best=best, rotate=rotate))

    def _on_rank_zero(self, write: Callable[[], Any]) -> None:
        self._mark("other")
        if self.fabric.is_global_zero:
            write()
        self._watchdog.arrive()
        self.fabric.barrier()
        self._mark("checkpoints")

    def _mark(self, phase: str, *, ends_step: bool = False) -> None:
        self._watchdog.arrive()
        if self.outputs.clock is not None:
            self.outputs.clock.mark(phase, ends_step=ends_step)
