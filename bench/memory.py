"""Peak memory of a pretraining step, each in a separate process, which ``python -m bench.memory`` runs."""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from openmae.errors import RunError

from . import steps
from .pretrain import DENSE, OPENMAE, QUICK_RACES, RACES, Race
from .report import Report

TARGET = 0.5  # of the reference's, for ConvNeXt V2
_UPDATES = 2  # the first one allocates the optimizer's moments, the second has them in addition to its activations
_AT_ONCE = 2  # processes, to save time
_MIB = 2**20


def run(quick: bool) -> Report:
    """Measure OpenMAE and its references, two at a time.

    Raises:
        RunError: a process failed.
    """
    races = QUICK_RACES if quick else RACES
    wanted = [
        (number, contestant, mask_ratio)
        for number, race in enumerate(races)
        for contestant, mask_ratio in _contestants(race)
    ]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        peaks = dict(zip(wanted, pool.map(lambda one: peak(*one, quick), wanted), strict=True))
    rows, data = [], []
    for number, race in enumerate(races):
        for mask_ratio in race.targets:
            openmae = peaks[number, OPENMAE, mask_ratio]
            for name in race.references:
                reference = peaks[number, name, next(iter(race.targets))]
                verdict = judge(openmae, reference, TARGET if name == DENSE and not quick else None)
                rows.append(_row(race, mask_ratio, name, reference, openmae, verdict))
                data.append(
                    {"arch": race.arch, "side": race.side, "batch": race.batch, "mask_ratio": mask_ratio}
                    | {"reference": name, "reference_bytes": reference, "openmae_bytes": openmae, **verdict}
                )
    columns = ("model", "mask ratio", "reference", "reference [MiB]", "OpenMAE [MiB]", "share", "target")
    return Report("Peak memory of a pretraining step", columns, rows, data, _notes())


def _contestants(race: Race) -> list[tuple[str, float]]:
    """Each with a mask ratio; a reference holds the same at all of them."""
    first = next(iter(race.targets))
    return [(name, first) for name in race.references] + [(OPENMAE, mask_ratio) for mask_ratio in race.targets]


def peak(number: int, contestant: str, mask_ratio: float, quick: bool) -> dict[str, int]:
    """Return the peak memory of a process in bytes: ``total``, and ``step``, without the memory before the model.

    Args:
        number: of the race in ``RACES``.
        contestant: ``OPENMAE``, or the name of a reference of the race.
        mask_ratio: of the step.
        quick: count in ``QUICK_RACES``.

    Raises:
        RunError: the process failed.
    """
    command = [sys.executable, "-m", "bench.memory", str(number), contestant, str(mask_ratio)]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // _AT_ONCE)),
        "MALLOC_MMAP_THRESHOLD_": str(_MIB),  # or what glibc keeps of freed blocks differs by a fifth from run to run
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command += ["--quick"] if quick else []
    print(f"{contestant}, {mask_ratio} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"The step of {contestant} failed: {done.stderr}", "Free some memory, or run it by hand.")
    values: dict[str, int] = json.loads(done.stdout)
    return values


def judge(openmae: dict[str, int], reference: dict[str, int], target: float | None) -> dict[str, Any]:
    """OpenMAE's share of the reference's memory, and whether that was the target."""
    share = openmae["step"] / reference["step"]
    return {"share": share, "target": target, "met": None if target is None else share <= target}


def main() -> None:
    """Measure one contestant in this process, and print the bytes as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("number", type=int)
    parser.add_argument("contestant")
    parser.add_argument("mask_ratio", type=float)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    race = (QUICK_RACES if args.quick else RACES)[args.number]
    images = steps.random_images(race.batch, race.side)
    if args.contestant.startswith("transformers"):
        import transformers  # noqa: F401  (its modules are no part of the step)
    with torch.enable_grad():
        torch.ones(
            1, requires_grad=True
        ).sum().backward()  # the autograd engine's threads are not part of the step either
    before = _held()
    step = _step(race, args.contestant, images, args.mask_ratio)
    gc.collect()
    _forget_peak()
    for _ in range(_UPDATES):
        step()
    total = _held_at_most()
    print(json.dumps({"total": total, "step": total - before}))


def _step(race: Race, contestant: str, images: torch.Tensor, mask_ratio: float) -> steps.Step:
    openmae = steps.build(race.arch, race.side, mask_ratio)
    if contestant == OPENMAE:
        return steps.openmae_step(openmae, images, mask_ratio)
    make, fused = race.references[contestant]
    seen = steps.normalised(images)
    return steps.reference_step(make(openmae), seen, mask_ratio, openmae.num_units, fused=fused)


def _held() -> int:
    """Bytes resident, or allocated on the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status("VmRSS") or _held_at_most()


def _held_at_most() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # On Linux getrusage's figure is that of the parent process, if this was more.
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _forget_peak() -> None:
    """Let the peak be what is held now, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (path := Path("/proc/self/clear_refs")).exists():
        path.write_text("5")


def _status(name: str) -> int | None:
    """A figure of Linux's about this process, in bytes."""
    path = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s+(\d+) kB$", path.read_text(), re.MULTILINE) if path.exists() else None
    return int(found[1]) * 1024 if found else None


def _row(
    race: Race,
    mask_ratio: float,
    name: str,
    reference: dict[str, int],
    openmae: dict[str, int],
    verdict: dict[str, Any],
) -> tuple[str, ...]:
    target = verdict["target"]
    return (
        race.arch,
        f"{mask_ratio:g}",
        name,
        _told(reference),
        _told(openmae),
        f"{verdict['share']:.2f}",
        "" if target is None else f"{target:g}: {'met' if verdict['met'] else 'MISSED'}",
    )


def _told(held: dict[str, int]) -> str:
    return f"{held['step'] / _MIB:.0f} ({held['total'] / _MIB:.0f})"


def _notes() -> list[str]:
    what = "allocated on the GPU" if torch.cuda.is_available() else "resident"
    return [
        f"The most that a process had {what} during {_UPDATES} updates, without what it had before the model was built "
        "(interpreter, libraries, a batch of images); in brackets with it. Weights, gradients, moments and activations "
        "are in both. Models, batches and references are those of the pretraining step. Freed blocks of 1 MiB and more "
        "are given back at once, so that what a step holds is counted, and not what the C library keeps.",
    ]


if __name__ == "__main__":
    main()
