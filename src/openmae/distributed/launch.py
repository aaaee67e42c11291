"""The machine a run gets: device, processes and precision, through Lightning Fabric."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from multiprocessing.queues import SimpleQueue
from typing import Any, Literal, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.strategies.parallel import ParallelStrategy
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from openmae.distributed.allocator import kept_memory
from openmae.distributed.collectives import gather_objects
from openmae.distributed.rendezvous import CarriedError, ReplicatedStrategy, ShardedStrategy, WorldEnvironment
from openmae.distributed.signals import InterruptRelay, join_relay
from openmae.distributed.topology import World, find_world
from openmae.distributed.watchdog import pulse_of
from openmae.errors import DataError, OpenMAEError, RunError, SpecError
from openmae.main_guard import watch_for_reruns
from openmae.results.console import notices_on_stderr

T = TypeVar("T")

log = logging.getLogger("openmae")

_PRECISION_NAMES = {"32-true": "fp32", "16-mixed": "fp16", "bf16-mixed": "bf16"}

# it tells of every process that joins
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)


def build_fabric(
    section: str,
    num_gpus: int,
    gpu_ids: Sequence[int],
    num_nodes: int,
    precision: str = "fp32",
    strategy: Literal["ddp", "fsdp"] = "ddp",
) -> Fabric:
    """A Fabric that is not launched yet.

    Without a GPU it trains on the CPU, with a notice; several devices are then so many processes over gloo. One Python
    process a node starts the others, unless torchrun or SLURM has started all.

    Args:
        section: of the spec, for messages: ``train``, ``evaluate`` or ``inference``.
        num_gpus: devices of a node to use.
        gpu_ids: which of them; used where there are ``num_gpus`` of them.
        num_nodes: machines; what joins them is in variables, see ``find_world``.
        precision: fp32, fp16 or bf16. fsdp is fp16, on a CPU fp32.
        strategy: ddp (each process has the whole model) or fsdp (they share out its weights).

    Raises:
        SpecError: more GPUs than there are, variables that do not fit the numbers, or a notebook that would have to
            start processes.
    """
    world = find_world(section, num_gpus, num_nodes)
    sharded, on_gpu = strategy == "fsdp", torch.cuda.is_available()
    precision = _possible_precision(section, precision, sharded, on_gpu)
    processes: Any = "auto"
    if sharded or world.size > 1:
        _check_not_interactive(section, world)
        processes = ShardedStrategy(world) if sharded else ReplicatedStrategy()
    if not on_gpu:
        total = f" with {world.size} processes" if world.size > 1 else ""
        nodes = f" on {world.nodes} nodes" if world.nodes > 1 else ""
        log.info("No GPU was found: running on the CPU%s%s.", total, nodes)
    return Fabric(
        accelerator="cuda" if on_gpu else "cpu",
        devices=_gpus(section, num_gpus, gpu_ids, world) if on_gpu else num_gpus,
        num_nodes=world.nodes,
        strategy=processes,
        plugins=[_precision(precision, "cuda" if on_gpu else "cpu"), WorldEnvironment(world)],
    )


def acting_precision(precision: str, sharded: bool, on_gpu: bool) -> str:
    """The precision that acts: fsdp is fp16, and without a GPU fp16 is fp32."""
    wanted = "fp16" if sharded else precision
    return "fp32" if wanted == "fp16" and not on_gpu else wanted


def _possible_precision(section: str, precision: str, sharded: bool, on_gpu: bool) -> str:
    possible = acting_precision(precision, sharded, on_gpu)
    if sharded and precision != "fp16" and on_gpu:
        log.warning(
            "%s.distributed_strategy=fsdp uses fp16: %s.precision=%s does not act.", section, section, precision
        )
    if not on_gpu and sharded:
        log.warning("%s.distributed_strategy=fsdp uses fp16, which needs a GPU: using fp32.", section)
    elif possible != precision and not on_gpu:
        log.warning("%s.precision=fp16 needs a GPU: using fp32.", section)
    return possible


def _check_not_interactive(section: str, world: World) -> None:
    """Lightning refuses this too, but names strategies that no key can choose."""
    if world.local_rank is None and (hasattr(sys, "ps1") or sys.flags.interactive):
        key = "num_gpus" if world.per_node > 1 else "distributed_strategy"
        value = "1" if world.per_node > 1 else "ddp"
        raise SpecError(
            f"{section}.{key}: several processes cannot be started from a notebook or an interactive session.",
            f"Set {section}.{key}={value}, or put the options into a file and run `mae {section} -e spec.yaml` in a "
            f"terminal (`!mae {section} -e spec.yaml` in a notebook).",
        )


def world_of(fabric: Fabric) -> World:
    """Who runs with whom."""
    environment = getattr(fabric.strategy, "cluster_environment", None)
    return environment.world if isinstance(environment, WorldEnvironment) else World()


def check_agreement(fabric: Fabric, facts: Callable[[], Mapping[str, str]]) -> None:
    """Refuse a run whose processes opened different things, each on its own machine.

    Args:
        facts: gives what this process sees, by what it is, short enough to be shown.

    Raises:
        DataError: in every process, and naming the first node that sees something else.
    """
    world = world_of(fabric)
    if world.opened_once:
        return
    seen = list(gather_objects(fabric, facts()))
    for rank, theirs in enumerate(seen):
        for name, value in theirs.items():
            if value != (first := seen[0][name]):
                raise DataError(
                    f"Node {rank // world.per_node} sees another {name} than node 0: {value} instead of {first}.",
                    "Put data, checkpoints and results where all nodes see the same files, or give each the same copy.",
                )


def describe_device(fabric: Fabric) -> str:
    """For the recipe: ``1 x NVIDIA H100, bf16``, ``CPU, 2 threads, fp32``."""
    precision = _PRECISION_NAMES[fabric.strategy.precision.precision]
    nodes, size = world_of(fabric).nodes, fabric.world_size
    on_nodes = f" on {nodes} nodes" if nodes > 1 else ""
    shared = ", weights shared out (fsdp)" if isinstance(fabric.strategy, ShardedStrategy) else ""
    if fabric.device.type == "cuda":
        return f"{size} x {torch.cuda.get_device_name(fabric.device)}{on_nodes}, {precision}{shared}"
    processes = f"{size} processes{on_nodes} of " if size > 1 else ""
    return f"CPU, {processes}{torch.get_num_threads()} threads, {precision}{shared}"


def launch(fabric: Fabric, work: Callable[..., T], *arguments: Any) -> T:
    """Call ``work(fabric, *arguments)`` in every process of ``fabric`` on this node; returns what its first one gave.

    Raises:
        OpenMAEError: the one that a process raised.
        RunError: a process failed in another way; the text is its own.
        KeyboardInterrupt: Ctrl-C; every process has stopped as ``work`` lets it.
    """
    if not isinstance(fabric.strategy, ParallelStrategy):
        return _here(fabric, work, arguments)
    if world_of(fabric).local_rank is not None:
        return fabric.launch(partial(_work_beside_others, work=work, arguments=arguments))
    channel = multiprocessing.get_context("spawn").SimpleQueue()
    level = log.getEffectiveLevel()
    call = partial(_work_in_process, work=work, arguments=arguments, level=level, channel=channel)
    with watch_for_reruns(f"num_gpus={world_of(fabric).per_node}"), InterruptRelay() as relay:
        try:
            interrupted, result = fabric.launch(call)
        except ProcessException as error:
            if relay.reason:
                raise relay.reason from None
            if not channel.empty():
                raise RunError(*channel.get()) from None
            raise _reason(error, world_of(fabric)) from None
    if interrupted:
        raise relay.reason or interrupted  # another node's processes may have been told alone
    return result


def _work_in_process(
    fabric: Fabric,
    work: Callable[..., T],
    arguments: tuple[Any, ...],
    level: int,
    channel: SimpleQueue[tuple[str, str]],
) -> tuple[type[KeyboardInterrupt] | None, T | None]:
    """One spawned process; returns what interrupted it, and its result.

    Bound by ``partial``, as Fabric copies the arguments it is given, and cannot copy a frozen dataclass.
    """
    join_relay()
    pulse_of(fabric).channel = channel
    with notices_on_stderr(level if fabric.is_global_zero else logging.ERROR):
        try:
            return None, _together(fabric, work, arguments)
        except KeyboardInterrupt as stop:
            return type(stop), None
        except OpenMAEError as error:
            raise CarriedError.of(error) from error


def _work_beside_others(fabric: Fabric, work: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    """This process, which a launcher started as one of several."""
    try:
        return _together(fabric, work, arguments)
    except RuntimeError as error:
        if isinstance(error, OpenMAEError) or not _LOST.search(str(error)):
            raise
        raise _lost_peers(str(error)) from error


def _here(fabric: Fabric, work: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    with kept_memory() if fabric.device.type == "cpu" else nullcontext():
        return work(fabric, *arguments)


def _together(fabric: Fabric, work: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    """The work, which is done when all processes have done it: none reports a success that another spoils."""
    # of a depthwise kernel: strides that differ along a side of one element are the same memory
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # a loss that is a view; nothing is added to it in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    pulse = pulse_of(fabric)
    try:
        result = _here(fabric, work, arguments)
        pulse.passes()
        fabric.barrier()
    except RuntimeError as error:
        if reason := pulse.reason(wait=bool(_LOST.search(str(error)))):
            raise reason from error
        raise
    finally:
        pulse.end()
    torch.distributed.destroy_process_group()
    return result


_CARRIED = re.compile(rf"{CarriedError.__name__}: ([0-9a-f]+)")

# what gloo, NCCL and the store say when the other end is gone
_LOST = re.compile(
    "Connection closed by peer|Connection reset|Connection refused|Broken pipe|Timed out waiting|Socket Timeout|"
    "Application timeout|failed to recv|remote process exited|ncclRemoteError|wait timeout|Read error",
    re.IGNORECASE,
)


def _lost_peers(text: str) -> RunError:
    return RunError(
        f"Another process of this run has ended or answers no more ({text.strip().splitlines()[-1][:300]}).",
        "Its own output says why; the same command on every node goes on from the newest checkpoint.",
    )


def _reason(error: ProcessException, world: World) -> OpenMAEError:
    """The error of this package that ended a process, or a RunError that tells what else did."""
    if found := _CARRIED.search(error.msg):
        return pickle.loads(bytes.fromhex(found[1]))
    where = f" of node {world.node_rank}" if world.nodes > 1 else ""
    if isinstance(error, ProcessExitedException):
        if error.signal_name is None:
            return RunError(
                f"Process {error.error_index}{where} ended with exit code {error.exit_code} before it began to work.",
                "Its output above says why. Every process imports the main script: if the error is in a line of it, "
                'put that line below `if __name__ == "__main__":`.',
            )
        return RunError(
            f"Process {error.error_index}{where} was ended from outside ({error.signal_name}).",
            "If memory ran out, lower dataset.batch_size or use fewer processes.",
        )
    if world.nodes > 1 and _LOST.search(error.msg):
        return _lost_peers(error.msg)
    return RunError(f"Process {error.error_index}{where} failed:\n{error.msg.strip()}")


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


def _gpus(section: str, num_gpus: int, gpu_ids: Sequence[int], world: World) -> list[int]:
    present = torch.cuda.device_count()
    wanted = list(gpu_ids) if len(gpu_ids) == num_gpus else list(range(num_gpus))
    if missing := [gpu for gpu in wanted if gpu >= present]:
        bound = " If SLURM gives each task a GPU of its own, let all tasks of a node see all (--gpus-per-node)."
        raise SpecError(
            f"{section}.gpu_ids: this machine has {present} GPU(s), 0 to {present - 1}; there is no GPU {missing[0]}.",
            f"Set {section}.num_gpus={min(present, num_gpus)} and {section}.gpu_ids to GPUs that exist."
            + (bound if world.launcher == "SLURM" else ""),
        )
    return wanted
