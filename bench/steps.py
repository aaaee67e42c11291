"""One update of the weights: OpenMAE's, as its trainer makes it, and a reference's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from openmae.data.image_dataset import Batch
from openmae.distributed.allocator import keep_freed_memory, return_freed_memory
from openmae.models.build import ModelConfig, build_autoencoder
from openmae.models.mae import MaskedAutoencoder
from openmae.models.masking import random_mask
from openmae.models.normalise import Normaliser
from openmae.spec.architectures import get_architecture
from openmae.training.optim import build_adamw, pretraining_groups
from openmae.training.pretrain import PretrainTask

Step = Callable[[], Tensor]  # gives the loss before the update

LEARNING_RATE = 1.5e-4 * 8 / 256  # the papers' base rate at a batch of 8
_WEIGHT_DECAY, _BETA1, _BETA2 = 0.05, 0.9, 0.95
_NORMALISER = Normaliser((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(arch: str, side: int, mask_ratio: float, attention: Literal["self", "cross"] = "self") -> MaskedAutoencoder:
    """OpenMAE's autoencoder with the paper's decoder and random weights, for images of ``side`` x ``side`` pixels.

    ``attention`` "cross" replaces the paper's decoder by CrossMAE's of the same depth and width.
    """
    torch.manual_seed(0)
    config = replace(paper_config(arch, side), mask_ratio=mask_ratio, decoder_attention=attention)
    return build_autoencoder(config).to(device())


def paper_config(arch: str, side: int = 224) -> ModelConfig:
    """Return the configuration of an architecture in its paper, for images of ``side`` x ``side`` pixels."""
    row = get_architecture(arch)
    decoder = {"decoder_depth": row.decoder_depth, "decoder_embed_dim": row.decoder_embed_dim}
    return ModelConfig(arch, (side, side), mask_ratio=row.mask_ratio, **decoder)


def random_images(batch: int, side: int) -> Tensor:
    """``[B, 3, side, side]`` in uint8: what is in them does not matter for the time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator).to(device())


def normalised(images_BCHW: Tensor) -> Tensor:
    """Return uint8 images as a model takes them."""
    return _NORMALISER(images_BCHW)


def openmae_step(
    model: MaskedAutoencoder,
    images_BCHW: Tensor,
    mask_ratio: float,
    lr: float = LEARNING_RATE,
    *,
    bf16: bool = False,
    targets: float = 1.0,
) -> Step:
    """OpenMAE's update, of what its trainer calls: uint8 images are normalised and masked within it.

    On the CPU the process keeps the memory that it frees, as in a run.

    Args:
        model: it is trained.
        images_BCHW: uint8.
        mask_ratio: share of masked units.
        lr: learning rate.
        bf16: as ``train.precision=bf16`` computes.
        targets: ``model.decoder_targets``.
    """
    optimizer = build_adamw(pretraining_groups(model, _WEIGHT_DECAY), lr, _BETA1, _BETA2)
    loss_of = our_loss(model, images_BCHW, mask_ratio, bf16=bf16, targets=targets)
    return _updates(loss_of, optimizer, keeps_memory=not images_BCHW.is_cuda)


def our_loss(
    model: MaskedAutoencoder, images_BCHW: Tensor, mask_ratio: float, *, bf16: bool = False, targets: float = 1.0
) -> Callable[[int], Tensor]:
    """The forward pass of ``openmae_step``: the loss with an epoch's masks."""
    task = PretrainTask(
        model.train(), _NORMALISER, mask_ratio=mask_ratio, seed=0, monitor="train_loss", targets=targets
    )
    samples = torch.arange(len(images_BCHW), device=images_BCHW.device)
    batch = Batch(images_BCHW, torch.full_like(samples, -1), samples, 0, [])

    def loss_of(epoch: int) -> Tensor:
        with torch.autocast(images_BCHW.device.type, torch.bfloat16, enabled=bf16):
            return task.training_loss(model, batch, epoch)

    return loss_of


def reference_step(
    model: nn.Module,
    images_BCHW: Tensor,
    mask_ratio: float,
    num_units: int,
    lr: float = LEARNING_RATE,
    fused: bool = False,
) -> Step:
    """A reference's update from images that are normalised already; the masks are those of ``openmae_step``.

    Args:
        model: ``model(images, mask)`` gives the loss.
        images_BCHW: normalised.
        mask_ratio: share of masked units.
        num_units: of an image.
        lr: learning rate.
        fused: the optimizer.
    """
    model.train()
    optimizer = torch.optim.AdamW(pretraining_groups(model, _WEIGHT_DECAY), lr=lr, betas=(_BETA1, _BETA2), fused=fused)
    samples = torch.arange(len(images_BCHW), device=images_BCHW.device)

    def loss_of(epoch: int) -> Tensor:
        mask = random_mask(samples, seed=0, epoch=epoch, num_units=num_units, mask_ratio=mask_ratio)
        return model(images_BCHW, mask)

    return _updates(loss_of, optimizer)


_memory_is_kept = False


def _updates(loss_of: Callable[[int], Tensor], optimizer: torch.optim.Optimizer, keeps_memory: bool = False) -> Step:
    """Forward, backward and update; every call draws other masks, and returns when the device has done it.

    Where the contestant before had the allocator's other rule, this call changes it: it gives back what is free, or
    gets memory that the calls after it find again.
    """
    done = 0

    def step() -> Tensor:
        nonlocal done
        global _memory_is_kept
        if keeps_memory != _memory_is_kept:
            _memory_is_kept = keeps_memory
            (keep_freed_memory if keeps_memory else return_freed_memory)()
        loss = loss_of(done)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        if loss.is_cuda:
            torch.cuda.synchronize()
        return loss.detach()

    return step
