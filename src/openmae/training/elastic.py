"""Resume with a different number of processes, keeping the global batch size and the position in the epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BatchLayout:
    """The split of an optimizer update's images into processes and batches.

    Attributes:
        processes: number of processes on all nodes.
        batch_size: images per batch and process.
        accumulated: batches per update and process.
    """

    processes: int
    batch_size: int
    accumulated: int

    @property
    def per_batch(self) -> int:
        """Images in one batch, summed over all processes."""
        return self.processes * self.batch_size

    @property
    def global_batch(self) -> int:
        """Images in an update."""
        return self.per_batch * self.accumulated

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> BatchLayout:
        """Read the layout from a resolved spec, such as the one in a checkpoint."""
        train = spec["train"]
        processes = train.get("num_gpus", 1) * train.get("num_nodes", 1)
        return cls(processes, spec["dataset"]["batch_size"], train.get("accum_grad_batches", 1))

    def __str__(self) -> str:
        factors = [f"{self.batch_size} images"]
        if self.processes > 1:
            factors.append(f"{self.processes} processes")
        if self.accumulated > 1:
            factors.append(f"{self.accumulated} accumulated batches")
        return f"{self.global_batch}" + (f" ({' x '.join(factors)})" if len(factors) > 1 else "")


def accumulation_for(begun: BatchLayout, last: BatchLayout, now: BatchLayout) -> tuple[int, str]:
    """Return the accumulation that best keeps the global batch of the run, and a notice ("" if nothing changed).

    Args:
        begun: the layout with which the run started.
        last: the layout in the checkpoint.
        now: the layout from the spec, with the accumulation of ``begun``.
    """
    accumulated = now.accumulated
    if now.processes != begun.processes:
        accumulated = max(1, round(begun.global_batch / now.per_batch))
    kept = BatchLayout(now.processes, now.batch_size, accumulated)
    if now.processes == last.processes:
        return accumulated, ""
    processes = "process" if now.processes == 1 else "processes"
    moved = f"The run resumes with {now.processes} {processes} instead of {last.processes}"
    if kept.global_batch == last.global_batch:
        return accumulated, f"{moved}: its global batch stays {kept}."
    text = f"{moved}: its global batch was {last} and is now {kept}; the spec's learning rate applies to the new one."
    if begun.global_batch % now.processes == 0:
        size = begun.global_batch // now.processes
        text += f" Set dataset.batch_size={size} to keep a global batch of {begun.global_batch}."
    return accumulated, text


def same_position(
    progress: Mapping[str, Any], before: BatchLayout, now: BatchLayout, batches_per_epoch: int
) -> dict[str, Any]:
    """Return a checkpoint's progress, with its batch counts converted from layout ``before`` to ``now``.

    The order of an epoch's samples does not depend on the number of processes, so a position is a number of images. If
    no batch of ``now`` starts at that image, the progress is returned unchanged and the epoch starts again.
    """
    images = progress["batch"] * before.per_batch
    if progress["batch"] and progress["batch"] == progress["batches_per_epoch"]:  # trained, but not yet validated
        return {**progress, "batch": batches_per_epoch, "batches_per_epoch": batches_per_epoch}
    if before.per_batch == now.per_batch or images % now.per_batch or images // now.per_batch >= batches_per_epoch:
        return dict(progress)
    return {**progress, "batch": images // now.per_batch, "batches_per_epoch": batches_per_epoch}
