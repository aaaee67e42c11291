"""Images/s of a pretraining step whose decoder does less: fewer targets, cross-attention."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from openmae.spec.architectures import get_architecture

from . import plan, steps
from .measure import Comparison, compare
from .pretrain import BATCH, SIDE, told
from .report import Report


@dataclass(frozen=True)
class Decoder:
    """A way to decode.

    Attributes:
        attention: ``model.decoder_attention``.
        targets: ``model.decoder_targets``.
    """

    attention: Literal["self", "cross"]
    targets: float

    def __str__(self) -> str:
        return f"{self.attention} {self.targets:g}"


DECODERS = tuple(
    Decoder(attention, targets)
    for attention, targets in (("self", 1.0), ("self", 0.5), ("self", 0.25), ("cross", 1.0), ("cross", 0.25))
)  # the first is the paper's
ARCHES = ("vit_base_patch16", "hiera_tiny_224", "convnextv2_tiny")
QUICK_ARCHES = ("vit_tiny_patch16", "convnextv2_atto")
_TURNS = 3


def decoders_of(arch: str) -> list[Decoder]:
    """Those that the architecture can have."""
    convolution = get_architecture(arch).family == "convnextv2"
    return [decoder for decoder in DECODERS if decoder.attention == "self" or not convolution]


def run(quick: bool) -> Report:
    """Time the decoders of each architecture alternately."""
    batch, side = (2, 64) if quick else (BATCH, SIDE)
    rows, data = [], []
    for arch in QUICK_ARCHES if quick else ARCHES:
        print(f"{arch} ...", file=sys.stderr, flush=True)
        decoders = decoders_of(arch)
        found = measure(arch, decoders, batch, side, quick)
        work = {str(one): operations(arch, one, side) for one in decoders}
        for one in decoders:
            name, own = str(one), f"{work[str(one)] / work[found.reference]:.2f}"
            rows.append(
                (arch, one.attention, f"{one.targets:g}", told(found.timings[name]), f"{found.ratio(name):.2f}", own)
            )
        data.append({"arch": arch, "side": side, "batch": batch, "operations": work, **found.to_dict()})
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    notes = [
        f"{where}, float32, batch {batch}, {side}x{side} px, the papers' mask ratios, depths and widths of decoders; "
        "contestants take turns in one process, warm-up excluded; median of the turns, the slowest and the fastest.",
        "The ratio is to the paper's decoder (self, 1). It is no gain by itself: a step learns from less. What that "
        "costs in accuracy is measured by `python -m bench decoding_cost`.",
        "Operations: of the products and convolutions of a forward pass (torch's FlopCounterMode), as a share of those "
        "with the paper's decoder. ConvNeXt V2's convolutions need the whole grid, so fewer targets save it little.",
        f"Load before the first call: {data[0]['load']}; above 1 others were at work, and the figures are noisy.",
    ]
    columns = ("model", "decoder_attention", "decoder_targets", "images/s", "ratio", "operations")
    return Report("A pretraining step whose decoder does less", columns, rows, data, notes)


def operations(arch: str, decoder: Decoder, side: int) -> float:
    """Return the operations of a forward pass, per image."""
    mask_ratio = get_architecture(arch).mask_ratio
    return plan.forward_operations(
        steps.build(arch, side, mask_ratio, decoder.attention), side, mask_ratio, decoder.targets
    )


def measure(arch: str, decoders: Sequence[Decoder], batch: int, side: int, quick: bool) -> Comparison:
    """Time the steps with these decoders; the first is the reference."""
    images, mask_ratio = steps.random_images(batch, side), get_architecture(arch).mask_ratio
    contestants = {
        str(one): steps.openmae_step(
            steps.build(arch, side, mask_ratio, one.attention), images, mask_ratio, targets=one.targets
        )
        for one in decoders
    }
    turns, seconds = (2, 0.0) if quick else (_TURNS, 0.2)
    return compare(contestants, items=batch, turns=turns, warm_up=1, turn_seconds=seconds)
