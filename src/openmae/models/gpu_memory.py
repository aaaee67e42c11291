"""Memory of a training step on a GPU, counted without one: on tensors that have a size and a device, but no values.

Counted is what is alive at the end of the forward pass. With activation checkpointing, the activations of the largest
block are added, which the backward pass computes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from openmae.models.blocks import blocks_of, keeping_activations, recompute_activations
from openmae.models.build import ModelConfig, build_model
from openmae.models.mae import MaskedAutoencoder
from openmae.models.masking import count_visible, mask_from_noise
from openmae.models.memory import LiveMemory
from openmae.spec.costs import STATE_BYTES, USABLE

_MORE = 2  # images that the second counted batch has more than the first


@dataclass(frozen=True)
class StepMemory:
    """Memory that training needs.

    Attributes:
        state: bytes of weights, gradients and moments.
        image: bytes per image of a batch.
    """

    state: int
    image: float

    def needed(self, images: int) -> float:
        """Return the bytes for a batch."""
        return self.state + images * self.image

    def largest_batch(self, gib: float) -> int:
        """Return how many images fit on a GPU with ``gib`` GiB, rounded down to two significant bits; 0 if none.

        Example:
            >>> StepMemory(state=2**30, image=2**26).largest_batch(8)
            96
        """
        free = USABLE * gib * 2**30 - self.state
        images = max(int(free / self.image), 0)
        return images >> max(images.bit_length() - 2, 0) << max(images.bit_length() - 2, 0)


def step_memory(config: ModelConfig, dtype: torch.dtype = torch.float32, *, recompute: bool = False) -> StepMemory:
    """Return the memory of a training step on one GPU.

    Args:
        config: the model; it is pretrained if it has no classes.
        dtype: of autocast; float32 switches it off.
        recompute: with activation checkpointing.
    """
    model = build_model(config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with FakeTensorMode() as mode:
        move_to_fake_gpu(model, mode)
        if not recompute:
            return StepMemory(STATE_BYTES * trained, _per_image(model, config, dtype))
        recompute_activations(model)
        inputs, largest = _per_image(model, config, dtype), 0.0
        for block in _distinct(model):
            with keeping_activations(block):
                largest = max(largest, _per_image(model, config, dtype) - inputs)
        return StepMemory(STATE_BYTES * trained, inputs + largest)


def move_to_fake_gpu(model: nn.Module, mode: FakeTensorMode) -> None:
    """Give the model fake weights on a fake GPU."""
    previous = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model._apply(lambda tensor: mode.from_tensor(tensor).to("cuda"))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(previous)


def _per_image(model: Any, config: ModelConfig, dtype: torch.dtype) -> float:
    """Return the bytes that a forward pass keeps per image."""
    one, more = (_kept(model, config, dtype, images) for images in (1, 1 + _MORE))
    return (more - one) / _MORE  # what does not depend on the images cancels


def _kept(model: Any, config: ModelConfig, dtype: torch.dtype, count: int) -> int:
    with LiveMemory() as memory, _autocast(dtype), _FusedAttention():
        images = torch.zeros(count, config.in_chans, *config.input_size, device="cuda")
        if config.num_classes:
            kept = model(images)
        else:
            visible = count_visible(model.num_units, config.mask_ratio)
            noise = torch.zeros(count, model.num_units, device="cuda")
            kept = model(images, mask_from_noise(noise, visible))
        assert kept is not None  # alive until the memory is read
        return memory.bytes


class _FusedAttention(TorchFunctionMode):
    """Uses the fused attention of GPUs. Without a driver, torch would choose the plain form."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention and args[0].ndim == 4:  # no kernel takes Hiera's five dimensions
            query, keys, values = args[:3]
            if torch.is_autocast_enabled("cuda"):
                query, keys, values = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, keys, values))
            return torch.ops.aten._scaled_dot_product_efficient_attention(query, keys, values, None, True)[0]
        return function(*args, **(kwargs or {}))


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    """Do what ``torch.autocast("cuda", dtype)`` does where there is a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not torch.float32)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def _distinct(model: nn.Module) -> list[nn.Module]:
    """Return one block of each size, of encoder and decoder; those of a stage have the same."""
    parts = [model.encoder, model.decoder] if isinstance(model, MaskedAutoencoder) else [model]
    found: dict[tuple[int, int], nn.Module] = {}
    for number, part in enumerate(parts):
        for block in blocks_of(part):
            found.setdefault((number, sum(p.numel() for p in block.parameters())), block)
    return list(found.values())
