"""A run that goes on with more or fewer processes: the same global batch, the same place in the epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Share:
    """How an update's images are shared out.

    Attributes:
        processes: of all nodes.
        batch_size: images of a batch, of one process.
        accumulated: batches of an update, of one process.
    """

    processes: int
    batch_size: int
    accumulated: int

    @property
    def step(self) -> int:
        """Images that one batch of all processes takes."""
        return self.processes * self.batch_size

    @property
    def update(self) -> int:
        """Images of an update: the global batch."""
        return self.step * self.accumulated

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Share:
        """Of a resolved spec, such as a checkpoint carries."""
        train = spec["train"]
        processes = train.get("num_gpus", 1) * train.get("num_nodes", 1)
        return cls(processes, spec["dataset"]["batch_size"], train.get("accum_grad_batches", 1))

    def to_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.processes} process(es) x {self.batch_size} images x {self.accumulated} accumulated"


def accumulation_for(begun: Share, last: Share, now: Share) -> tuple[int, str]:
    """The accumulation that keeps the global batch on another number of processes, and what to tell.

    Args:
        begun: when the run began.
        last: in the checkpoint.
        now: as the spec says it, with the accumulation that ``begun`` has as well.
    """
    accumulated = max(1, round(begun.update / now.step)) if now.processes != begun.processes else now.accumulated
    kept = Share(now.processes, now.batch_size, accumulated)
    if now.processes == last.processes:
        return accumulated, ""
    moved = f"The run goes on with {now.processes} process(es) in place of {last.processes}"
    if kept.update == last.update:
        return accumulated, f"{moved}: its global batch stays {kept.update} = {kept}."
    text = (
        f"{moved}: its global batch was {last.update} = {last} and is now {kept.update} = {kept}. The learning rate is "
        "what the spec makes of that."
    )
    if begun.update % now.processes == 0:
        text += f" dataset.batch_size={begun.update // now.processes} would keep a global batch of {begun.update}."
    return accumulated, text


def same_place(progress: Mapping[str, Any], before: Share, now: Share, batches_per_epoch: int) -> dict[str, Any]:
    """A checkpoint's progress, its batches counted in those of ``now``.

    The samples of an epoch are dealt in one order to any number of processes, so a place in it is a number of images.
    Where no batch of ``now`` begins there, the progress is left as it is, and the epoch starts again.
    """
    images = progress["batch"] * before.step
    if progress["batch"] and progress["batch"] == progress["batches_per_epoch"]:  # trained, and not yet validated
        return {**progress, "batch": batches_per_epoch, "batches_per_epoch": batches_per_epoch}
    if before.step == now.step or images % now.step or images // now.step >= batches_per_epoch:
        return dict(progress)
    return {**progress, "batch": images // now.step, "batches_per_epoch": batches_per_epoch}
