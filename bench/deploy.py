"""Images/s of a classifier on the CPU: torch eager, ONNX Runtime in fp32, ONNX Runtime in int8."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch

from openmae.engines import onnx as engine
from openmae.engines.metadata import INPUT, LOGITS, ModelCard
from openmae.engines.module import DeployedModel, example_input
from openmae.engines.precision import to_int8
from openmae.engines.session import open_session
from openmae.models.build import ModelConfig, build_classifier
from openmae.spec.sections.deploy import ExportSpec

from .measure import Comparison, compare
from .report import Report, this_machine

TORCH, FP32, INT8 = "torch eager", "ONNX Runtime fp32", "ONNX Runtime int8"
ARCHES = ("vit_base_patch16", "convnextv2_tiny", "hiera_tiny_224")
QUICK_ARCHES = ("vit_tiny_patch16", "convnextv2_atto")
BATCHES = (1, 8)
FP32_TARGETS = {"vit_base_patch16": 1.1, "convnextv2_tiny": 1.5}  # times torch
INT8_TARGET = 1.5  # times fp32, where the processor has instructions for it
_TURNS = 5
_CALIBRATION = 4  # batches; random images and weights: accuracy is not measured here


def run(quick: bool) -> Report:
    """Compare the runtimes, all on ``torch.get_num_threads()`` threads.

    Raises:
        RunError: ONNX Runtime's fp32 logits differ from torch's.
    """
    rows, data = [], []
    for arch in QUICK_ARCHES if quick else ARCHES:
        model, card = build(arch, 64 if quick else 224)
        with TemporaryDirectory() as folder:
            contestants = _contestants(model, card, Path(folder))
            for batch in BATCHES:
                print(f"{arch}, batch {batch} ...", file=sys.stderr, flush=True)  # minutes in all
                found = _race(contestants, card, batch, quick)
                verdicts = {name: verdict(arch, name, found) for name in contestants}
                rows += [_row(arch, batch, name, found, verdicts[name]) for name in contestants]
                data.append({"arch": arch, "batch": batch, "targets": verdicts, **found.to_dict()})
    size = card.model.input_size
    notes = [
        f"{torch.get_num_threads()} threads; contestants take turns in one process, warm-up excluded; median of "
        f"{2 if quick else _TURNS} turns, and the slowest and the fastest.",
        f"Random weights, {card.model.num_classes} classes, {size[0]}x{size[1]} px, normalised float32 images; "
        "decoding and resizing are not in it. int8 is what mae export writes with export.quantize=int8.",
        f"Load before the first call: {data[0]['load']}; above 1 others were at work, and the figures are noisy.",
    ]
    if this_machine().int8 is not True:
        notes.append("No VNNI instructions (or the system does not say): the int8 target does not apply.")
    columns = ("model", "batch", "runtime", "images/s", "slowest to fastest", "x torch", "x fp32", "target")
    return Report("Deployed classifiers on the CPU", columns, rows, data, notes)


def build(arch: str, side: int) -> tuple[DeployedModel, ModelCard]:
    """A classifier with random weights for images of ``side`` x ``side`` pixels."""
    torch.manual_seed(0)
    config = ModelConfig(arch, (side, side), num_classes=1000)
    names = tuple(f"class {number}" for number in range(config.num_classes))
    card = ModelCard("finetune", config, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), names)
    return DeployedModel(build_classifier(config), card).eval(), card


def export(model: DeployedModel, card: ModelCard, path: Path) -> onnx.ModelProto:
    """Write ``model`` as ``mae export`` does by default, verified against torch; the model is not changed."""
    opset = ExportSpec().opset_version
    proto = engine.trace(copy.deepcopy(model), card, opset, device=torch.device("cpu"))  # tracing unfuses attention
    with engine.writing(proto, path) as file:
        engine.compare(model, card, file)
    return proto


Contestants = dict[str, Callable[[torch.Tensor], object]]


def _contestants(model: DeployedModel, card: ModelCard, folder: Path) -> Contestants:
    """Each takes normalised images ``[N, C, H, W]``."""
    proto = export(model, card, folder / "fp32.onnx")
    quantised = to_int8(proto, _calibration(card))
    with engine.writing(quantised, folder / "int8.onnx"):
        pass

    @torch.inference_mode()
    def eager(images: torch.Tensor) -> object:
        return model(images)

    return {TORCH: eager, FP32: _session(folder / "fp32.onnx"), INT8: _session(folder / "int8.onnx")}


def _calibration(card: ModelCard) -> Iterator[np.ndarray]:
    for seed in range(_CALIBRATION):
        yield example_input(card, 2, seed).numpy()


def _session(path: Path) -> Callable[[torch.Tensor], object]:
    session = open_session(path, torch.device("cpu"))
    return lambda images: session.run([LOGITS], {INPUT: images.numpy()})


def _race(contestants: Contestants, card: ModelCard, batch: int, quick: bool) -> Comparison:
    images = example_input(card, batch)
    calls = {name: lambda call=call: call(images) for name, call in contestants.items()}
    if quick:
        return compare(calls, items=batch, turns=2, warm_up=1, turn_seconds=0)
    return compare(calls, items=batch, turns=_TURNS)


def verdict(arch: str, name: str, found: Comparison) -> dict[str, Any] | None:
    """The target of a contestant, and whether it was met; None where there is none."""
    if arch not in ARCHES:
        return None
    if name == FP32 and arch in FP32_TARGETS:
        target, reference = FP32_TARGETS[arch], TORCH
    elif name == INT8 and this_machine().int8:
        target, reference = INT8_TARGET, FP32
    else:
        return None
    ratio = found.ratio(name, reference)
    return {"target": target, "reference": reference, "ratio": ratio, "met": ratio >= target}


def _row(arch: str, batch: int, name: str, found: Comparison, checked: dict[str, Any] | None) -> tuple[str, ...]:
    timing = found.timings[name]
    target = ""
    if checked:
        of = "torch" if checked["reference"] == TORCH else "fp32"
        target = f"{checked['target']}x {of}: {'met' if checked['met'] else 'MISSED'}"
    return (
        arch,
        str(batch),
        name,
        f"{timing.rate:.1f}",
        f"{timing.slowest:.1f} to {timing.fastest:.1f}",
        f"{found.ratio(name):.2f}",
        f"{found.ratio(name, FP32):.2f}" if name == INT8 else "",
        target,
    )
