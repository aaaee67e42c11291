"""``mae models``: list the architectures, what they cost, and for which machine they are."""

from __future__ import annotations

import argparse

from openmae.cli.parser import Parser

_HEADS = (
    *("model.arch", "family", "parameters\n[M]", "forward\n[GFLOP]", "step\n[GFLOP]", "mask unit\n[px]"),
    *("state\n[GiB]", "image\n[MiB]", "trains on"),
)
_NOTES = """\
Counted at 224 px, with the paper's mask ratio and decoder; a multiplication and an addition are two operations.
parameters  backbone without a classifier
forward     operations per image of the backbone, not masked, as in fine-tuning
step        operations per image of a pretraining step: forward and backward, encoder and decoder
mask unit   side of the square that is masked as one
state       memory for pretraining, for any batch size: weights, gradients and moments, 16 bytes per parameter
image       memory for pretraining, per image of a batch: tensors kept for the backward pass in fp32 on a GPU
trains on   CPU: a step of at most {cpu} GFLOP; otherwise the smallest GPU whose memory holds the state and a batch of
            {batch} images in fp32. A smaller dataset.batch_size or train.precision=bf16 needs less.
docs/models.md describes which one to choose, docs/benchmarks.md has measured images/s."""


def add_arguments(parser: Parser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from openmae.cli.output import print_result
    from openmae.spec.architectures import ARCHITECTURES
    from openmae.spec.costs import BATCH, COSTS, CPU_GFLOP

    values, rows = [], []
    for name, row in ARCHITECTURES.items():
        cost = COSTS[name]
        values.append(
            {
                "arch": name,
                "family": row.family,
                "parameters_m": cost.parameters_m,
                "forward_gflop": cost.forward_gflop,
                "step_gflop": cost.step_gflop,
                "mask_unit_px": row.mask_unit,
                "state_gib": round(cost.state_gib, 2),
                "image_mib": cost.image_mib,
                "machine": cost.machine,
            }
        )
        counts = (f"{cost.parameters_m:10.1f}", f"{cost.forward_gflop:7.1f}", f"{cost.step_gflop:7.1f}")
        memory = (f"{cost.state_gib:5.1f}", f"{cost.image_mib:5.0f}")
        rows.append((name, row.family, *counts, f"{row.mask_unit:9}", *memory, cost.machine))
    print_result(values, _HEADS, rows, as_json=args.json)
    if not args.json:
        print(f"\n{_NOTES.format(cpu=CPU_GFLOP, batch=BATCH)}")
