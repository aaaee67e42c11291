"""Images/s of a pretraining step whose decoder does less: fewer targets, cross-attention."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from openmae.spec.architectures import get_architecture

from . import steps
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
    """Time every decoder of each architecture, by turns."""
    batch, side = (2, 64) if quick else (BATCH, SIDE)
    rows, data = [], []
    for arch in QUICK_ARCHES if quick else ARCHES:
        print(f"{arch} ...", file=sys.stderr, flush=True)
        decoders = decoders_of(arch)
        found = measure(arch, decoders, batch, side, quick)
        rows += [
            (arch, one.attention, f"{one.targets:g}", told(found.timings[str(one)]), f"{found.ratio(str(one)):.2f}")
            for one in decoders
        ]
        data.append({"arch": arch, "side": side, "batch": batch, **found.to_dict()})
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    notes = [
        f"{where}, float32, batch {batch}, {side}x{side} px, the papers' mask ratios, depths and widths of decoders; "
        "contestants take turns in one process, warm-up excluded; median of the turns, the slowest and the fastest.",
        "The ratio is to the paper's decoder (self, 1). It is no gain by itself: a step learns from less. What that "
        "costs in accuracy is measured by `python -m bench decoding_cost`.",
        f"Load before the first call: {data[0]['load']}; above 1 others were at work, and the figures are noisy.",
    ]
    columns = ("model", "decoder_attention", "decoder_targets", "images/s", "ratio")
    return Report("A pretraining step whose decoder does less", columns, rows, data, notes)


def measure(arch: str, decoders: Sequence[Decoder], batch: int, side: int, quick: bool) -> Comparison:
    """Time the steps with these decoders; the first is the reference."""
    images, mask_ratio = steps.random_images(batch, side), get_architecture(arch).mask_ratio
    contestants = {
        str(one): steps.our_step(
            steps.build(arch, side, mask_ratio, one.attention), images, mask_ratio, targets=one.targets
        )
        for one in decoders
    }
    turns, seconds = (2, 0.0) if quick else (_TURNS, 0.2)
    return compare(contestants, items=batch, turns=turns, warm_up=1, turn_seconds=seconds)
