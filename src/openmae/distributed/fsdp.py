"""Fully sharded training (PyTorch's FSDP2): each process has a shard of the weights, gradients and moments.

Checkpoints always hold complete tensors, so they can be loaded with any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from openmae.checkpoints.format import CheckpointInfo
from openmae.distributed.rendezvous import ShardedStrategy
from openmae.models.blocks import sharded_units
from openmae.models.build import ModelConfig, build_model


def shard(model: nn.Module, config: ModelConfig, fabric: Fabric) -> None:
    """Shard the weights of ``model`` in place; do nothing under another strategy.

    Call this before the optimizer is created, since it replaces the parameters. All processes must have equal weights.
    """
    if not isinstance(fabric.strategy, ShardedStrategy):
        return
    fabric.to_device(model)
    mesh = fabric.strategy.device_mesh["data_parallel"]
    for unit in [*sharded_units(model, config), model]:
        fully_shard(unit, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Return whether ``model`` is sharded."""
    return isinstance(model, FSDPModule)


def gathered(tree: Any, *, keep: bool = True) -> Any:
    """Return ``tree`` (nested dicts and lists) with complete tensors instead of shards.

    If there are shards, all processes must call this; without ``keep``, a process gets None for each sharded tensor.
    """
    if isinstance(tree, DTensor):
        complete: Tensor = tree.full_tensor().detach()
        if not keep:
            return None
        return complete.cpu() if complete.ndim else complete
    if isinstance(tree, Mapping):
        return {key: gathered(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, list):
        return [gathered(value, keep=keep) for value in tree]
    return tree


def distributed(payload: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """Return a checkpoint's payload, with its weights and moments sharded if ``model`` is sharded."""
    if not is_sharded(model):
        return payload
    own = model.state_dict()
    weights = {
        name: _shard_of(value, own.get(name.removeprefix("model."))) for name, value in payload["state_dict"].items()
    }
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {
            name: _shard_of(value, trained[number] if number < len(trained) else None) for name, value in state.items()
        }
        for number, state in payload["optimizer"]["state"].items()
    }
    return {**payload, "state_dict": weights, "optimizer": {**payload["optimizer"], "state": moments}}


def gathered_model(model: nn.Module, info: Mapping[str, Any], device: torch.device) -> nn.Module:
    """Return a copy of a sharded model with complete weights, on ``device``; all processes must call this.

    ``info`` is the description of the model in its checkpoints.
    """
    config = CheckpointInfo.from_dict(info).model
    copy = build_model(config)
    copy.load_state_dict(gathered(model.state_dict()))
    return copy.to(device)


def _shard_of(value: Any, like: Tensor | None) -> Any:
    """Return this process's shard of ``value``, or ``value`` itself if ``like`` is not sharded or differs in shape."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
