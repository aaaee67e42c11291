"""The faster of two forms of attention: torch's fused function, or two matrix products and a softmax.

The fused function is the right one on GPUs, in fp32, and for long sequences, for which it saves memory. On CPUs in bf16
it is slow for short sequences: with 17 to 65 tokens (12 heads of 64 values, 8 images, forward and backward passes) the
plain form took a sixth to a tenth of its time, with 257 a third, and with 1,025 as long (torch 2.14, AVX512-BF16).
``python -m bench attention`` measures both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_TOKENS = 320  # with more, the plain form is hardly faster; ViT-Base then keeps 7 MiB per image and block


def use_fastest_attention(model: nn.Module) -> None:
    """Let each of timm's attention layers choose its form whenever it is called; not those that must not be fused."""
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.register_forward_pre_hook(_choose)


def keep_plain_attention(model: nn.Module) -> None:
    """Make all attention layers plain for good, for exporters that do not support the fused function."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module._forward_pre_hooks.clear()
            setattr(module, "fused_attn", False)  # noqa: B010 (a module's attributes are typed as tensors)


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the attention's output ``[..., Q, D]`` for queries ``[..., Q, D]`` and keys and values ``[..., K, D]``."""
    form = plain if _is_plain_faster(query, keys.shape[-2]) else F.scaled_dot_product_attention
    return form(query, keys, values)


def plain(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return what ``attend`` returns, from two matrix products and a softmax, as timm does without fused attention."""
    return (query * query.shape[-1] ** -0.5 @ keys.transpose(-2, -1)).softmax(dim=-1) @ values


def _choose(module: Any, inputs: tuple[Tensor, ...]) -> None:
    tokens = inputs[0].shape[1]
    if getattr(module, "use_mask_unit_attn", False):  # Hiera's attention within mask units
        tokens = module.q_stride * module.window_size
    module.fused_attn = not _is_plain_faster(inputs[0], tokens)


def _is_plain_faster(x: Tensor, tokens: int) -> bool:
    if x.device.type != "cpu" or tokens > MOST_TOKENS:
        return False
    autocast = torch.is_autocast_enabled("cpu")
    return (torch.get_autocast_dtype("cpu") if autocast else x.dtype) == torch.bfloat16
