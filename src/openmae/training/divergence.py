"""Steps that must not be made and weights that must not be kept: how they are found, and what is said of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.distributed.tensor import DTensor

from openmae.data.image_dataset import Batch
from openmae.distributed.collectives import gather_objects, sum_over_ranks
from openmae.distributed.fsdp import gathered
from openmae.distributed.watchdog import pulse_of
from openmae.errors import RunError
from openmae.training.state import LoopSettings, Outputs, Progress, Task
from openmae.training.updates import Update, scaler_of

MAX_BAD_STEPS = 10
_NOISE_IMAGES = 4  # Mixup needs an even number

log = logging.getLogger("openmae")


class DivergenceGuard:
    """Skip the steps that would spoil the weights, and end a run whose weights are spoilt.

    All processes must call each method. Weights are known to be good once a later step was made from them. Those of the
    last step that was made, and of the skipped ones after it, are not: their checkpoints replace no older ones, and are
    set aside when the run has diverged.

    Args:
        fabric: gives processes and precision.
        task: gives the loss.
        model: the task's model, as Fabric has set it up.
        optimizer: as Fabric has set it up.
        settings: of the run.
        outputs: with its checkpoints, and what they say of the model.
        file_of: gives the name of an image by its index.
    """

    def __init__(
        self,
        fabric: Fabric,
        task: Task,
        model: Any,
        optimizer: Any,
        settings: LoopSettings,
        outputs: Outputs,
        file_of: Callable[[int], str],
    ) -> None:
        self.fabric = fabric
        self.task = task
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self.outputs = outputs
        self.file_of = file_of
        self.scaler = scaler_of(fabric)
        self._shown = "images of an earlier run"  # those of the newest step that was skipped

    def gradient_norm(self, *, clip: bool = True) -> Tensor:
        """Return the norm of all gradients; those above ``train.clip_grad_norm`` are scaled down to it."""
        if limit := self.settings.clip_grad_norm * clip:
            norm = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=limit, error_if_nonfinite=False)
        else:
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        whole: Tensor = gathered(norm)
        return whole

    def norm_at_once(self) -> float:
        """Return the norm of the gradients; 0 under fp16, whose scaler looks at them itself."""
        if self.scaler is None:
            return self.gradient_norm().item()
        if self.settings.clip_grad_norm:
            self.gradient_norm()
        return 0.0

    def step(self, progress: Progress, update: Update) -> bool:
        """Make the optimizer's step; return False where fp16's scaler has skipped it, as the gradients overflow."""
        if self.scaler is None:
            self.optimizer.step()
            return True
        scale: float = self.scaler.get_scale()
        self.optimizer.step()
        made: bool = self.scaler.get_scale() >= scale
        if not made and scale > 1:
            progress.bad_steps += 1  # the scale is lower in the next step, so that its gradients may fit
        elif not made:
            self.skip(progress, update.step, f"the gradients overflow in fp16 at a scale of {scale:g}", update.images())
        return made

    def skip(self, progress: Progress, step: int, fault: str, images: Sequence[int]) -> None:
        """Log a step that is not made, with the images of this process that it may come from.

        Raises:
            RunError: it was the tenth in a row.
        """
        progress.bad_steps += 1
        own = [self.file_of(index) for index in images]
        names = [name for part in gather_objects(self.fabric, own) for name in part]
        self._shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        log.warning("Step %d: %s; the step is skipped. Its images: %s", step, fault, self._shown)
        if progress.bad_steps >= MAX_BAD_STEPS:
            self.judge(progress, step, fails=True)

    def judge(self, progress: Progress, step: int, *, fails: bool) -> None:
        """Find out what is at fault for the skipped steps up to ``step``.

        Raises:
            RunError: the weights are; or the images are, and ``fails``.
        """
        if self._fails_on_noise():
            raise self._diverged(progress.bad_steps, step)
        if fails:
            raise RunError(*_bad_images(progress.bad_steps, self._shown))

    def require_finite_weights(self, progress: Progress, average: ModelEmaV3 | None) -> None:
        """Refuse weights that are not finite, before they are saved.

        Raises:
            RunError: those of the model, or their average, are not finite in some process.
        """
        models = [self.task.model] if average is None else [self.task.model, average.module]
        values = [value.detach() for model in models for value in (*model.parameters(), *model.buffers())]
        local = [value.to_local() if isinstance(value, DTensor) else value for value in values]
        local = [value for value in local if value.is_floating_point()]
        finite = bool(torch.nn.utils.get_total_norm(local).isfinite())  # a tenth of the time of the exact check
        finite = finite or all(bool(value.isfinite().all()) for value in local)
        if sum_over_ranks(self.fabric, [float(not finite)])[0]:
            raise self._diverged(0, progress.step - progress.bad_steps)

    def _fails_on_noise(self) -> bool:
        """Whether the loss of random images, or its gradients, are not finite: then no image is at fault."""
        config = self.outputs.info["model"]
        shape = (_NOISE_IMAGES, config["in_chans"], *config["input_size"])
        noise = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        labels = torch.zeros(_NOISE_IMAGES, dtype=torch.long)
        batch = self.fabric.to_device(Batch(noise, labels, torch.arange(_NOISE_IMAGES), 0, []))
        self.optimizer.zero_grad()
        loss = self.task.training_loss(self.model, batch, 0)
        self.fabric.backward(loss)
        finite = bool(loss.isfinite())
        if self.scaler is None:  # scaled gradients may overflow for that reason alone
            finite = finite and bool(self.gradient_norm(clip=False).isfinite())
        self.optimizer.zero_grad()
        return sum_over_ranks(self.fabric, [float(not finite)])[0] > 0

    def _diverged(self, bad_steps: int, step: int) -> RunError:
        """Set aside what no run can resume from; return the error that says so.

        Args:
            bad_steps: skipped ones in a row; 0: the weights themselves are not finite.
            step: the last one.
        """
        left, checkpoints = "", self.outputs.checkpoints
        pulse_of(self.fabric).passes()
        if self.fabric.is_global_zero:
            left = checkpoints.drop_diverged(step - bad_steps)
        else:
            checkpoints.wait()
        train = self.outputs.info["spec"]["train"]
        left = self.fabric.broadcast(left) or train.get("resume_training_checkpoint_path") or ""
        problem, fix = _divergence(bad_steps, left, self.settings, fp16=self.scaler is not None)
        if step == bad_steps and (source := train.get("pretrained_model_path")):
            fix = f"Check train.pretrained_model_path ({source}): no step could be made from its weights. Or: {fix}"
        return RunError(problem, fix)


def _divergence(steps: int, resumes_from: str, settings: LoopSettings, *, fp16: bool) -> tuple[str, str]:
    """Problem and fix of a run whose weights are at fault.

    Args:
        steps: skipped ones in a row; 0: the weights themselves are not finite.
        resumes_from: the checkpoint that the same command then resumes from; empty: it starts from the beginning.
        settings: of the run.
        fp16: whether its scaler is in use.
    """
    problem = "Training diverged: the weights are not finite. They were not saved."
    if steps:
        problem = (
            f"Training diverged: the loss or its gradients were not finite {steps} {_steps(steps)} in a row. They are "
            "not finite for random images either, so the weights are at fault, not the images."
        )
    clip = "lower train.clip_grad_norm" if settings.clip_grad_norm else "set train.clip_grad_norm=1.0"
    precision = ", use train.precision=bf16 or fp32 instead of fp16" if fp16 else ""
    where = f"resumes from {resumes_from}" if resumes_from else "starts from the beginning"
    return problem, (
        f"Lower the learning rate (its peak was {settings.lr:.3g}), {clip}, lengthen "
        f"train.optim.warmup_epochs{precision}; the same command with that change {where}."
    )


def _bad_images(steps: int, names: str) -> tuple[str, str]:
    """Problem and fix of a run whose images are at fault.

    Args:
        steps: skipped ones in a row.
        names: of the last one's images.
    """
    return (
        f"The loss or its gradients were not finite {steps} {_steps(steps)} in a row, the last with: {names}. They are "
        "finite for random images, so these images are at fault, not the weights.",
        "Check the images named for values that are not numbers or out of range, and replace or remove them; the "
        "same command then resumes.",
    )


def _steps(count: int) -> str:
    return "step" if count == 1 else "steps"
