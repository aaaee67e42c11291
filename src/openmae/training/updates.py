"""One update of the weights, and its numbers on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from openmae.distributed.collectives import add_over_ranks
from openmae.distributed.rendezvous import ShardedStrategy
from openmae.distributed.signals import Stop, stop_from_counts, stop_to_counts


def reads_late(fabric: Fabric) -> bool:
    """Whether an update's numbers are read during the next one, so that the host never waits for a GPU.

    On a CPU they are there at once. fp16's are waited for: its scaler decides on a step by rules of its own. So are
    those of fsdp, whose norm all processes sum.
    """
    sharded = isinstance(fabric.strategy, ShardedStrategy)
    return fabric.device.type == "cuda" and scaler_of(fabric) is None and not sharded


def scaler_of(fabric: Fabric) -> Any:
    """The gradient scaler of fp16, or None."""
    return getattr(fabric.strategy.precision, "scaler", None)


class Update:
    """An update whose gradients are there, or are being computed.

    Its numbers are sent to the host as soon as the device has them, and nobody waits for that before ``read``.

    Args:
        fabric: gives device and processes.
        step: its number, from 1.
        rate: the learning rate.
        indices: ``[B]`` of the images of each of its batches, of this process, on the host.
        losses: each batch's share of the loss, of this process, on the device.
        stop: what this process is to end with; None while nobody has asked for its end.
        norm: of the gradients, the same in every process; None where nobody measured it.

    Attributes:
        bad: float32 scalar on the device, 1 where the loss or the norm is not finite in any process, else 0; the same
            in every process.
    """

    def __init__(
        self,
        fabric: Fabric,
        step: int,
        rate: float,
        indices: Sequence[Tensor],
        losses: Sequence[Tensor],
        *,
        stop: Stop | None,
        norm: Tensor | None,
    ) -> None:
        self.step = step
        self.rate = rate
        self.indices = indices
        self.losses = losses
        loss = torch.stack(list(losses)).sum().double()
        # filled on the device: a tensor made of Python's numbers would be copied there, and the host would wait
        counts = (sum(map(len, indices)), *stop_to_counts(stop))
        sums = add_over_ranks(fabric, torch.stack([loss, *(loss.new_full((), value) for value in counts)]))
        sums[0] /= fabric.world_size
        numbers = torch.cat([sums, (loss.new_zeros(()) if norm is None else norm.double()).view(1)])
        self.bad = numbers.isfinite().all().logical_not().float()
        self._numbers = numbers.to("cpu", non_blocking=True)  # from CUDA: into pinned memory
        self._arrived = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> tuple[float, int, Stop | None, float]:
        """``(loss, images, stop, norm)``, of all processes together; waits until the device has got there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, images, asked, preempted, norm = self._numbers.tolist()
        return loss, int(images), stop_from_counts(asked, preempted), norm

    def images_at_fault(self) -> list[int]:
        """The images of those of this process's batches whose loss is not finite."""
        pairs = zip(self.indices, self.losses, strict=True)
        return [int(index) for batch, loss in pairs if not loss.isfinite() for index in batch]

    def images(self) -> list[int]:
        """All images of this process's batches."""
        return [int(index) for batch in self.indices for index in batch]
