"""``mae train --plan``: print what a training run needs on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_NOTES = """\
Estimated, not measured, for one GPU.
state     weights, gradients and moments
image     memory per image of a batch, counted
batch     the largest that fits, with a tenth of the memory left for CUDA and temporary tensors
images/s  the operations of a step, and an assumed share of the GPU's peak; loading images may be slower"""


def show(spec_file: Path | None, overrides: Sequence[str]) -> None:
    """Print the table for a spec, and what the spec itself needs."""
    from openmae.actions.resources import HEADS, planned, rows, this_run
    from openmae.cli.output import print_table
    from openmae.data.presence import check_sources
    from openmae.spec.load import load_spec

    spec = load_spec(spec_file, overrides)
    check_sources(spec, "train")
    spec, images = planned(spec)
    height, width = spec.dataset.augmentation.size
    title = f"{spec.train.stage} {spec.model.arch}, {height} x {width} px"
    if spec.train.stage == "pretrain":
        title += f", decoder {spec.model.decoder_depth} x {spec.model.decoder_embed_dim}"
    print(f"{title}\n")
    print_table(HEADS, rows(spec))
    print(f"\n{_NOTES}\n\n{this_run(spec, images)}")
