"""Growth of the time of OpenMAE's pretraining step with the work, as a fitted exponent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import timm
import torch

from openmae.models.build import ModelConfig
from openmae.models.encoders import ConvNeXtV2Encoder, MaskedEncoder, ViTEncoder
from openmae.models.mae import MaskedAutoencoder
from openmae.spec.architectures import visible_units

from . import steps
from .measure import Comparison, compare
from .report import Report

BATCH, SIDE, MASK_RATIO = 2, 224, 0.75
_QUICK_SIDE = 64


@dataclass(frozen=True)
class Axis:
    """One way to have more work, from a middling step on.

    Attributes:
        name: in the table.
        values: that are measured.
        work: from a value to what grows; the exponent is of this.
        unit: of the work.
    """

    name: str
    values: Sequence[float]
    work: Callable[[float], float]
    unit: str


@dataclass(frozen=True)
class Point:
    """A step's setting; ``depth`` multiplies the encoder's blocks."""

    arch: str
    batch: int = BATCH
    side: int = SIDE
    mask_ratio: float = MASK_RATIO
    depth: float = 1


BATCHES = Axis("batch", (1, 2, 4, 8), lambda batch: batch, "images")
SIDES = Axis("side", (128, 160, 224, 320), lambda side: side**2, "pixels")
DEPTHS = Axis("depth", (0.5, 1, 2), lambda depth: depth, "encoder blocks")
QUICK_BATCHES = Axis("batch", (1, 2), lambda batch: batch, "images")


def mask_ratios(unit: int) -> Axis:
    """Return the axis of mask ratios for images of ``SIDE`` px and units of ``unit`` px: the visible units grow."""
    units = (SIDE // unit) ** 2
    return Axis("mask_ratio", (0.9, 0.75, 0.6, 0.4), lambda ratio: visible_units(units, ratio), "visible units")


ARCHES = {"convnextv2_atto": 32, "vit_tiny_patch16": 16}  # and their mask units


def run(quick: bool) -> Report:
    """Time steps along each axis, those of an architecture alternately."""
    rows, data = [], []
    for arch, unit in ARCHES.items():
        print(f"{arch} ...", file=sys.stderr, flush=True)
        axes = (QUICK_BATCHES,) if quick else (BATCHES, SIDES, mask_ratios(unit), DEPTHS)
        base = Point(arch, side=_QUICK_SIDE) if quick else Point(arch)
        found = measure(base, axes, quick)
        for axis in axes:
            timings = [found.timings[str(_at(base, axis, value))] for value in axis.values]
            seconds = [timing.items / timing.rate for timing in timings]
            exponent, deviation = fit([axis.work(value) for value in axis.values], seconds)
            points = ", ".join(f"{axis.work(v):g}: {1000 * s:.0f}" for v, s in zip(axis.values, seconds, strict=True))
            rows.append((arch, axis.unit, points, f"{exponent:.2f}", f"{100 * deviation:.0f} %"))
            data.append(
                {"arch": arch, "axis": axis.name, "values": list(axis.values), "exponent": exponent}
                | {"deviation": deviation, "seconds": [list(timing.seconds) for timing in timings]}
            )
    notes = [
        f"Unless it varies: batch {BATCH}, {base.side}x{base.side} px, mask ratio {MASK_RATIO}, the papers' depth and "
        "decoder. Steps take turns in one process, warm-up excluded; medians.",
        "The exponent is the slope of a straight line through the logarithms of work and time (least squares): 1 is "
        "proportional, less has a fixed part. Off the line: the largest distance of a point, as a share of its time.",
        f"{torch.get_num_threads()} threads. Load before the first call: {found.load}; above 1 others were at "
        "work, and the figures are noisy.",
    ]
    columns = ("model", "work", "work: step [ms]", "exponent", "off the line")
    return Report("A pretraining step as the work grows", columns, rows, data, notes)


def measure(base: Point, axes: Sequence[Axis], quick: bool) -> Comparison:
    """Time the steps along all axes from ``base`` on; a setting that axes share is timed once."""
    points = {str(point): point for axis in axes for point in (_at(base, axis, value) for value in axis.values)}
    contestants = {name: _step(point) for name, point in points.items()}
    turns, seconds = (2, 0.0) if quick else (3, 0.2)
    return compare(contestants, items=1, turns=turns, warm_up=1, turn_seconds=seconds)


def fit(work: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """The exponent of time over work, by least squares of logarithms, and the largest relative distance from it."""
    x, y = np.log(work), np.log(seconds)
    slope, intercept = np.polyfit(x, y, 1)
    off = np.abs(np.expm1(y - (slope * x + intercept))).max()
    return float(slope), float(off)


def build(point: Point) -> MaskedAutoencoder:
    """The architecture's autoencoder, its encoder as deep as the point says."""
    model = steps.build(point.arch, point.side, point.mask_ratio)
    if point.depth != 1:
        model.encoder = _encoder(ModelConfig(point.arch, (point.side, point.side)), point.depth).to(steps.device())
        model.encoder.init_weights()
    return model


def _encoder(config: ModelConfig, depth: float) -> MaskedEncoder:
    """Return the encoder of ``build_encoder`` with another number of blocks."""
    row = config.architecture
    if row.family == "vit":
        blocks = round(depth * 12)
        options = {"img_size": config.input_size, "num_classes": 0, "global_pool": "token", "depth": blocks}
        encoder = ViTEncoder(timm.create_model(row.timm_name, **options))
        encoder.backbone.pos_embed.requires_grad_(False)
        return encoder
    shallow = timm.create_model(row.timm_name, num_classes=0)
    depths = tuple(round(depth * len(stage.blocks)) for stage in shallow.stages)
    return ConvNeXtV2Encoder(timm.create_model(row.timm_name, num_classes=0, depths=depths), config.input_size)


def _at(base: Point, axis: Axis, value: float) -> Point:
    return replace(base, **{axis.name: value})


def _step(point: Point) -> steps.Step:
    images = steps.random_images(point.batch, point.side)
    return steps.openmae_step(build(point), images, point.mask_ratio)
