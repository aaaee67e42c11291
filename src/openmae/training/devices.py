"""The machine a run gets: device, processes and precision, through Lightning Fabric."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from torch.multiprocessing.spawn import ProcessRaisedException

from openmae.errors import OpenMAEError, RunError, SpecError

T = TypeVar("T")

log = logging.getLogger("openmae")

_PRECISIONS: dict[str, Literal["32-true", "16-mixed", "bf16-mixed"]] = {
    "fp32": "32-true",
    "fp16": "16-mixed",
    "bf16": "bf16-mixed",
}


def build_fabric(
    section: str, num_gpus: int, gpu_ids: Sequence[int], num_nodes: int, precision: str = "fp32"
) -> Fabric:
    """A Fabric that is not launched yet.

    Without a GPU it trains on the CPU, with a notice; several devices are then so many processes over gloo. One Python
    process spawns the others.

    Args:
        section: of the spec, for messages: ``train``, ``evaluate`` or ``inference``.
        num_gpus: devices of this machine to use.
        gpu_ids: which of them; used where there are ``num_gpus`` of them.
        precision: fp32, fp16 or bf16.

    Raises:
        SpecError: more machines or GPUs than there are.
    """
    if num_nodes > 1:
        raise SpecError(
            f"{section}.num_nodes: this version runs on one machine, got {num_nodes}.",
            f"Set {section}.num_nodes=1.",
        )
    strategy = DDPStrategy(start_method="spawn") if num_gpus > 1 else "auto"
    if torch.cuda.is_available():
        devices = _gpus(section, num_gpus, gpu_ids)
        return Fabric(accelerator="cuda", devices=devices, strategy=strategy, precision=_PRECISIONS[precision])
    with_processes = f" with {num_gpus} processes" if num_gpus > 1 else ""
    log.info("No GPU was found: running on the CPU%s.", with_processes)
    if precision == "fp16":
        log.warning("%s.precision=fp16 needs a GPU: using fp32.", section)
        precision = "fp32"
    return Fabric(accelerator="cpu", devices=num_gpus, strategy=strategy, precision=_PRECISIONS[precision])


def share_cores(fabric: Fabric) -> None:
    """Give each CPU process its part of the cores, so that they do not compete."""
    if fabric.device.type == "cpu" and fabric.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // fabric.world_size))


def describe_device(fabric: Fabric) -> str:
    """For the recipe: ``1 x NVIDIA H100``, ``CPU, 2 threads``."""
    if fabric.device.type == "cuda":
        return f"{fabric.world_size} x {torch.cuda.get_device_name(fabric.device)}"
    processes = f"{fabric.world_size} processes of " if fabric.world_size > 1 else ""
    return f"CPU, {processes}{torch.get_num_threads()} threads"


def launch(fabric: Fabric, work: Callable[..., T], *arguments: Any) -> T:
    """Call ``work(fabric, *arguments)`` in every process of ``fabric``; returns what rank 0 gave.

    Raises:
        OpenMAEError: the one that a process raised.
        RunError: a process failed in another way; the text is its own.
    """
    try:
        return fabric.launch(partial(_call, work=work, arguments=arguments))
    except ProcessRaisedException as error:
        if found := _CARRIED.search(str(error)):
            raise pickle.loads(bytes.fromhex(found[1])) from None
        raise RunError(f"A process failed:\n{error}") from error


class _Carrier(Exception):
    """Carries an error out of a spawned process, of which only a text comes back."""


_CARRIED = re.compile(r"_Carrier: ([0-9a-f]+)")


def _call(fabric: Fabric, work: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    """Bound by ``partial``, as Fabric copies the arguments it is given, and cannot copy a frozen dataclass."""
    if fabric.world_size == 1:
        return work(fabric, *arguments)
    # a spawned process starts without its parent's log handlers
    logging.basicConfig(level=logging.INFO if fabric.is_global_zero else logging.ERROR, format="%(message)s")
    try:
        return work(fabric, *arguments)
    except OpenMAEError as error:
        raise _Carrier(pickle.dumps(error).hex()) from error


def _gpus(section: str, num_gpus: int, gpu_ids: Sequence[int]) -> list[int]:
    present = torch.cuda.device_count()
    wanted = list(gpu_ids) if len(gpu_ids) == num_gpus else list(range(num_gpus))
    if missing := [gpu for gpu in wanted if gpu >= present]:
        raise SpecError(
            f"{section}.gpu_ids: this machine has {present} GPU(s), 0 to {present - 1}; there is no GPU {missing[0]}.",
            f"Set {section}.num_gpus={min(present, num_gpus)} and {section}.gpu_ids to GPUs that exist.",
        )
    return wanted
