"""Choose device and precision of a run, and launch its processes with Lightning Fabric."""

from __future__ import annotations

import logging
import pickle
import re
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.strategies.parallel import ParallelStrategy
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException, spawn

from openmae.distributed.allocator import kept_memory
from openmae.distributed.collectives import gather_objects
from openmae.distributed.rendezvous import ReplicatedStrategy, ShardedStrategy, WorldEnvironment, watchdog_of, world_of
from openmae.distributed.signals import InterruptRelay, join_relay
from openmae.distributed.topology import World, find_world
from openmae.errors import DataError, OpenMAEError, RunError, SpecError
from openmae.main_guard import watch_for_reruns
from openmae.results.console import notices_on_stderr
from openmae.storage.atomic import replacing
from openmae.storage.printable import counted

T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of products, by precision
_PRECISION_NAMES = {"32-true": "fp32", "16-mixed": "fp16", "bf16-mixed": "bf16"}
_GRACE_SECONDS = 5.0  # for the other processes to end after one has failed

# messages of gloo, NCCL and the store when the other end of a connection is gone
_LOST_CONNECTION = re.compile(
    "Connection closed by peer|Connection reset|Connection refused|Broken pipe|Timed out waiting|Socket Timeout|"
    "Application timeout|failed to recv|remote process exited|ncclRemoteError|wait timeout|Read error",
    re.IGNORECASE,
)
_LOST_PEER = "Another process of this run has ended or stopped responding"

log = logging.getLogger("openmae")
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # at INFO it logs every process that joins


def build_fabric(
    section: str,
    num_gpus: int,
    gpu_ids: Sequence[int],
    num_nodes: int,
    precision: str = "fp32",
    strategy: Literal["ddp", "fsdp"] = "ddp",
) -> Fabric:
    """Return a Fabric that is not launched yet.

    Without a GPU, a notice is logged and ``num_gpus`` processes per node run on the CPU, connected by gloo.

    Args:
        section: section of the spec, for messages: ``train``, ``evaluate`` or ``inference``.
        num_gpus: processes per node, one for each GPU.
        gpu_ids: the GPUs to use; ignored unless there are ``num_gpus`` of them.
        num_nodes: number of machines; environment variables define how they connect, see ``find_world``.
        precision: fp32, fp16 or bf16; fsdp uses fp16 instead of fp32, and a CPU fp32 instead of fp16.
        strategy: ddp (every process has the complete model) or fsdp (weights are sharded over the processes).

    Raises:
        SpecError: there are too few GPUs, the environment variables contradict the numbers, or processes would have to
            be started from a notebook.
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
    """Return the precision that is really used: fsdp uses fp16 unless it is bf16, and fp16 becomes fp32 on a CPU."""
    wanted = "fp16" if sharded and precision != "bf16" else precision
    return "fp32" if wanted == "fp16" and not on_gpu else wanted


def _possible_precision(section: str, precision: str, sharded: bool, on_gpu: bool) -> str:
    possible = acting_precision(precision, sharded, on_gpu)
    if sharded and precision != "bf16" and not on_gpu:
        log.warning("%s.distributed_strategy=fsdp uses fp16, which needs a GPU: using fp32.", section)
    elif sharded and precision == "fp32":
        log.warning("%s.distributed_strategy=fsdp uses fp16 or bf16: using fp16 instead of fp32.", section)
    elif possible != precision:
        log.warning("%s.precision=fp16 needs a GPU: using fp32.", section)
    return possible


def _check_not_interactive(section: str, world: World) -> None:
    """Raise a clear error: Lightning's names strategies that no config key can select."""
    if world.local_rank is None and (hasattr(sys, "ps1") or sys.flags.interactive):
        key, value = ("num_gpus", "1") if world.per_node > 1 else ("distributed_strategy", "ddp")
        raise SpecError(
            f"{section}.{key}: several processes cannot be started from a notebook or an interactive session.",
            f"Set {section}.{key}={value}, or put the options into a file and run `mae {section} -e spec.yaml` in a "
            f"terminal (`!mae {section} -e spec.yaml` in a notebook).",
        )


def check_agreement(fabric: Fabric, facts: Callable[[], Mapping[str, str]]) -> None:
    """Check that the processes, on different machines, have opened the same inputs, as described by ``facts``.

    Raises:
        DataError: in every process; it names the first node that differs from node 0.
    """
    world = world_of(fabric)
    if world.opened_once:
        return
    seen = gather_objects(fabric, facts())
    for rank, other in enumerate(seen):
        for name, value in other.items():
            if value != (first := seen[0][name]):
                raise DataError(
                    f"Node {rank // world.per_node} sees another {name} than node 0: {value} instead of {first}.",
                    "Put data, checkpoints and results where all nodes see the same files, or give each the same copy.",
                )


def describe_device(fabric: Fabric) -> str:
    """Return a description such as ``1 x NVIDIA H100, bf16`` or ``CPU, 2 threads, fp32``."""
    precision = _PRECISION_NAMES[fabric.strategy.precision.precision]
    nodes, size = world_of(fabric).nodes, fabric.world_size
    on_nodes = f" on {nodes} nodes" if nodes > 1 else ""
    sharded = ", sharded weights (fsdp)" if isinstance(fabric.strategy, ShardedStrategy) else ""
    if fabric.device.type == "cuda":
        return f"{size} x {torch.cuda.get_device_name(fabric.device)}{on_nodes}, {precision}{sharded}"
    processes = f"{size} processes{on_nodes} of " if size > 1 else ""
    return f"CPU, {processes}{counted(torch.get_num_threads(), 'thread')}, {precision}{sharded}"


def launch(fabric: Fabric, work: Callable[..., T], *arguments: Any) -> T:
    """Call ``work(fabric, *arguments)`` in every process of this node; return the result of the first one.

    The processes are started here, unless torchrun or SLURM has started them; then ``work`` and its arguments must be
    picklable.

    Raises:
        OpenMAEError: raised in one of the processes.
        RunError: a process failed in another way; the message has its traceback.
        KeyboardInterrupt: Ctrl-C; every process has stopped.
    """
    if not isinstance(fabric.strategy, ParallelStrategy):
        with kept_memory(fabric.device):
            return work(fabric, *arguments)
    if world_of(fabric).local_rank is not None:
        return fabric.launch(lambda fabric: _run_with_peers(fabric, work, arguments))
    return _spawn(fabric, work, arguments)


def _run_with_peers(
    fabric: Fabric,
    work: Callable[..., T],
    arguments: Sequence[Any],
    report: Callable[[RunError], None] | None = None,
) -> T:
    """Call ``work`` in one of several processes; return when all processes have finished theirs."""
    # harmless: the strides of depthwise kernels differ only along a dimension of size 1
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # harmless: the loss is a view, but is not modified in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    watchdog = watchdog_of(fabric)
    watchdog.report = report or watchdog.report
    try:
        with kept_memory(fabric.device):
            result = work(fabric, *arguments)
        watchdog.arrive()
        fabric.barrier()
    except RuntimeError as error:
        text = str(error).strip()
        if not _LOST_CONNECTION.search(text):
            raise
        raise RunError(
            f"{_LOST_PEER} ({text.splitlines()[-1][:300]}).",
            "See the output of that process; the same command on every node resumes from the newest checkpoint.",
        ) from error
    finally:
        watchdog.end()
    torch.distributed.destroy_process_group()
    return result


def _spawn(fabric: Fabric, work: Callable[..., T], arguments: Sequence[Any]) -> T:
    """Start the processes of this node and wait for them. Each pickles its result or error to a file."""
    world = world_of(fabric)
    world = replace(world, port=world.port or _free_port())
    with (
        watch_for_reruns(f"num_gpus={world.per_node}"),
        InterruptRelay() as relay,
        tempfile.TemporaryDirectory(prefix="openmae-") as folder,
    ):
        outcomes = [Path(folder, str(rank)) for rank in range(world.per_node)]
        common = (fabric, world, work, arguments, log.getEffectiveLevel(), outcomes)
        processes = spawn(_run_spawned, common, world.per_node, join=False)
        try:
            while not processes.join(grace_period=_GRACE_SECONDS):
                pass
        except ProcessException as error:
            if relay.reason:
                raise relay.reason from None
            raise _failure(error, [_read(path) for path in outcomes], world) from None
        result = _read(outcomes[0])
    if isinstance(result, KeyboardInterrupt):
        raise relay.reason or result  # without a reason, another node was interrupted
    if result is None and relay.reason:  # interrupted before it could write a result
        raise relay.reason
    return result


def _run_spawned(
    local_rank: int,
    fabric: Fabric,
    world: World,
    work: Callable[..., Any],
    arguments: Sequence[Any],
    level: int,
    outcomes: Sequence[Path],
) -> None:
    join_relay()
    assert isinstance(fabric.strategy, ParallelStrategy)
    environment, outcome = fabric.strategy.cluster_environment, outcomes[local_rank]
    assert isinstance(environment, WorldEnvironment)
    environment.world = replace(world, local_rank=local_rank)

    report = partial(_write, outcome)
    result: Any
    with notices_on_stderr(level if environment.world.leads else logging.ERROR):
        try:
            result = fabric.launch(lambda fabric: _run_with_peers(fabric, work, arguments, report))
        except (KeyboardInterrupt, OpenMAEError) as error:
            result = error
        except Exception:
            where = f" of node {world.node_rank}" if world.nodes > 1 else ""
            result = RunError(f"Process {local_rank}{where} failed:\n{traceback.format_exc().strip()}")
    _write(outcome, result)
    if isinstance(result, OpenMAEError):
        sys.exit(result.exit_code)


def _write(path: Path, outcome: Any) -> None:
    with replacing(path) as temporary:  # the process may be killed
        temporary.write_bytes(pickle.dumps(outcome))


def _read(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _failure(error: ProcessException, outcomes: Sequence[Any], world: World) -> OpenMAEError:
    """Return the error that caused the failure, not one of another process that lost its connection as a result."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, OpenMAEError)]
    if causes := [found for found in errors if not found.problem.startswith(_LOST_PEER)]:
        return causes[0]
    where = f"Process {error.error_index}" + (f" of node {world.node_rank}" if world.nodes > 1 else "")
    if isinstance(error, ProcessExitedException) and error.signal_name:
        return RunError(
            f"{where} was killed ({error.signal_name}).",
            "If memory ran out, lower dataset.batch_size or use fewer processes.",
        )
    if errors:
        return errors[0]
    if isinstance(error, ProcessExitedException):
        return RunError(
            f"{where} ended with exit code {error.exit_code} before it began to work.",
            "Its output above says why. Every process imports the main script: if the error is in a line of it, "
            'put that line below `if __name__ == "__main__":`.',
        )
    return RunError(f"{where} failed:\n{error.msg.strip()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Autocast(MixedPrecision):
    """Mixed precision that does not convert the inputs, because pretraining computes its targets from them."""

    def convert_input(self, data: Any) -> Any:
        """Keep inputs in float32."""
        return data

    def unscale_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Unscale before clipping. Fabric refuses this for fused AdamW, although AdamW supports it."""
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
        bound = " If SLURM gives each task only one GPU, let all tasks of a node see all (--gpus-per-node)."
        raise SpecError(
            f"{section}.gpu_ids: this machine has {counted(present, 'GPU')}, counted from 0, got {missing[0]}.",
            f"Set {section}.num_gpus={min(present, num_gpus)} and {section}.gpu_ids to GPUs that exist."
            + (bound if world.launcher == "SLURM" else ""),
        )
    return wanted
