"""Images/s of a pretraining step: forward, backward, update of the weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from openmae.models.mae import MaskedAutoencoder

from . import references, steps
from .measure import Comparison, Timing, compare
from .report import Report

OPENMAE = "OpenMAE"
DENSE, PLAIN, TRANSFORMERS = "dense, masked once", "plain", "transformers"
BATCH, SIDE = 8, 224
_CHECKED = 2  # images in the check that two models are the same


@dataclass(frozen=True)
class Race:
    """OpenMAE against references at one size.

    Attributes:
        arch: the model.
        targets: by mask ratio, how many times as fast as any of the references; None: no target.
        references: by name, from our model to the reference and whether its AdamW is fused.
        turns: of each contestant.
        side: of the images, in pixels.
        batch: images of a step.
    """

    arch: str
    targets: Mapping[float, float | None]
    references: Mapping[str, tuple[Callable[[MaskedAutoencoder], nn.Module], bool]]
    turns: int
    side: int = SIDE
    batch: int = BATCH


_CONVNEXT = {DENSE: (references.DenseConvNeXtV2, False)}
_HIERA = {PLAIN: (references.PlainHiera, False)}
_VIT = {TRANSFORMERS: (references.TransformersViT, True), PLAIN: (references.PlainViT, False)}
_SHARE = 0.6  # of the target at a mask ratio of .75, for .6


def _convnext(size: str, target: float, turns: int) -> Race:
    return Race(f"convnextv2_{size}", {0.75: target, 0.6: round(_SHARE * target, 2)}, _CONVNEXT, turns)


RACES = (
    _convnext("atto", 4.0, 5),
    _convnext("nano", 4.5, 3),
    _convnext("tiny", 5.5, 3),
    _convnext("base", 5.0, 3),
    Race("vit_base_patch16", {0.75: 1.3}, _VIT, 3),
    Race("hiera_tiny_224", {0.6: 1.3}, _HIERA, 3),
    Race("hiera_base_224", {0.6: 1.3}, _HIERA, 3),
)
QUICK_RACES = (
    Race("convnextv2_atto", {0.75: None, 0.6: None}, _CONVNEXT, 2, side=64, batch=2),
    Race("vit_tiny_patch16", {0.75: None}, _VIT, 2, side=64, batch=2),
    Race("hiera_tiny_224", {0.6: None}, _HIERA, 2, side=64, batch=2),
)


def run(quick: bool) -> Report:
    """Run all races, on ``torch.get_num_threads()`` threads, or on the GPU where there is one.

    Raises:
        RunError: a reference is not the same model as OpenMAE's.
    """
    rows, data = [], []
    for race in QUICK_RACES if quick else RACES:
        print(f"{race.arch} ...", file=sys.stderr, flush=True)  # minutes in all
        found = measure(race, quick)
        verdicts = judge(race, found)
        rows += [_row(race, found, verdict) for verdict in verdicts]
        data.append(
            {"arch": race.arch, "side": race.side, "batch": race.batch, "verdicts": verdicts, **found.to_dict()}
        )
    columns = ("model", "mask ratio", "reference", "reference [images/s]", "OpenMAE [images/s]", "ratio", "target")
    return Report("A pretraining step", columns, rows, data, _notes(data))


def measure(race: Race, quick: bool) -> Comparison:
    """Time the references and OpenMAE at each mask ratio, alternately.

    Raises:
        RunError: a reference is not the same model as OpenMAE's.
    """
    images = steps.random_images(race.batch, race.side)
    seen = steps.normalised(images)
    contestants: dict[str, steps.Step] = {}
    ratio = next(iter(race.targets))
    openmae = steps.build(race.arch, race.side, ratio)
    for name, (make, fused) in race.references.items():
        check = references.DenseConvNeXtV2(openmae, exact=True) if name == DENSE else make(openmae)
        references.check_same_start(openmae, check, seen[:_CHECKED], ratio)
        contestants[name] = steps.reference_step(make(openmae), seen, ratio, openmae.num_units, fused=fused)
    del openmae, check
    for ratio in race.targets:
        contestants[_openmae_label(ratio)] = steps.openmae_step(steps.build(race.arch, race.side, ratio), images, ratio)
    seconds = 0.0 if quick else 0.2
    return compare(contestants, items=race.batch, turns=race.turns, warm_up=1, turn_seconds=seconds)


def judge(race: Race, found: Comparison) -> list[dict[str, Any]]:
    """For every reference and mask ratio: how many times as fast OpenMAE is, and whether that was the target."""
    verdicts = []
    for mask_ratio, target in race.targets.items():
        for name in race.references:
            ratio = found.ratio(_openmae_label(mask_ratio), name)
            met = None if target is None else ratio >= target
            verdicts.append({"mask_ratio": mask_ratio, "reference": name, "ratio": ratio, "target": target, "met": met})
    return verdicts


def told(timing: Timing) -> str:
    """Items per second at the median, and the slowest and the fastest turn."""
    digits = 1 if timing.rate >= 10 else 2
    return f"{timing.rate:.{digits}f} ({timing.slowest:.{digits}f} to {timing.fastest:.{digits}f})"


def _openmae_label(mask_ratio: float) -> str:
    return f"{OPENMAE} {mask_ratio:g}"


def _row(race: Race, found: Comparison, verdict: dict[str, Any]) -> tuple[str, ...]:
    target = verdict["target"]
    return (
        race.arch,
        f"{verdict['mask_ratio']:g}",
        verdict["reference"],
        told(found.timings[verdict["reference"]]),
        told(found.timings[_openmae_label(verdict["mask_ratio"])]),
        f"{verdict['ratio']:.2f}",
        "" if target is None else f"{target:g}x: {'met' if verdict['met'] else 'MISSED'}",
    )


def _notes(data: list[dict[str, Any]]) -> list[str]:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    size = data[-1]
    return [
        f"{where}, float32, batch {size['batch']}, {size['side']}x{size['side']} px, the papers' decoders; contestants "
        "take turns in one process, warm-up excluded; median of the turns, the slowest and the fastest.",
        "OpenMAE's step is its trainer's: uint8 images are normalised and masked within it. References get normalised "
        "images. All have the same weights and, at the first mask ratio, the same masks; a loss is of the same pixels.",
        f"'{DENSE}': the official FCMAE without its sparse engine (what NVIDIA TAO runs): NCHW, masked after the stem, "
        "AdamW not fused; its time does not depend on the mask ratio. "
        f"'{PLAIN}': timm's own blocks, all tokens predicted, AdamW not fused. '{TRANSFORMERS}': "
        "ViTMAEForPreTraining as installed, AdamW fused as its Trainer has it.",
        "OpenMAE's process keeps the memory that a step frees (distributed/allocator.py), as in its runs; references "
        "have glibc's own rule, as in theirs. The call after a change of rule is not timed.",
        "Before each race the loss of the reference was seen to equal OpenMAE's (dense: masked around every operator).",
        f"Load before the first call: {data[0]['load']}; above 1 others were at work, and the figures are noisy.",
    ]
