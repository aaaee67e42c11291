"""Work that tests run in two processes; spawned ones import it by name."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch.distributed.fsdp import fully_shard
from torch.optim.optimizer import register_optimizer_step_post_hook

from openmae.actions import train as train_action
from openmae.actions.plan import Plan
from openmae.data.image_dataset import Batch
from openmae.distributed.collectives import gather, gather_objects, sum_over_ranks
from openmae.distributed.fsdp import gathered
from openmae.distributed.rendezvous import ShardedStrategy
from openmae.errors import DataError
from openmae.evaluation.predictions import predict
from openmae.models.normalise import Normaliser
from openmae.training import trainer
from openmae.training.pretrain import PretrainTask


class FirstPixel(torch.nn.Module):
    """Logits that are the first pixel of an image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, 0, 0]


def own_batches(rank: int) -> list[Batch]:
    """Return five images split over two ranks: 0, 2, 4 and 1, 3; the pixels of an image are its number."""
    parts = [[0, 2], [4]] if rank == 0 else [[1, 3]]
    batches = []
    for part in parts:
        indices = torch.tensor(part)
        images = (indices * 50).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        batches.append(Batch(images, indices % 3, indices, 0, []))
    return batches


def measure_then_fail(fabric: Fabric, folder: Path) -> None:
    """Write the results of rank 0, then raise an error on rank 1."""
    rank = fabric.global_rank
    classify, normalise = FirstPixel(), Normaliser((0.0,) * 3, (1.0,) * 3)
    predictions = predict(fabric, lambda images: classify(normalise(images)), own_batches(rank))
    found = {
        "world_size": fabric.world_size,
        "sums": sum_over_ranks(fabric, [1.0 + rank, 0.5]),
        "objects": list(gather_objects(fabric, f"rank {rank}")),
        "uneven": gather(fabric, [np.arange(3), np.arange(2)] if rank == 1 else []).tolist(),
        "indices": predictions.indices.tolist(),
        "labels": predictions.labels.tolist(),
        "threads": torch.get_num_threads(),
    }
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    fabric.barrier()
    if rank == 1:
        raise DataError("the rule and the value", "the fix")


def train_deferred(fabric: Fabric, plan: Plan) -> dict[str, float]:
    """Train with deferred steps, as on GPUs; the third loss is bad on rank 1 only."""
    trainer.can_defer = lambda fabric: True
    return train_spoilt(fabric, plan)


def train_spoilt(fabric: Fabric, plan: Plan) -> dict[str, float]:
    """Train; the third loss is bad on rank 1 only."""
    original, calls = PretrainTask.training_loss, []

    def training_loss(task: PretrainTask, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        loss = original(task, *arguments)
        return loss * float("nan") if len(calls) == 3 and fabric.global_rank == 1 else loss

    PretrainTask.training_loss = training_loss
    return train_action._work(fabric, plan)


def train_preempted_in_validation(fabric: Fabric, plan: Plan, number: int) -> dict[str, float]:
    """Train; only process 1 gets SIGTERM when it begins the validation with this number, counted from 1."""
    original, begun = PretrainTask.validate, itertools.count(1)

    def validate(task: PretrainTask, *arguments: Any) -> dict[str, float]:
        if next(begun) == number and fabric.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(task, *arguments)

    PretrainTask.validate = validate
    return train_action._work(fabric, plan)


def fail_in_process_1(fabric: Fabric, how: str) -> None:
    """Process 1 fails while process 0 waits for it."""
    if fabric.global_rank == 1:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("by zero")
    fabric.barrier()


def scale_shared_gradients(fabric: Fabric, folder: Path) -> None:
    """Run fp16's scaler on sharded weights: clipping uses the global norm, and one infinity skips every shard."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    fabric.to_device(model)
    assert isinstance(fabric.strategy, ShardedStrategy)
    fully_shard(model, mesh=fabric.strategy.device_mesh["data_parallel"])
    optimizer: Any
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
    found = []
    for factor in (0.1, float("inf")):
        before = gathered(model.weight).clone()
        fabric.backward(wrapped(torch.ones(2, 4)).sum() * (factor if fabric.global_rank == 0 else 0.1))
        norm = gathered(fabric.clip_gradients(wrapped, optimizer, max_norm=0.05, error_if_nonfinite=False))
        optimizer.step()
        optimizer.zero_grad()
        found.append((float(norm), float((gathered(model.weight) - before).abs().max())))
    if fabric.global_rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def diverge(fabric: Fabric, plan: Plan) -> dict[str, float]:
    """Train; after the seventh step the weights are finite, but give no finite loss."""
    steps: list[int] = []

    def explode(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        steps.append(1)
        if len(steps) == 7:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(1e30)

    register_optimizer_step_post_hook(explode)
    return train_action._work(fabric, plan)


def diverge_deferred(fabric: Fabric, plan: Plan) -> dict[str, float]:
    """Diverge with deferred steps, as on GPUs."""
    trainer.can_defer = lambda fabric: True
    return diverge(fabric, plan)
