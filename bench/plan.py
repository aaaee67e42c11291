"""Resources for a large pretraining run: work, memory and hours, from counted operations and stated rates of GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openmae.models.mae import MaskedAutoencoder
from openmae.spec.architectures import get_architecture
from openmae.spec.costs import GPUS as COSTED
from openmae.spec.costs import REACHED

from . import steps
from .report import Report

SIDE = 224
_BATCH = 2  # images of the step that is counted: the operations of an image do not depend on it
_BYTES = 4  # of a value in fp32: weights, gradients and moments are kept in it, whatever the precision
_STATES = 4  # values a parameter: weight, gradient, two moments of AdamW
_PASSES = 3  # forward, and a backward of about twice as much
_SHARDS = 8
_GIB = 2**30

GPUS = {"A100": COSTED["A100"].half, "H100 SXM": COSTED["H100"].half}  # in bf16
_ARCHS = (
    "vit_base_patch16", "vit_large_patch16", "vit_huge_patch14", "hiera_base_224", "hiera_large_224", "convnextv2_base",
    "convnextv2_large",
)  # fmt: skip
_QUICK_ARCHS = ("vit_tiny_patch16",)
_DATA = {"ImageNet-1k, 800 epochs, 8 GPUs": (1.281e6 * 800, 8), "ImageNet-22k, 90 epochs, 32 GPUs": (14.2e6 * 90, 32),
         "a billion, once, 64 GPUs": (1e9, 64)}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Work of a pretraining step with the paper's mask ratio and decoder.

    Attributes:
        arch: of the encoder.
        mask_ratio: share of masked units.
        parameters: of encoder and decoder.
        operations: floating-point operations an image, forward and backward.
    """

    arch: str
    mask_ratio: float
    parameters: int
    operations: float

    @property
    def family(self) -> str:
        """Return the family of the encoder."""
        return get_architecture(self.arch).family

    def rate(self, gpu: str) -> float:
        """Images/s on one GPU, if it reaches what is assumed."""
        return GPUS[gpu] * REACHED[self.family] / self.operations


def run(quick: bool) -> Report:
    """Count the operations of each architecture's step, and say what follows."""
    works = [count(arch, 64 if quick else SIDE) for arch in (_QUICK_ARCHS if quick else _ARCHS)]
    columns = (
        "model", "mask ratio", "parameters [M]", "GFLOP an image", f"state, ddp and fsdp on {_SHARDS} [GiB]",
        "checkpoint [GiB]", *(f"images/s, {gpu}" for gpu in GPUS), *(f"hours: {name}, H100" for name in _DATA),
    )  # fmt: skip
    rows = [_row(work) for work in works]
    data: list[dict[str, Any]] = [
        {"arch": work.arch, "mask_ratio": work.mask_ratio, "parameters": work.parameters, "operations": work.operations}
        for work in works
    ]
    return Report("What a large pretraining needs", columns, rows, data, _notes())


def count(arch: str, side: int) -> Work:
    """Count a step of images of ``side`` x ``side`` pixels, as the trainer makes it."""
    mask_ratio = get_architecture(arch).mask_ratio
    model = steps.build(arch, side, mask_ratio)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Work(arch, mask_ratio, parameters, _PASSES * forward_operations(model, side, mask_ratio))


def forward_operations(model: MaskedAutoencoder, side: int, mask_ratio: float, targets: float = 1.0) -> float:
    """Floating-point operations an image of a forward pass: products and convolutions."""
    loss_of = steps.our_loss(model, steps.random_images(_BATCH, side), mask_ratio, targets=targets)
    # attention as products: of a CPU's own kernel the counter knows nothing
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss_of(0)
    return counter.get_total_flops() / _BATCH


def _row(work: Work) -> tuple[str, ...]:
    state = work.parameters * _BYTES * _STATES / _GIB
    return (
        work.arch,
        f"{work.mask_ratio:g}",
        f"{work.parameters / 1e6:.0f}",
        f"{work.operations / 1e9:.0f}",
        f"{state:.1f}, {state / _SHARDS:.1f}",
        f"{work.parameters * _BYTES * (_STATES - 1) / _GIB:.1f}",
        *(f"{work.rate(gpu):,.0f}" for gpu in GPUS),
        *(f"{images / (work.rate('H100 SXM') * gpus) / 3600:,.0f}" for images, gpus in _DATA.values()),
    )


def _notes() -> list[str]:
    rates = ", ".join(f"{gpu} {rate / 1e12:g} TFLOP/s" for gpu, rate in GPUS.items())
    reached = ", ".join(f"{family} {share:.0%}" for family, share in REACHED.items())
    return [
        f"Counted: parameters, and the products and convolutions of a forward pass at {SIDE} px (torch's "
        f"FlopCounterMode, the decoder of the paper), times {_PASSES} for a step.",
        f"Stated by the vendor, for dense bf16: {rates}. ASSUMED, not measured: the share of it that a step reaches "
        f"({reached}), and that the input keeps up. Hours are images / (images/s x GPUs), and scale with both.",
        "State is memory without activations, 16 bytes a parameter: weight, gradient and two moments in fp32. A "
        "checkpoint holds 12 of them, and 4 more with train.ema_decay.",
    ]
