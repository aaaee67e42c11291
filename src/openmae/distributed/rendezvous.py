"""Bringing the processes of a run together: who is who, how they meet, and who is missing when they do not."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.launchers.multiprocessing import _GlobalStateSnapshot, _MultiProcessingLauncher
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.strategies.parallel import ParallelStrategy
from torch import nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes

from openmae._version import __version__
from openmae.distributed.topology import World
from openmae.distributed.watchdog import Pulse, answer_seconds, seconds_of
from openmae.errors import OpenMAEError, RunError, SpecError

PATIENCE_VARIABLE = "OPENMAE_JOIN_SECONDS"
_PATIENCE = 600.0
_MARGIN = 60.0  # NCCL aborts a process by its own timeout, and says nothing of who is late
_GRACE = 5.0  # for the processes of a run in which one has failed
_RAISED_WITHIN = 10.0
_INTERFACE = "GLOO_SOCKET_IFNAME"
_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR


class CarriedError(Exception):
    """Carries an error out of a spawned process, of which only a text comes back."""

    @classmethod
    def of(cls, error: OpenMAEError) -> CarriedError:
        """The error as a text."""
        return cls(pickle.dumps(error).hex())


class WorldEnvironment(ClusterEnvironment):
    """What Fabric asks about the processes, answered from a ``World``; nothing is read from other variables."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self._port = world.port

    @property
    def creates_processes_externally(self) -> bool:
        """Whether this process was started as one of several."""
        return self.world.local_rank is not None

    @property
    def main_address(self) -> str:
        """Of node 0."""
        return self.world.address

    @property
    def main_port(self) -> int:
        """Of node 0; where it is free to choose, chosen before the other processes are started."""
        if not self._port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._port = int(probe.getsockname()[1])
        return self._port

    @staticmethod
    def detect() -> bool:
        """It is always given, never found."""
        return False

    def world_size(self) -> int:
        """Processes of the run."""
        return self.world.size

    def set_world_size(self, size: int) -> None:
        """It is known."""

    def global_rank(self) -> int:
        """Node by node."""
        return self.world.node_rank * self.world.per_node + self.local_rank()

    def set_global_rank(self, rank: int) -> None:
        """It is known."""

    def local_rank(self) -> int:
        """A spawned process is told by Fabric's launcher."""
        own = self.world.local_rank
        return int(os.environ.get("LOCAL_RANK", "0")) if own is None else own

    def node_rank(self) -> int:
        """Number of this machine."""
        return self.world.node_rank


class _Launcher(_MultiProcessingLauncher):
    """Spawns the processes of this node. When one has failed, the others get seconds to end: one may be stopped."""

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What process 0 of this node returned."""
        environment = self._strategy.cluster_environment
        assert isinstance(environment, WorldEnvironment)
        os.environ["MASTER_PORT"] = str(environment.main_port)  # chosen before the processes are started
        returned = multiprocessing.get_context("spawn").SimpleQueue()
        started = start_processes(
            self._wrapping_function,
            args=(function, args, kwargs, returned, _GlobalStateSnapshot.capture()),
            nprocs=environment.world.per_node,
            join=False,
            start_method="spawn",
        )
        while not started.join(grace_period=_GRACE):
            pass
        return returned.get()


class _Joining(ParallelStrategy):
    """A strategy whose processes wait for one another for so long only, and can say who is missing."""

    pulse: Pulse | None = None

    def setup_environment(self) -> None:
        environment = self.cluster_environment
        assert isinstance(environment, WorldEnvironment)
        try:
            if environment.world.launcher != "torchrun":  # whose agents have brought the processes together
                join(environment, self.root_device)
            elif self.root_device.type == "cpu":
                _choose_interface(environment.world)
        except OpenMAEError as error:
            if environment.creates_processes_externally:
                raise
            raise CarriedError.of(error) from error
        super().setup_environment()
        world = environment.world
        self.pulse = Pulse(world.node_rank, environment.global_rank(), world.size)
        holds_store = world.launcher != "torchrun" and environment.global_rank() == 0
        address = "127.0.0.1" if holds_store else world.address
        # an exception reaches a main thread that gloo's timeout lets go; on a GPU it waits for the device for ever
        self.pulse.begin(
            lambda: TCPStore(address, environment.main_port, is_master=False, timeout=timedelta(seconds=30)),
            grace=_RAISED_WITHIN if self.root_device.type == "cpu" else 0.0,
        )


class ReplicatedStrategy(_Joining, DDPStrategy):
    """Every process has the whole model. No model here leaves a trained weight without a gradient (tests prove it)."""

    def __init__(self) -> None:
        super().__init__(start_method="spawn", timeout=_timeout())

    def _configure_launcher(self) -> None:
        environment = self.cluster_environment
        if environment and environment.creates_processes_externally:
            self._start_method = "popen"
            super()._configure_launcher()
        else:
            self._launcher = _Launcher(self, "spawn")


class ShardedStrategy(_Joining, ModelParallelStrategy):
    """The processes share out the weights; ``training.sharding`` does so before Fabric sees the model."""

    def __init__(self, world: World) -> None:
        super().__init__(_as_it_is, data_parallel_size=world.size, tensor_parallel_size=1, timeout=_timeout())

    def _configure_launcher(self) -> None:
        environment = self.cluster_environment
        if environment and not environment.creates_processes_externally:
            self._launcher = _Launcher(self, "spawn")


def _as_it_is(model: nn.Module, mesh: Any) -> nn.Module:
    return model


def join(environment: WorldEnvironment, device: torch.device) -> None:
    """Meet the other processes at node 0, and begin to talk.

    Raises:
        RunError: some have not come in time; it names them.
        SpecError: they are of another run: more or fewer processes, or another version.
    """
    world, rank = environment.world, environment.global_rank()
    patience = seconds_of(PATIENCE_VARIABLE, _PATIENCE)
    deadline = time.monotonic() + patience
    store = _open_store(environment, rank, deadline)
    shape = f"{world.nodes} node(s) of {world.per_node} process(es), openmae {__version__}"
    if rank == 0:
        store.set("shape", shape)
    keys = [f"joined/{other}" for other in range(world.size)]
    store.set(keys[rank], "")
    try:
        while not store.check(["shape", *keys]):
            if store.check(["shape"]):
                _compare(store.get("shape").decode(), shape, world)
            if time.monotonic() > deadline:
                missing = [other for other, key in enumerate(keys) if not store.check([key])]
                raise _missing(world, missing, environment.main_port, patience)
            time.sleep(0.05)
        _compare(store.get("shape").decode(), shape, world)
    except torch.distributed.DistError:
        raise RunError(
            "Node 0 has ended while the processes were waiting for one another.", "Its own output says why."
        ) from None
    backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "gloo":
        _choose_interface(world)
    torch.distributed.init_process_group(
        backend,
        store=PrefixStore("openmae", store),
        rank=rank,
        world_size=world.size,
        timeout=_timeout(),
        device_id=device if backend == "nccl" else None,
    )


def _timeout() -> timedelta:
    """Of what the processes do together: gloo's is to strike as soon as the judge has, NCCL's later or never."""
    return timedelta(seconds=answer_seconds() + (_MARGIN if torch.cuda.is_available() else 0.0))


def _open_store(environment: WorldEnvironment, rank: int, deadline: float) -> TCPStore:
    world, port = environment.world, environment.main_port
    wait, patience = timedelta(seconds=30), seconds_of(PATIENCE_VARIABLE, _PATIENCE)
    if rank == 0:
        try:
            return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=wait)
        except torch.distributed.DistNetworkError as error:
            raise RunError(
                f"MASTER_PORT: node 0 cannot listen on port {port} ({_first_line(error)}).",
                "Set another MASTER_PORT, on every node the same.",
            ) from None
    while True:
        try:
            socket.create_connection((world.address, port), timeout=2).close()
            return TCPStore(world.address, port, is_master=False, timeout=wait)
        except (OSError, torch.distributed.DistNetworkError) as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"Node 0 did not answer at {world.address}:{port} within {patience:g} s ({_first_line(error)}).",
                    f"See that it runs, that MASTER_ADDR and MASTER_PORT are its own, and that no firewall is between; "
                    f"{PATIENCE_VARIABLE} is how long to wait.",
                ) from None
        time.sleep(0.2)


def _compare(theirs: str, own: str, world: World) -> None:
    if theirs != own:
        raise SpecError(
            f"Node 0 runs with {theirs}, but node {world.node_rank} with {own}.",
            "Start the same command with the same spec and version on every node.",
        )


def _missing(world: World, ranks: list[int], port: int, patience: float) -> RunError:
    absent = sorted({rank // world.per_node for rank in ranks})
    whole = len(ranks) == len(absent) * world.per_node
    names = f"node {', '.join(map(str, absent))}" if whole else f"process {', '.join(map(str, ranks))}"
    return RunError(
        f"Waited {patience:g} s for {world.nodes} node(s) of {world.per_node} process(es): {names} did not join.",
        f"Start the same command there (its own NODE_RANK, the same MASTER_ADDR={world.address} and "
        f"MASTER_PORT={port}), and see that no firewall is between; {PATIENCE_VARIABLE} is how long to wait.",
    )


def _choose_interface(world: World) -> None:
    """Let gloo use the interface that leads to node 0: by a host's own name it often finds the loopback."""
    if world.nodes == 1 or os.environ.get(_INTERFACE) or sys.platform != "linux":
        return
    import fcntl  # the request below is Linux's

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((world.address, world.port))
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # one without an address
                request = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(probe.fileno(), _ADDRESS_OF_INTERFACE, request)[20:24]
                if socket.inet_ntoa(found) == own:
                    os.environ[_INTERFACE] = name
                    return


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__
