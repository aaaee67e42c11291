"""Fully sharded training (torch's FSDP2): weights, gradients and moments in parts, one a process.

Checkpoints hold complete tensors all the same, so that any other run reads them.
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
from openmae.models.build import ModelConfig, build_autoencoder, build_classifier
from openmae.models.fsdp_units import sharded_units


def shard(model: nn.Module, config: ModelConfig, fabric: Fabric) -> None:
    """Share the weights of ``model`` out, in place; nothing where the strategy is another one.

    To be called before an optimizer is made: the parameters are others afterwards. All processes must have the same
    weights.
    """
    if not isinstance(fabric.strategy, ShardedStrategy):
        return
    fabric.to_device(model)
    mesh = fabric.strategy.device_mesh["data_parallel"]
    for unit in [*sharded_units(model, config), model]:
        fully_shard(unit, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether the processes share its weights out."""
    return isinstance(model, FSDPModule)


def gathered(tree: Any, *, keep: bool = True) -> Any:
    """``tree`` with whole tensors in place of parts; where there are parts, all processes must call this.

    Args:
        tree: a tensor, or dicts and lists of them.
        keep: False: this process gives its parts and takes nothing, so that it needs no memory for the whole.
    """
    if isinstance(tree, DTensor):
        whole: Tensor = tree.full_tensor().detach()
        return whole if keep and not whole.ndim else whole.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: gathered(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, list):
        return [gathered(value, keep=keep) for value in tree]
    return tree


def distributed(payload: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """Return a checkpoint's payload with weights and moments sharded as those of ``model`` are."""
    if not is_sharded(model):
        return payload
    own = model.state_dict()
    weights = {
        name: _part(value, own.get(name.removeprefix("model."))) for name, value in payload["state_dict"].items()
    }
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {
            name: _part(value, trained[number] if number < len(trained) else None) for name, value in state.items()
        }
        for number, state in payload["optimizer"]["state"].items()
    }
    return {**payload, "state_dict": weights, "optimizer": {**payload["optimizer"], "state": moments}}


def whole_model(model: nn.Module, info: Mapping[str, Any], device: torch.device) -> nn.Module:
    """A copy of ``model`` that shares nothing out; all processes must call this.

    Args:
        info: what a checkpoint says of the model.
    """
    config = CheckpointInfo.from_dict(info).model
    copy = build_classifier(config) if config.num_classes else build_autoencoder(config)
    copy.load_state_dict(gathered(model.state_dict()))
    return copy.to(device)


def _part(value: Any, like: Tensor | None) -> Any:
    """Return a tensor sharded like ``like``; one of another shape is returned as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
