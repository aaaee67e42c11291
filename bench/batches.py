"""Memory of a pretraining step on a GPU, and the largest batch that fits, by architecture; counted without a GPU."""

from __future__ import annotations

import sys

import torch

from openmae.models.gpu_memory import StepMemory, step_memory
from openmae.spec.architectures import ARCHITECTURES
from openmae.spec.costs import GPU_SIZES, USABLE

from .report import Report
from .steps import paper_config

_MIB = 2**20


def run(quick: bool) -> Report:
    """Count each architecture in three ways."""
    rows, data = [], []
    for arch in ("vit_tiny_patch16",) if quick else ARCHITECTURES:
        print(f"{arch} ...", file=sys.stderr, flush=True)
        config = paper_config(arch)
        full = step_memory(config)
        half, recomputed = (step_memory(config, torch.bfloat16, recompute=recompute) for recompute in (False, True))
        images = (f"{memory.image / _MIB:.0f}" for memory in (full, half, recomputed))
        batches = (_batches(half, recomputed, size) for size in GPU_SIZES)
        rows.append((f"`{arch}`", f"{full.state / 2**30:.1f}", *images, *batches))
        data.append({"arch": arch, "fp32": vars(full), "bf16": vars(half), "recomputed": vars(recomputed)})
    columns = (
        *("model", "state [GiB]", "image, fp32 [MiB]", "image, bf16", "image, bf16, checkpointing"),
        *(f"batch, {size} GB" for size in GPU_SIZES),
    )
    notes = [
        "Pretraining at 224 px with the paper's mask ratio and decoder. state: weights, gradients and moments in fp32. "
        "image: memory per image of a batch. Counted, not measured.",
        "batch: the largest one in bf16, without and with train.activation_checkpointing, that leaves "
        f"{1 - USABLE:.0%} of the memory for CUDA and temporary tensors.",
    ]
    return Report("Memory of pretraining on a GPU", columns, rows, data, notes)


def _batches(half: StepMemory, recomputed: StepMemory, gib: float) -> str:
    return ", ".join(f"{memory.largest_batch(gib) or '-'}" for memory in (half, recomputed))
