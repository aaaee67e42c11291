"""Properties of parameters that the optimizer needs: their layer, and whether weight decay applies.

They depend on the model's family, unlike ``training.optim``. Layers are counted from the input to the head; layer decay
scales the learning rate by ``decay ** (head layer - layer)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor, nn

from openmae.models.build import ModelConfig

_GROUPED_CONVNEXTV2 = ("convnextv2_base", "convnextv2_large", "convnextv2_huge")


def layer_index(config: ModelConfig, model: nn.Module) -> tuple[Callable[[str], int], int]:
    """Return a function from the names of a timm classifier's parameters to their layers, and the head's layer.

    In ViT and Hiera, the embeddings are layer 0 and block i is layer i + 1 (MAE's ``lr_decay.py``). ConvNeXt V2 has one
    layer per block up to tiny, and 12 groups of blocks from base ("single" and "group" in its ``optim_factory.py``).
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

    It does not apply to position embeddings and 1-D parameters (biases, norms). In fine-tuning (MAE's ``lr_decay.py``,
    ConvNeXt V2's ``optim_factory.py``), it does not apply to the class token either. In pretraining (timm's
    ``add_weight_decay``), it applies to GRN's parameters, which are not 1-D in the official code.
    """
    if name.endswith("pos_embed"):
        return False
    if pretraining:
        return parameter.ndim > 1 or ".grn." in name
    return parameter.ndim > 1 and not name.endswith("cls_token")


def is_head(name: str) -> bool:
    """Return whether a timm classifier's parameter belongs to its head, not to the backbone."""
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
