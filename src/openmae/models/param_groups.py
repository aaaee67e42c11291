"""Properties of parameters that the optimizer needs: the layer of each, and whether it is decayed.

They are defined here so that ``training.optim`` does not depend on families. Layers are counted from the input; the
head has the highest, and layer decay scales the learning rate by ``decay ** (head layer - layer)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor, nn

from openmae.models.build import ModelConfig

_GROUPED_CONVNEXTV2 = ("convnextv2_base", "convnextv2_large", "convnextv2_huge")


def layer_index(config: ModelConfig, model: nn.Module) -> tuple[Callable[[str], int], int]:
    """Return the layer of each parameter of a timm classifier by name, and the head's layer.

    ViT and Hiera: the embeddings are layer 0, block i is layer i + 1 (MAE's ``lr_decay.py``). ConvNeXt V2: one layer
    per block up to tiny, 12 groups for base and larger (its ``optim_factory.py``: single, group).
    """
    if config.architecture.family != "convnextv2":
        head = _depth(model) + 1
        return lambda name: _transformer_layer(name, head), head
    depths = [_depth(stage) for stage in model.get_submodule("stages").children()]
    if config.arch in _GROUPED_CONVNEXTV2:
        return _convnext_group, 13
    return lambda name: _convnext_layer(name, depths), sum(depths) + 1


def is_decayed(name: str, parameter: Tensor, *, pretraining: bool = False) -> bool:
    """Return whether weight decay applies, as in the official code.

    It never applies to biases, norms and position embeddings. Fine-tuning (MAE's ``lr_decay.py``, ConvNeXt V2's
    ``optim_factory.py``) also excludes the class token and GRN. Pretraining (timm's ``add_weight_decay`` in both)
    excludes 1-D parameters, which neither tokens nor GRN's parameters are in that code.
    """
    if name.endswith("pos_embed"):
        return False
    if pretraining:
        return parameter.ndim > 1 or ".grn." in name
    return parameter.ndim > 1 and not name.endswith("cls_token")


def is_head(name: str) -> bool:
    """Return whether a timm classifier's parameter is in its head, which no backbone multiplier scales."""
    return name.startswith(("head.", "fc_norm."))


def _depth(module: nn.Module) -> int:
    return sum(1 for _ in module.get_submodule("blocks").children())


def _transformer_layer(name: str, head: int) -> int:
    if name.startswith(("pos_embed", "cls_token", "patch_embed")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else head


def _convnext_layer(name: str, depths: list[int]) -> int:
    if name.startswith("stem"):
        return 1
    place = re.match(r"stages\.(\d+)\.(?:downsample|blocks\.(\d+))", name)
    return sum(depths[: int(place[1])]) + int(place[2] or 0) + 1 if place else sum(depths) + 1


def _convnext_group(name: str) -> int:
    if name.startswith("stem"):
        return 0
    place = re.match(r"stages\.(\d+)\.(?:downsample|blocks\.(\d+))", name)
    if not place:
        return 13
    stage, block = int(place[1]), int(place[2] or 0)
    return {0: 1, 1: 2, 2: 3 + block // 3, 3: 12}[stage]
