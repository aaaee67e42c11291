"""Parameter groups, the learning-rate schedule, and AdamW."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from openmae.errors import CheckpointError, SpecError
from openmae.models.build import ModelConfig
from openmae.models.param_groups import is_decayed, is_head, layer_index
from openmae.spec.sections.train import OptimSpec

_MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "step"})  # of AdamW


@dataclass(frozen=True)
class Schedule:
    """The learning rate. It depends only on the step, so that resuming needs no state.

    Attributes:
        optim: kind of the schedule, warmup and milestones. ``cosine`` decays to zero; ``MultiStep`` is multiplied by
            ``gamma`` at each milestone.
        peak: the learning rate after the warmup, which is linear from zero.
        steps_per_epoch: updates of the weights per epoch.
    """

    optim: OptimSpec
    peak: float
    epochs: int
    steps_per_epoch: int

    def rate(self, step: int) -> float:
        """Return the learning rate of the update with index ``step``, counted from 0."""
        return self.peak * self._factor(step)

    def _factor(self, step: int) -> float:
        optim, epoch, warmup = self.optim, step / self.steps_per_epoch, self._warmup
        if epoch < warmup:
            return (step + 1) / (warmup * self.steps_per_epoch)
        if optim.lr_scheduler == "MultiStep":
            return optim.gamma ** sum(epoch >= milestone for milestone in optim.milestones)
        progress = (epoch - warmup) / max(self.epochs - warmup, 1e-9)
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))

    @property
    def _warmup(self) -> float:
        """Epochs of warmup."""
        steps = self.optim.warmup_steps
        return self.optim.warmup_epochs if steps is None else steps / self.steps_per_epoch


def pretraining_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return two parameter groups, with and without weight decay."""
    return _group(model, weight_decay, lambda name: ("all", 1.0), pretraining=True)


def finetuning_groups(
    model: nn.Module, config: ModelConfig, weight_decay: float, layer_decay: float, backbone_multiplier: float
) -> list[dict]:
    """Return two parameter groups for each layer, with and without weight decay.

    The learning rate of layer i is scaled by ``layer_decay ** (head layer - i)``, and in the backbone also by
    ``backbone_multiplier``.
    """
    layer_of, head = layer_index(config, model)

    def place(name: str) -> tuple[str, float]:
        layer = layer_of(name)
        scale = layer_decay ** (head - layer)
        return ("head", scale) if is_head(name) else (f"layer {layer}", scale * backbone_multiplier)

    return _group(model, weight_decay, place)


def _group(
    model: nn.Module, weight_decay: float, place: Callable[[str], tuple[str, float]], pretraining: bool = False
) -> list[dict]:
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, scale = place(name)
        decayed = is_decayed(name, parameter, pretraining=pretraining)
        new = {
            "name": layer if decayed else f"{layer}, no decay",
            "lr_scale": scale,
            "weight_decay": weight_decay if decayed else 0.0,
            "params": [],
        }
        groups.setdefault((layer, decayed), new)["params"].append(parameter)
    return list(groups.values())


def build_adamw(groups: Sequence[dict], lr: float, beta1: float, beta2: float) -> torch.optim.AdamW:
    """Return a fused AdamW optimizer (available on CPU and CUDA)."""
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to ``lr`` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load AdamW's moments and step counts, but keep the groups' settings, which may have changed in the spec.

    Raises:
        CheckpointError: the state belongs to other parameters, or is not AdamW's.
    """
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        _check_shapes(optimizer, state)
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(
            f"Cannot resume: the trained parameters differ from those in the checkpoint ({error}).",
            "Restore train.freeze, or set another results_dir for a new run.",
        ) from error
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"Cannot resume: the state of the optimizer in the checkpoint is not AdamW's, or damaged ({error!r}).",
            "Use an older checkpoint, or give this one as train.pretrained_model_path to start from its weights.",
        ) from error
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def _check_shapes(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    # torch only compares the number of parameters
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=False):
        moments = state["state"].get(number)
        if not moments:
            continue  # it had no gradient yet
        if not moments.keys() >= _MOMENTS:
            raise KeyError(f"it has {', '.join(map(str, moments))} instead of {', '.join(sorted(_MOMENTS))}")
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].shape != parameter.shape:
                raise ValueError(f"moments of {tuple(moments[name].shape)} for a parameter of {tuple(parameter.shape)}")


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze the named modules (``patch_embed``, ``blocks.0``, ...).

    Raises:
        SpecError: a module does not exist, or nothing is left to train.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    for name in names:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3) or list(dict(model.named_children()))
            raise SpecError(f"train.freeze: the model has no module {name!r}.", f"Similar names: {', '.join(near)}.")
        modules[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SpecError("train.freeze: nothing is left to train.", "Freeze fewer modules.")
