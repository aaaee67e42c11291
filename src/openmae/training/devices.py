"""The machine a run gets: device, processes and precision, through Lightning Fabric."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.strategies.ddp import DDPStrategy
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from openmae.errors import OpenMAEError, RunError, SpecError
from openmae.results.notices import notices_on_stderr
from openmae.training.interrupt import InterruptRelay, join_relay

T = TypeVar("T")

log = logging.getLogger("openmae")

_PRECISION_NAMES = {"32-true": "fp32", "16-mixed": "fp16", "bf16-mixed": "bf16"}

# of a machine with SLURM: a job there starts its processes itself
warnings.filterwarnings("ignore", message="The `srun` command is available on your system but is not used")

# it tells of every process that joins
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)


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
        return Fabric(accelerator="cuda", devices=devices, strategy=strategy, plugins=_precision(precision, "cuda"))
    with_processes = f" with {num_gpus} processes" if num_gpus > 1 else ""
    log.info("No GPU was found: running on the CPU%s.", with_processes)
    if precision == "fp16":
        log.warning("%s.precision=fp16 needs a GPU: using fp32.", section)
        precision = "fp32"
    return Fabric(accelerator="cpu", devices=num_gpus, strategy=strategy, plugins=_precision(precision, "cpu"))


def describe_device(fabric: Fabric) -> str:
    """For the recipe: ``1 x NVIDIA H100, bf16``, ``CPU, 2 threads, fp32``."""
    precision = _PRECISION_NAMES[fabric.strategy.precision.precision]
    if fabric.device.type == "cuda":
        return f"{fabric.world_size} x {torch.cuda.get_device_name(fabric.device)}, {precision}"
    processes = f"{fabric.world_size} processes of " if fabric.world_size > 1 else ""
    return f"CPU, {processes}{torch.get_num_threads()} threads, {precision}"


def launch(fabric: Fabric, work: Callable[..., T], *arguments: Any) -> T:
    """Call ``work(fabric, *arguments)`` in every process of ``fabric``; returns what rank 0 gave.

    Raises:
        OpenMAEError: the one that a process raised.
        RunError: a process failed in another way; the text is its own.
        KeyboardInterrupt: Ctrl-C; every process has stopped as ``work`` lets it.
    """
    if not isinstance(fabric.strategy, DDPStrategy):
        return work(fabric, *arguments)
    call = partial(_work_in_process, work=work, arguments=arguments, level=log.getEffectiveLevel())
    with InterruptRelay() as relay:
        try:
            interrupted, result = fabric.launch(call)
        except ProcessException as error:
            if relay.reason:
                raise relay.reason from None
            raise _reason(error) from None
    if interrupted:
        raise relay.reason or KeyboardInterrupt
    return result


def _work_in_process(
    fabric: Fabric, work: Callable[..., T], arguments: tuple[Any, ...], level: int
) -> tuple[bool, T | None]:
    """One spawned process; returns whether it was interrupted, and its result.

    Bound by ``partial``, as Fabric copies the arguments it is given, and cannot copy a frozen dataclass.
    """
    join_relay()
    # of a depthwise kernel: strides that differ along a side of one element are the same memory
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with notices_on_stderr(level if fabric.is_global_zero else logging.ERROR):
        try:
            return False, work(fabric, *arguments)
        except KeyboardInterrupt:
            return True, None
        except OpenMAEError as error:
            raise _CarriedError(pickle.dumps(error).hex()) from error


class _CarriedError(Exception):
    """Carries an error out of a spawned process, of which only a text comes back."""


_CARRIED = re.compile(r"_CarriedError: ([0-9a-f]+)")


def _reason(error: ProcessException) -> OpenMAEError:
    """The error of this package that ended a process, or a RunError that tells what else did."""
    if found := _CARRIED.search(error.msg):
        return pickle.loads(bytes.fromhex(found[1]))
    if isinstance(error, ProcessExitedException):
        return RunError(
            f"Process {error.error_index} was ended from outside ({error.signal_name or error.exit_code}).",
            "If memory ran out, lower dataset.batch_size or use fewer processes.",
        )
    return RunError(f"Process {error.error_index} failed:\n{error.msg.strip()}")


class _Autocast(MixedPrecision):
    """Autocast alone. Fabric would round a model's inputs as well, and pretraining's targets are made of them."""

    def convert_input(self, data: Any) -> Any:
        """Inputs stay in float32."""
        return data

    def unscale_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Before clipping; Fabric refuses this for fused AdamW, whose step minds what the scaler has done."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)


def _precision(name: str, device: Literal["cpu", "cuda"]) -> Precision:
    if name == "fp32":
        return Precision()
    return _Autocast("16-mixed" if name == "fp16" else "bf16-mixed", device)


def _gpus(section: str, num_gpus: int, gpu_ids: Sequence[int]) -> list[int]:
    present = torch.cuda.device_count()
    wanted = list(gpu_ids) if len(gpu_ids) == num_gpus else list(range(num_gpus))
    if missing := [gpu for gpu in wanted if gpu >= present]:
        raise SpecError(
            f"{section}.gpu_ids: this machine has {present} GPU(s), 0 to {present - 1}; there is no GPU {missing[0]}.",
            f"Set {section}.num_gpus={min(present, num_gpus)} and {section}.gpu_ids to GPUs that exist.",
        )
    return wanted
