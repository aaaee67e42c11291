"""Connect the processes of a run, and report the ones that do not join in time."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.strategies.parallel import ParallelStrategy
from torch import nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from openmae._version import __version__
from openmae.distributed.topology import World
from openmae.distributed.watchdog import Watchdog, answer_seconds, seconds_of
from openmae.errors import RunError, SpecError
from openmae.storage.printable import counted

JOIN_VARIABLE = "OPENMAE_JOIN_SECONDS"
_JOIN_SECONDS = 600.0
_CLIENT_TIMEOUT = timedelta(seconds=30)
_MARGIN = 60.0  # seconds by which the process group's timeout is longer than the watchdog's, whose message is better
_INTERFACE = "GLOO_SOCKET_IFNAME"


class WorldEnvironment(LightningEnvironment):
    """A cluster environment for Fabric that reads a ``World`` instead of environment variables."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    @property
    def creates_processes_externally(self) -> bool:
        """True if this process is one of the workers, and need not start them."""
        return self.world.local_rank is not None

    @property
    def main_address(self) -> str:
        """Address of node 0."""
        return self.world.address

    @property
    def main_port(self) -> int:
        """Port of node 0."""
        return self.world.port

    def local_rank(self) -> int:
        """Return the rank on this node."""
        return self.world.local_rank or 0

    def node_rank(self) -> int:
        """Return the number of this node."""
        return self.world.node_rank


class _JoiningStrategy(ParallelStrategy):
    """A strategy that joins the other processes within a time limit, and then starts the watchdog."""

    watchdog: Watchdog

    def setup_environment(self) -> None:
        """Join the other processes, and start the watchdog."""
        environment = self.cluster_environment
        assert isinstance(environment, WorldEnvironment)
        world = environment.world
        if self.root_device.type == "cpu":
            _choose_interface(world)
        if world.launcher != "torchrun":  # torchrun has its own rendezvous
            join(world, self.root_device)
        super().setup_environment()
        self.watchdog = Watchdog(world)
        address = "127.0.0.1" if world.rank == 0 and world.launcher != "torchrun" else world.address
        self.watchdog.start(lambda: TCPStore(address, world.port, is_master=False, timeout=_CLIENT_TIMEOUT))


class ReplicatedStrategy(_JoiningStrategy, DDPStrategy):
    """DDP: every process has the complete model. All trained weights get gradients, as DDP requires by default."""

    def __init__(self) -> None:
        super().__init__(timeout=_group_timeout())


class ShardedStrategy(_JoiningStrategy, ModelParallelStrategy):
    """FSDP: the weights are sharded, by ``fsdp.shard`` before the model is passed to Fabric."""

    def __init__(self, world: World) -> None:
        super().__init__(_unchanged, data_parallel_size=world.size, tensor_parallel_size=1, timeout=_group_timeout())


def _unchanged(model: nn.Module, mesh: Any) -> nn.Module:
    return model


def world_of(fabric: Fabric) -> World:
    """Return the process topology of a run."""
    environment = getattr(fabric.strategy, "cluster_environment", None)
    return environment.world if isinstance(environment, WorldEnvironment) else World()


def watchdog_of(fabric: Fabric) -> Watchdog:
    """Return the watchdog of this process, or an idle one if it is the only process."""
    return getattr(fabric.strategy, "watchdog", None) or Watchdog()


def join(world: World, device: torch.device) -> None:
    """Wait until all processes have joined the store of node 0, and initialize the process group.

    Raises:
        RunError: some processes did not join in time (the message names them), or node 0 has ended.
        SpecError: node 0 runs with a different number of processes or a different version.
    """
    limit = seconds_of(JOIN_VARIABLE, _JOIN_SECONDS)
    deadline = time.monotonic() + limit
    store = _open_store(world, deadline, limit)
    shape = f"{_size(world)}, openmae {__version__}"
    if world.rank == 0:
        store.set("shape", shape)
    keys = [f"joined/{rank}" for rank in range(world.size)]
    store.set(keys[world.rank], "")
    try:
        while True:
            complete = store.check(["shape", *keys])
            if store.check(["shape"]) and (other := store.get("shape").decode()) != shape:
                raise SpecError(
                    f"Node 0 runs with {other}, but node {world.node_rank} with {shape}.",
                    "Start the same command with the same spec and version on every node.",
                )
            if complete:
                break
            if time.monotonic() > deadline:
                missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
                raise _did_not_join(world, missing, limit)
            time.sleep(0.05)  # a single long wait in C++ could not be interrupted by signals
    except torch.distributed.DistError:
        raise RunError(
            "Node 0 has ended while the processes were waiting for each other.", "See the output of node 0."
        ) from None
    on_gpu = device.type == "cuda"
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore("openmae", store),
        rank=world.rank,
        world_size=world.size,
        timeout=_group_timeout(),
        device_id=device if on_gpu else None,
    )


def _group_timeout() -> timedelta:
    return timedelta(seconds=answer_seconds() + _MARGIN)


def _open_store(world: World, deadline: float, limit: float) -> TCPStore:
    if world.rank == 0:
        try:
            return TCPStore("127.0.0.1", world.port, is_master=True, wait_for_workers=False, timeout=_CLIENT_TIMEOUT)
        except torch.distributed.DistNetworkError as error:
            raise RunError(
                f"MASTER_PORT: node 0 cannot listen on port {world.port} ({_first_line(error)}).",
                "Set another MASTER_PORT, the same on every node.",
            ) from None
    while True:
        try:
            socket.create_connection((world.address, world.port), timeout=2).close()
            return TCPStore(world.address, world.port, is_master=False, timeout=_CLIENT_TIMEOUT)
        except (OSError, torch.distributed.DistNetworkError) as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"Node 0 did not answer at {world.address}:{world.port} within {limit:g} s ({_first_line(error)}).",
                    "Check that it runs, that MASTER_ADDR and MASTER_PORT are right, and that no firewall blocks the "
                    f"port. Set {JOIN_VARIABLE} to wait longer.",
                ) from None
        time.sleep(0.2)


def _size(world: World) -> str:
    return f"{counted(world.nodes, 'node')} of {counted(world.per_node, 'process')}"


def _did_not_join(world: World, ranks: list[int], limit: float) -> RunError:
    nodes = sorted({rank // world.per_node for rank in ranks})
    complete_nodes = len(ranks) == len(nodes) * world.per_node
    names = f"node {', '.join(map(str, nodes))}" if complete_nodes else f"process {', '.join(map(str, ranks))}"
    return RunError(
        f"Waited {limit:g} s for {_size(world)}: {names} did not join.",
        f"Start the same command there (its own NODE_RANK, the same MASTER_ADDR={world.address} and "
        f"MASTER_PORT={world.port}), and check that no firewall blocks the port. Set {JOIN_VARIABLE} to wait longer.",
    )


def _choose_interface(world: World) -> None:
    """Make gloo use the interface that leads to node 0; by default it often chooses the loopback."""
    if world.nodes == 1 or os.environ.get(_INTERFACE):
        return
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((world.address, world.port))
        own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == own for address in addresses):
                os.environ[_INTERFACE] = name


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__
