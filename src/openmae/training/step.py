"""A training step after its backward pass: reduce its numbers over the processes, then update the weights or skip.

There are two orders of events. Both skip the same steps and give bit-identical weights.

    immediate: the host waits for the numbers of a step before it decides whether to skip it
        host    backward(n)  reduce(n)  read(n) skip or step(n)  finish(n) | backward(n+1) ...

    deferred by one step: the device decides, and the host never waits for it
        host    backward(n)  read(n-1) finish(n-1)  norm(n) reduce(n) step(n) | backward(n+1)  read(n) finish(n) ...
        device  step(n) changes nothing if its loss or norm is not finite (AdamW's ``found_inf``)

``finish`` must come before the next optimizer step, because it adds the weights of its step to the moving average.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from openmae.distributed.collectives import add_over_ranks
from openmae.distributed.rendezvous import ShardedStrategy
from openmae.distributed.signals import Stop, stop_from_counts, stop_to_counts
from openmae.errors import RunError
from openmae.training.divergence import DivergenceGuard, scaler_of
from openmae.training.state import Step

log = logging.getLogger("openmae")


class StepResult(NamedTuple):
    """The loss, number of images, stop request and gradient norm (0: not measured) of a step, over all processes."""

    loss: float
    images: int
    stop: Stop | None
    norm: float


class StepNumbers:
    """The numbers of a step, reduced over the processes and copied to the host; only ``read`` waits for the device.

    Attributes:
        bad: float32 scalar on the device, the same in every process: 1 if the loss or the norm is not finite, else 0.
    """

    def __init__(self, fabric: Fabric, step: Step, norm: Tensor | None = None) -> None:
        loss = torch.stack(list(step.losses)).sum().double()
        # new_full fills on the device; copying a tensor made from Python numbers would make the host wait
        counts = (sum(map(len, step.indices)), *stop_to_counts(step.stop))
        sums = add_over_ranks(fabric, torch.stack([loss, *(loss.new_full((), value) for value in counts)]))
        sums[0] /= fabric.world_size
        numbers = torch.cat([sums, (loss.new_zeros(()) if norm is None else norm.double()).view(1)])
        self.bad = numbers.isfinite().all().logical_not().float()
        self._numbers = numbers.to("cpu", non_blocking=True)  # from CUDA: into pinned memory
        self._copied = None
        if numbers.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> StepResult:
        """Wait for the device, and return the numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, images, asked, preempted, norm = self._numbers.tolist()
        return StepResult(loss, int(images), stop_from_counts(asked, preempted), norm)


class ImmediateOrder:
    """Finishes each step before the next one begins.

    Args:
        guard: decides which steps are skipped.
        finish: called with each step, its result, and whether the weights were updated.
    """

    def __init__(self, guard: DivergenceGuard, finish: Callable[[Step, StepResult, bool], None]) -> None:
        self.guard = guard
        self.finish = finish

    def take(self, step: Step) -> None:
        """Update the weights after the backward pass of ``step``, or skip it; all processes must call this."""
        result = StepNumbers(self.guard.fabric, step).read()
        norm = self.guard.measured_norm() if math.isfinite(result.loss) else 0.0
        made = self.guard.accepts(step, result.loss, norm) and self.guard.update_weights(step)
        self.finish(step, result, made)

    def settle(self) -> None:
        """Finish the pending step; here, none is ever pending."""


class DeferredOrder(ImmediateOrder):
    """Finishes each step during the next one, so that the host does not wait for the GPU."""

    _pending: tuple[Step, StepNumbers] | None = None

    def take(self, step: Step) -> None:
        """Finish the previous step, then let the device update the weights or skip ``step``."""
        self.settle()
        optimizer = self.guard.optimizer
        numbers = StepNumbers(self.guard.fabric, step, self.guard.gradient_norm())
        optimizer.optimizer.found_inf = numbers.bad
        optimizer.step()
        self._pending = step, numbers

    def settle(self) -> None:
        """Finish the pending step, if there is one."""
        if self._pending is not None:
            (step, numbers), self._pending = self._pending, None
            result = numbers.read()
            self.finish(step, result, self.guard.accepts(step, result.loss, result.norm))


def can_defer(fabric: Fabric) -> bool:
    """Return whether ``DeferredOrder`` can be used: on a GPU, except with fp16 or FSDP.

    With fp16 the gradient scaler decides which steps are skipped; with FSDP the norm is summed over the processes.
    """
    sharded = isinstance(fabric.strategy, ShardedStrategy)
    return fabric.device.type == "cuda" and scaler_of(fabric) is None and not sharded


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap ``model`` in ``torch.compile``, which compiles at the first step; the wrapper shares its parameters."""
    if device.type == "cpu":
        log.warning("train.compile is meant for GPUs: on a CPU it takes minutes to compile, and steps are no faster.")
    wrapped: Any = torch.compile(model)
    assert isinstance(wrapped, nn.Module)
    return wrapped


@contextmanager
def compile_errors() -> Iterator[None]:
    """Convert errors of torch.compile into a RunError."""
    from torch._dynamo.exc import TorchDynamoException  # loads the compiler

    try:
        yield
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__  # the rest is a trace and hints for developers
        raise RunError(
            f"torch.compile could not compile the model: {reason}",
            "Set train.compile=false, or install what it needs: a C++ compiler, and Triton for a GPU.",
        ) from error
