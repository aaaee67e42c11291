"""Both forms of attention on a CPU: torch's fused function, and two matrix products and a softmax.

models/attention.py chooses between them by these figures.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from openmae.models import attention

from .measure import compare
from .report import Report

FUSED, PLAIN = "fused", "plain"
_TOKENS = (17, 50, 65, 197, 257, 401, 577, 1025)
_SHAPES = ((8, 12, 64), (32, 3, 64), (8, 16, 32))  # images, heads, values per head


def run(quick: bool) -> Report:
    """Time both forms for some shapes and numbers of tokens, in training and without gradients."""
    forms: dict[str, Callable[..., Tensor]] = {FUSED: F.scaled_dot_product_attention, PLAIN: attention.plain}
    shapes, lengths = (_SHAPES[:1], _TOKENS[:2]) if quick else (_SHAPES, _TOKENS)
    rows, data = [], []
    cases = itertools.product((torch.bfloat16, torch.float32), (True, False), shapes, lengths)
    for precision, training, (images, heads, width), tokens in cases:
        shape = (images, heads, tokens, width)
        calls = {name: _call(form, shape, precision, training) for name, form in forms.items()}
        seconds = 0.01 if quick else 0.1
        found = compare(calls, items=images, turns=1 if quick else 5, warm_up=2, turn_seconds=seconds)
        fused, plain = (found.timings[name] for name in (FUSED, PLAIN))
        rows.append(
            (
                str(precision).removeprefix("torch."),
                "training" if training else "inference",
                " x ".join(map(str, shape)),
                f"{1e3 * images / fused.rate:.2f}",
                f"{1e3 * images / plain.rate:.2f}",
                f"{found.ratio(PLAIN):.2f}",
                f"{plain.slowest / fused.fastest:.2f} to {plain.fastest / fused.slowest:.2f}",
            )
        )
        data.append({"precision": rows[-1][0], "training": training, "shape": shape, **found.to_dict()})
    columns = ("precision", "pass", "images x heads x tokens x width", "fused [ms]", "plain [ms]", "ratio", "range")
    notes = [
        f"{torch.get_num_threads()} threads. Training: forward and backward passes. A ratio above 1: plain is faster.",
        f"OpenMAE uses the plain form on a CPU in bf16 for at most {attention.MOST_TOKENS} tokens.",
    ]
    return Report("Attention", columns, rows, data, notes)


def _call(
    form: Callable[..., Tensor], shape: tuple[int, ...], precision: torch.dtype, training: bool
) -> Callable[[], None]:
    """Return a call of a form under autocast, as in a model."""
    query, keys, values = (torch.randn(shape, dtype=precision, requires_grad=training) for _ in range(3))

    def call() -> None:
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, precision == torch.bfloat16):
            out = form(query, keys, values)
        if training:
            torch.autograd.grad(out.sum(), (query, keys, values))

    return call
