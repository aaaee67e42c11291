"""The training loop, on Lightning Fabric: devices, precision and processes are Fabric's, the order of things is ours.

Every random draw is addressed by (seed, epoch, batch), never consumed from a stream, and a checkpoint holds the exact
place of the run. So a resumed run equals an uninterrupted one bit for bit on a CPU, wherever it was cut.
"""

from __future__ import annotations

import logging
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
from openmae.distributed.fsdp import distributed, gathered, is_sharded, whole_model
from openmae.distributed.signals import InterruptWatch, Stop, stop_from_counts, stop_to_counts
from openmae.distributed.watchdog import pulse_of
from openmae.training.compiling import compile_errors, compiled
from openmae.training.divergence import DivergenceGuard
from openmae.training.optim import Schedule, load_moments, set_learning_rate
from openmae.training.progress import EpochBar, PaceMeter
from openmae.training.state import LoopSettings, Outputs, Progress, Task
from openmae.training.updates import Update, reads_late

_ROWS_PER_EPOCH = 100  # of metrics.csv, at the most

log = logging.getLogger("openmae")


class Trainer:
    """Runs a task to its last epoch.

    Args:
        fabric: launched.
        task: what to train.
        optimizer: over the task's model; each group has an ``lr_scale``.
        schedule: factor on the learning rate.
        settings: length and rhythm.
        train_loader, val_loader: this process's share of the data; validation is optional.
        outputs: where to write.
    """

    def __init__(
        self,
        fabric: Fabric,
        task: Task,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        settings: LoopSettings,
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
        self._pulse = pulse_of(fabric)
        self._pulse.passes()
        self._pulse.status = outputs.status
        # the wrapper alone is compiled: what is saved, averaged and validated is the task's own model, by its own names
        module = compiled(task.model, fabric.device) if settings.compile else task.model
        self.model, self.optimizer = fabric.setup(module, optimizer)
        self.ema = ModelEmaV3(task.model, decay=settings.ema_decay) if settings.ema_decay else None  # on its device
        self.guard = DivergenceGuard(
            fabric, task, self.model, self.optimizer, settings, outputs, file_of=train_loader.file_of
        )
        self.progress = Progress(batches_per_epoch=len(train_loader))
        self.pace = PaceMeter()
        self._interrupt = InterruptWatch()
        self._late = reads_late(fabric)  # an update's numbers during the next one
        self._unread: Update | None = None
        self._loss: float | None = None  # of the newest update that was read
        self._stop: Stop | None = None  # what all processes know of Ctrl-C and preemption

    def resume(self, payload: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's payload; what the spec says of the optimizer stands, its moments are taken up.

        Raises:
            CheckpointError: other parameters are trained now than then.
        """
        prefix = "model."
        payload = distributed(payload, self.task.model, self.optimizer)
        self.task.model.load_state_dict({k.removeprefix(prefix): v for k, v in payload["state_dict"].items()})
        if self.ema is not None:
            averaged = payload.get("ema_state_dict", payload["state_dict"])
            self.ema.module.load_state_dict({k.removeprefix(prefix): v for k, v in averaged.items()})
        load_moments(self.optimizer, payload["optimizer"])
        if payload["precision"]:
            self.fabric.strategy.precision.load_state_dict(payload["precision"])
        self.progress = Progress(**payload["progress"])
        batches = len(self.train_loader)
        if self.progress.batches_per_epoch != batches:
            if self.progress.batch:
                log.warning(
                    "The data, the batch size or the number of processes has changed since the checkpoint "
                    "(%d batches an epoch, now %d): epoch %d starts again.",
                    self.progress.batches_per_epoch, batches, self.progress.epoch + 1,
                )  # fmt: skip
            self.progress.batch, self.progress.loss_sum, self.progress.loss_count = 0, 0.0, 0
            self.progress.batches_per_epoch = batches

    def fit(self) -> dict[str, float]:
        """Train to the last epoch, or to where the run pauses; returns the last epoch's metrics.

        Raises:
            RunError: the run diverged, every step was skipped, or a checkpoint cannot be written.
            KeyboardInterrupt: Ctrl-C, or as Preempted a preemption; a checkpoint of the last finished update has been
                written.
        """
        metrics: dict[str, float] = {}
        errors = compile_errors() if self.settings.compile else nullcontext()
        with self._interrupt, self.outputs.checkpoints, errors:
            while self.progress.epoch < self.settings.last_epoch:
                self._train_epoch()
                metrics = self._finish_epoch()
        return metrics

    def _train_epoch(self) -> None:
        self.model.train()
        self.pace.restart()
        progress, batches = self.progress, len(self.train_loader)
        loader = self.train_loader.from_position(progress.epoch, progress.batch)
        title = f"epoch {progress.epoch + 1}/{self.settings.num_epochs}"
        with EpochBar(title, batches, progress.batch, self.outputs.console) as bar:
            group: list[Batch] = []
            for batch in self.pace.watch(loader):
                self._mark("data wait")
                group.append(batch)
                if len(group) < self._group_size():
                    continue
                self._update(group)
                bar.advance(len(group), self._loss, self._rate(), self.pace.read())
                self._after_update(len(group))
                self._mark("other", ends_step=True)
                group = []

    def _group_size(self) -> int:
        """Batches of the next update: the last one of an epoch takes what is left."""
        return min(self.settings.accum_grad_batches, len(self.train_loader) - self.progress.batch)

    def _rate(self) -> float:
        """The learning rate of the next update; counted by epochs, so that it outlasts a change of the batch size."""
        progress, accumulated = self.progress, self.settings.accum_grad_batches
        done = progress.epoch * self.schedule.steps_per_epoch + -(-progress.batch // accumulated)
        return self.settings.lr * self.schedule.factor(done)

    def _update(self, group: Sequence[Batch]) -> None:
        """One update of the weights from a group of batches."""
        rate = self._rate()
        set_learning_rate(self.optimizer, rate)
        losses = self._backward(group)
        self._settle()  # the update before: its numbers came while this one was computed
        norm = self.guard.gradient_norm() if self._late else None
        update = Update(
            self.fabric,
            self.progress.step + 1,
            rate,
            [batch.indices for batch in group],
            losses,
            stop=self._interrupt.reason,
            norm=norm,
        )
        if self._late:
            self.optimizer.optimizer.found_inf = update.bad  # where it is 1, the fused step changes nothing
            self.optimizer.step()
            self._unread = update
        else:
            self._conclude(update)
        self.optimizer.zero_grad()
        self._mark("optimizer")

    def _backward(self, group: Sequence[Batch]) -> list[Tensor]:
        """Gradients of a group's mean loss; returns each batch's share of it."""
        losses = []
        for number, batch in enumerate(group):
            self._address_randomness(self.progress.batch + number)
            batch = self.fabric.to_device(batch)
            self._mark("host to device")
            with self.fabric.no_backward_sync(self.model, enabled=number + 1 < len(group)):
                loss = self.task.training_loss(self.model, batch, self.progress.epoch) / len(group)
                self._mark("forward")
                self.fabric.backward(loss)
                self._mark("backward")
            losses.append(loss.detach())
        return losses

    def _settle(self) -> None:
        """Conclude the update whose numbers nobody has read yet; to be called before the next one's optimizer step."""
        update, self._unread = self._unread, None
        if update is not None:
            self._conclude(update)

    def _conclude(self, update: Update) -> None:
        """Read an update's numbers, and draw the consequences: step and average, or skip; log.

        The optimizer's step of an update that is read late was made already, guarded on the device.
        """
        loss, images, self._stop, norm = update.read()
        self.pace.count(images)
        if np.isfinite(loss) and not self._late:
            norm = self.guard.norm_at_once()
        step = update.step
        if not np.isfinite(loss):
            self.guard.skip(self.progress, step, f"the loss is {loss}", update.images_at_fault())
        elif not np.isfinite(norm):
            fault = f"the loss is {loss:.4g}, but its gradients' norm is {norm}"
            self.guard.skip(self.progress, step, fault, update.images())
        elif self._late or self.guard.step(self.progress, update):
            if self.ema is not None:
                self.ema.update(self.task.model, step=step - 1)
            self.progress.bad_steps = 0
        self._record(update, loss)

    def _record(self, update: Update, loss: float) -> None:
        self._loss = loss
        if not np.isfinite(loss):
            return
        self.progress.loss_sum += loss
        self.progress.loss_count += 1
        if update.step % max(1, self.schedule.steps_per_epoch // _ROWS_PER_EPOCH) == 0:
            self.outputs.log(
                update.step, self.progress.epoch + 1, {"train_loss": loss, "lr": update.rate} | self.pace.lap()
            )

    def _address_randomness(self, batch: int) -> None:
        """Seed what draws from global generators (drop path, Mixup) by (seed, epoch, batch, rank)."""
        address = (self.settings.seed, self.progress.epoch, batch, self.fabric.global_rank)
        words = np.random.SeedSequence([part % 2**32 for part in address]).generate_state(3)
        torch.manual_seed((int(words[0]) << 32) | int(words[1]))
        np.random.seed(words[2])
        self._mark("other")

    def _after_update(self, batches: int) -> None:
        progress = self.progress
        progress.batch += batches
        progress.step += 1
        epoch_done = progress.batch == progress.batches_per_epoch  # its checkpoint comes after its validation
        due = self.settings.checkpoint_is_due("step", progress.step) and not epoch_done
        if due or epoch_done or self._stop:
            self._settle()
        if due or self._stop:
            self._save()
        if self._stop:
            self._leave()

    def _leave(self) -> NoReturn:
        """End the run as it was asked to, when its checkpoint is written."""
        assert self._stop is not None
        self._on_rank_zero(self.outputs.checkpoints.wait)  # a process that ends may take the others along
        log.warning("A checkpoint of step %d was written; the same command goes on from it.", self.progress.step)
        raise self._stop

    def _finish_epoch(self) -> dict[str, float]:
        """Validate, log, and keep the epoch's checkpoint; returns the epoch's metrics."""
        progress, settings = self.progress, self.settings
        pace = self.pace.read()
        metrics = {"train_loss": progress.loss_sum / max(progress.loss_count, 1)} if progress.loss_count else {}
        last = progress.epoch + 1 == settings.last_epoch
        if last and progress.bad_steps:
            self.guard.judge(progress, progress.step, fails=progress.bad_steps == progress.step)
        if self.val_loader is not None and ((progress.epoch + 1) % settings.validation_interval == 0 or last):
            metrics |= self._validate()
        # Before the checkpoint: a run killed between the two writes these rows again, and none is lost.
        epoch, step = progress.epoch, progress.step
        self.outputs.log(
            step, epoch + 1, {"train_loss_epoch" if k == "train_loss" else k: v for k, v in metrics.items()}
        )
        due = last or settings.checkpoint_is_due("epoch", epoch + 1) or settings.checkpoint_is_due("step", step)
        improved = (due or self.task.monitor != "train_loss") and self._note_best(metrics)
        progress.epoch, progress.batch, progress.loss_sum, progress.loss_count = epoch + 1, 0, 0.0, 0
        if due:
            self._save(best=improved)
        elif improved:
            self.guard.require_finite_weights(self.progress, self.ema)
            payload = self._whole_payload()
            self._on_rank_zero(lambda: self.outputs.checkpoints.save_best(payload))
        timing = self.pace.timing(epoch, settings.num_epochs, step, self.schedule.steps_per_epoch)
        self.outputs.report(epoch, settings.num_epochs, step, metrics | pace, timing)
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
        """What is measured and kept, in eval mode: the averaged weights where they are averaged.

        Of a model that processes share out, each process gets a whole copy; all of them must call this.
        """
        model = self.ema.module if self.ema is not None else self.task.model
        if is_sharded(model):
            model = whole_model(model, self.outputs.info, self.fabric.device)
        return model.eval()

    def _interruptible(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on; on Ctrl-C and preemption keep the epoch's training, which is done, and stop everywhere."""
        yield from self._interrupt.until_asked(batches, self._pulse)
        self._pulse.passes()
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
        self.progress.best = value
        return True

    def _payload(self) -> dict[str, Any]:
        """What a checkpoint holds; each process may have a part of its tensors."""
        payload: dict[str, Any] = {
            "openmae": dict(self.outputs.info),
            "state_dict": {f"model.{k}": v for k, v in self.task.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "progress": asdict(self.progress),
        }
        if self.ema is not None:
            payload["ema_state_dict"] = {f"model.{k}": v for k, v in self.ema.module.state_dict().items()}
        return payload

    def _whole_payload(self) -> dict[str, Any]:
        """For rank 0; to be called by all processes."""
        self._mark("other")
        whole: dict[str, Any] = gathered(self._payload(), keep=self.fabric.is_global_zero)
        self._mark("checkpoints")
        return whole

    def _save(self, *, best: bool = False) -> None:
        """Write a checkpoint of the current state."""
        self.guard.require_finite_weights(self.progress, self.ema)
        place, checkpoints = (self.progress.epoch, self.progress.step), self.outputs.checkpoints
        rotate = self.progress.bad_steps == 0
        payload = self._whole_payload()
        self._on_rank_zero(lambda: checkpoints.save(payload, *place, best=best, rotate=rotate))

    def _on_rank_zero(self, write: Callable[[], Any]) -> None:
        self._mark("other")
        if self.fabric.is_global_zero:
            write()
        self._pulse.passes()
        self.fabric.barrier()
        self._mark("checkpoints")

    def _mark(self, phase: str, *, ends_step: bool = False) -> None:
        self._pulse.step = self.progress.step
        self._pulse.passes()
        if self.outputs.clock is not None:
            self.outputs.clock.mark(phase, ends_step=ends_step)
