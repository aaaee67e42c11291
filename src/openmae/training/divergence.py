"""Detect non-finite losses, gradients and weights, and find out whether the weights or the images caused them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.distributed.tensor import DTensor

from openmae.data.image_dataset import Batch
from openmae.distributed.collectives import gather_objects, sum_over_ranks
from openmae.distributed.fsdp import gathered
from openmae.distributed.rendezvous import watchdog_of
from openmae.errors import RunError
from openmae.spec.sections.train import TrainSpec
from openmae.storage.printable import counted, listed
from openmae.training.optim import Schedule
from openmae.training.state import Outputs, Progress, Step, Task

MAX_BAD_STEPS = 10
_NOISE_IMAGES = 4  # Mixup needs an even number
_SHOWN_IMAGES = 8

log = logging.getLogger("openmae")


def scaler_of(fabric: Fabric) -> Any:
    """Return the gradient scaler that fp16 uses, or None for other precisions."""
    return getattr(fabric.strategy.precision, "scaler", None)


@dataclass
class DivergenceGuard:
    """Skips steps with a non-finite loss or gradients, and ends a run that has diverged.

    All processes must call each method. Weights are known to be good only after another step has been made from them.
    So checkpoints written during a series of skipped steps do not replace older ones. If the run has diverged, they are
    set aside, together with that of the last step that was made.

    Attributes:
        model, optimizer: as returned by ``Fabric.setup``.
        progress: ``bad_steps`` is updated here.
        file_of: returns the file name of an image, given its index.
    """

    fabric: Fabric
    task: Task
    model: Any
    optimizer: Any
    schedule: Schedule
    settings: TrainSpec
    outputs: Outputs
    progress: Progress
    file_of: Callable[[int], str]
    _skipped_images: str = "images of an earlier run"  # names of the images of the last skipped step

    def gradient_norm(self, *, clip: bool = True) -> Tensor:
        """Return the norm of all gradients, and clip them to ``train.clip_grad_norm`` if ``clip`` is true."""
        if limit := self.settings.clip_grad_norm * clip:
            norm = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=limit, error_if_nonfinite=False)
        else:
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        complete: Tensor = gathered(norm)
        return complete

    def measured_norm(self) -> float:
        """Clip the gradients and return their norm, or 0 under fp16, whose scaler checks for overflow."""
        if scaler_of(self.fabric) is None:
            return self.gradient_norm().item()
        if self.settings.clip_grad_norm:
            self.gradient_norm()
        return 0.0

    def accepts(self, step: Step, loss: float, norm: float) -> bool:
        """Return whether loss and norm are finite; if not, log a skipped step. The tenth in a row raises a RunError."""
        if not math.isfinite(loss):
            self._skip(step, f"the loss is {loss}", step.images(at_fault=True))
        elif not math.isfinite(norm):
            self._skip(step, f"the loss is {loss:.4g}, but its gradients' norm is {norm}", step.images())
        return math.isfinite(loss) and math.isfinite(norm)

    def update_weights(self, step: Step) -> bool:
        """Run the optimizer; return False if the fp16 scaler skipped the step because gradients overflowed."""
        scaler = scaler_of(self.fabric)
        scale: float = scaler.get_scale() if scaler else 0.0
        self.optimizer.step()
        if scaler is None or scaler.get_scale() >= scale:
            return True
        if scale > 1:
            self.progress.bad_steps += 1  # no warning: the scaler has lowered the scale for the next step
        else:
            self._skip(step, f"the gradients overflow in fp16 at a scale of {scale:g}", step.images())
        return False

    def _skip(self, step: Step, fault: str, images: Sequence[int]) -> None:
        """Log a skipped step and the names of the images, of all processes, that may have caused it."""
        self.progress.bad_steps += 1
        gathered_names = gather_objects(self.fabric, [self.file_of(index) for index in images])
        names = [name for part in gathered_names for name in part]
        self._skipped_images = listed(names, _SHOWN_IMAGES)
        log.warning("Step %d: %s; the step is skipped. Its images: %s", step.number, fault, self._skipped_images)
        if self.progress.bad_steps >= MAX_BAD_STEPS:
            self.blame(step.number, fails=True)

    def blame(self, step: int, *, fails: bool) -> None:
        """Find out whether the weights or the images caused the skipped steps up to ``step``.

        Raises:
            RunError: the weights are the cause; or the images are, and ``fails`` is true.
        """
        if self._fails_on_noise():
            raise self._diverged(step, self.progress.bad_steps)
        if fails:
            raise RunError(
                f"The loss or its gradients were not finite {counted(self.progress.bad_steps, 'step')} in a row, the "
                f"last with: {self._skipped_images}. They are finite for random images, so these images are at fault, "
                "not the weights.",
                "Check the images named for values that are not numbers or out of range, and replace or remove them; "
                "the same command then resumes.",
            )

    def require_finite_weights(self, average: ModelEmaV3 | None) -> None:
        """Raise a RunError if the weights to be saved, or their average, are not finite in any process."""
        models = [self.task.model] if average is None else [self.task.model, average.module]
        values = [value.detach() for model in models for value in (*model.parameters(), *model.buffers())]
        local = [value.to_local() if isinstance(value, DTensor) else value for value in values]
        local = [value for value in local if value.is_floating_point()]
        finite = bool(torch.nn.utils.get_total_norm(local).isfinite())  # a tenth of the time of the exact check
        finite = finite or all(bool(value.isfinite().all()) for value in local)
        if sum_over_ranks(self.fabric, [float(not finite)])[0]:
            raise self._diverged(self.progress.step - self.progress.bad_steps, bad_steps=0)

    def _fails_on_noise(self) -> bool:
        config = self.outputs.info["model"]
        shape = (_NOISE_IMAGES, config["in_chans"], *config["input_size"])
        noise = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        labels = torch.zeros(_NOISE_IMAGES, dtype=torch.long)
        batch = self.fabric.to_device(Batch(noise, labels, torch.arange(_NOISE_IMAGES), 0, []))
        self.optimizer.zero_grad()
        loss = self.task.training_loss(self.model, batch, 0)
        self.fabric.backward(loss)
        finite = bool(loss.isfinite())
        if scaler_of(self.fabric) is None:  # scaled gradients may overflow because of the scale
            finite = finite and bool(self.gradient_norm(clip=False).isfinite())
        self.optimizer.zero_grad()
        return sum_over_ranks(self.fabric, [float(not finite)])[0] > 0

    def _diverged(self, step: int, bad_steps: int) -> RunError:
        """Set aside the checkpoints of diverged weights, and return the error to raise."""
        left = ""
        watchdog_of(self.fabric).arrive()
        if self.fabric.is_global_zero:
            left = self.outputs.checkpoints.drop_diverged(step - bad_steps)
        train = self.outputs.info["spec"]["train"]
        left = self.fabric.broadcast(left) or train.get("resume_training_checkpoint_path") or ""
        problem = "Training diverged: the weights are not finite. They were not saved."
        if bad_steps:
            problem = (
                f"Training diverged: the loss or its gradients were not finite {counted(bad_steps, 'step')} in a row. "
                "They are not finite for random images either, so the weights are at fault, not the images."
            )
        clip = "lower train.clip_grad_norm" if self.settings.clip_grad_norm else "set train.clip_grad_norm=1.0"
        precision = ", use train.precision=bf16 or fp32 instead of fp16" if scaler_of(self.fabric) else ""
        fix = (
            f"Lower the learning rate (its peak was {self.schedule.peak:.3g}), {clip}, lengthen "
            f"train.optim.warmup_epochs{precision}; the same command with that change "
            + (f"resumes from {left}." if left else "starts from the beginning.")
        )
        if step == bad_steps and (source := train.get("pretrained_model_path")):
            fix = f"Check train.pretrained_model_path ({source}): no step could be made from its weights. Or: {fix}"
        return RunError(problem, fix)
