"""The cost of checkpoints: without any, written while training waits, and written during training as OpenMAE does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from openmae.checkpoints.folder import CheckpointFolder
from openmae.training.optim import build_adamw, pretraining_groups

from . import steps
from .measure import compare
from .report import RESULTS, Report

NONE, WAITING, BESIDE = "no checkpoint", "written while the training waits", "written during training"
_BATCH, _MASK_RATIO = 8, 0.75
_STEPS = {False: 5, True: 2}  # from one checkpoint to the next, by quick
_TURNS = {False: 3, True: 1}


def run(quick: bool) -> Report:
    """Time the steps from one checkpoint to the next; files go where results of benchmarks do."""
    arch, side = ("vit_tiny_patch16", 32) if quick else ("vit_base_patch16", 224)
    model = steps.build(arch, side, _MASK_RATIO)
    step = steps.openmae_step(model, steps.random_images(_BATCH, side), _MASK_RATIO)
    payload = _payload(model)
    held: dict[str, list[float]] = {WAITING: [], BESIDE: []}
    RESULTS.mkdir(parents=True, exist_ok=True)  # on the disk: the system's folder may be memory
    with TemporaryDirectory(dir=RESULTS) as name, CheckpointFolder(Path(name), arch, keep=1) as folder:

        def save(how: str) -> None:
            start = time.perf_counter()
            folder.save(payload, 1, len(held[how]))
            if how == WAITING:
                folder.wait()
            held[how].append(time.perf_counter() - start)

        contestants = {
            NONE: partial(_steps, step, _STEPS[quick], lambda: None),
            WAITING: partial(_steps, step, _STEPS[quick], lambda: save(WAITING)),
            BESIDE: partial(_steps, step, _STEPS[quick], lambda: save(BESIDE), folder.wait),
        }
        found = compare(contestants, items=_STEPS[quick], turns=_TURNS[quick], warm_up=1, turn_seconds=0)
        folder.wait()
        size = max(path.stat().st_size for path in Path(name).glob("*.pth"))
    rows = []
    for what, timing in found.timings.items():
        each = [seconds / _STEPS[quick] for seconds in timing.seconds]
        span = f"{min(each):.3f} to {max(each):.3f}"
        stands = f"{statistics.median(held[what][1:]):.2f}" if what in held else ""  # the first takes the memory
        rows.append((what, f"{statistics.median(each):.3f}", span, f"{1 / found.ratio(what):.3f}", stands))
    columns = ("checkpoints", "seconds a step", "shortest to longest", "ratio", "the loop stands still [s]")
    notes = [
        f"{arch}, {side} px, batch {_BATCH}, mask ratio {_MASK_RATIO}, {found.threads} threads; a checkpoint of "
        f"{size / 2**20:.0f} MiB (weights and moments) every {_STEPS[quick]} steps, to the disk; median of "
        f"{_TURNS[quick]} turns, and where the loop stands still of all calls but the first, which takes the memory.",
        "Writing takes of the cores that train here, too; the loop stands still while weights and moments are copied.",
        f"Load before the start: {found.load}; above 1 others were at work, and the figures are noisy.",
    ]
    data: dict[str, Any] = {**found.to_dict(), "bytes": size, "held": held, "steps": _STEPS[quick]}
    return Report("Checkpoints", columns, rows, data, notes)


def _steps(step: steps.Step, count: int, first: Callable[[], None], last: Callable[[], None] = lambda: None) -> None:
    """Run ``count`` updates, and wait for what is written during them: no other contestant's turn contains it."""
    first()
    for _ in range(count):
        step()
    last()


def _payload(model: nn.Module) -> dict[str, Any]:
    """Return the large parts of a checkpoint: the weights, and two moments for each."""
    optimizer = build_adamw(pretraining_groups(model, 0.05), 1e-4, 0.9, 0.95)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    optimizer.zero_grad()
    return {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
