"""torch.compile around a model, for those who ask for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from openmae.errors import RunError

log = logging.getLogger("openmae")


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` to be compiled at its first step; its own parameters, and their names, stay what they are."""
    if device.type == "cpu":
        log.warning(
            "train.compile is meant for GPUs: on a CPU the first steps take minutes longer, and where it was measured "
            "the others gained nothing."
        )
    wrapped = torch.compile(model)
    assert isinstance(wrapped, nn.Module)  # as a module goes in
    return wrapped


@contextmanager
def compile_errors() -> Iterator[None]:
    """Tell what torch.compile cannot do as a RunError."""
    from torch._dynamo.exc import TorchDynamoException  # loads the compiler

    try:
        yield
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__  # the rest is a trace and hints for torch's developers
        raise RunError(
            f"torch.compile could not compile the model: {reason}",
            "Set train.compile=false, or install what it needs: a C++ compiler, and Triton for a GPU.",
        ) from error
