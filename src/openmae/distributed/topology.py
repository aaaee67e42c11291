"""The process topology of a run: one process, several nodes, or processes that torchrun or SLURM started."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from openmae.errors import SpecError
from openmae.storage.printable import counted

PUBLISHED = ("WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
GPUS_PER_NODE = "NUM_GPU_PER_NODE"
#: Variables set by launchers; a run on one machine must not inherit them.
LAUNCHERS = (*PUBLISHED, GPUS_PER_NODE, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_PORTS = range(1, 65536)


@dataclass(frozen=True)
class World:
    """The process topology of a run, and the rank of this process.

    Attributes:
        nodes: number of machines.
        per_node: processes on each machine.
        node_rank: rank of this machine.
        local_rank: rank of this process on its machine; None if it must start the processes of its machine.
        address: address of node 0.
        port: port of node 0; 0 for any free port.
        launcher: ``torchrun`` or ``SLURM``; empty if a user or an orchestrator started the processes.
    """

    nodes: int = 1
    per_node: int = 1
    node_rank: int = 0
    local_rank: int | None = None
    address: str = "127.0.0.1"
    port: int = 0
    launcher: str = ""

    @property
    def size(self) -> int:
        """Number of processes of the run."""
        return self.nodes * self.per_node

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return self.node_rank * self.per_node + (self.local_rank or 0)

    @property
    def leads(self) -> bool:
        """True if this process writes the results and logs."""
        return self.rank == 0

    @property
    def opened_once(self) -> bool:
        """True if one process opens data and checkpoints, and then starts all others."""
        return self.nodes == 1 and self.local_rank is None


def find_world(
    section: str, num_gpus: int | None, num_nodes: int | None, environment: Mapping[str, str] = os.environ
) -> World:
    """Return the process topology. torchrun, SLURM and environment variables take precedence over the spec.

    ``section`` of the spec (for messages) has the given ``num_gpus`` per node and ``num_nodes``, None if not set.

    Raises:
        SpecError: a variable is missing or invalid.
    """
    if all(environment.get(name) for name in _TORCHRUN):
        return _of_torchrun(section, environment)
    tasks = _count(environment, "SLURM_STEP_NUM_TASKS", 1) if environment.get("SLURM_STEP_NUM_TASKS") else 1
    each = _slurm_tasks_per_node(environment, tasks) if tasks > 1 else 1
    if each > 1:  # SLURM has started every process
        nodes = tasks // each
        address, port = _slurm_address(environment)
        node, local = (_count(environment, name, 0) for name in ("SLURM_NODEID", "SLURM_LOCALID"))
        return World(nodes, each, node, local, address if nodes > 1 else "127.0.0.1", port, "SLURM")
    total = environment.get("WORLD_SIZE", "")
    per_node = gpus_per_node(environment) or num_gpus or 1
    by_variables = total not in ("", "1") and bool(environment.get("NODE_RANK") or environment.get(GPUS_PER_NODE))
    if tasks > 1 and not (by_variables and environment.get("NODE_RANK")):  # SLURM has started one process per node
        address, port = _slurm_address(environment)
        rank = _count(environment, "SLURM_NODEID", 0)
        return World(tasks, per_node, rank, None if per_node > 1 else 0, address, port, "SLURM")
    if by_variables or ((num_nodes or 1) > 1 and total != "1"):
        return _of_variables(section, num_gpus, num_nodes, environment)
    return World(per_node=per_node)


def gpus_per_node(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the processes per node according to ``NUM_GPU_PER_NODE``, or None if it is not set."""
    if not environment.get(GPUS_PER_NODE):
        return None
    return max(_count(environment, GPUS_PER_NODE, 0), 1)  # 0: one process, on the CPU


def follows(environment: Mapping[str, str] = os.environ) -> bool:
    """Return True if, according to the environment variables, this is not the process that logs (rank 0)."""
    if all(environment.get(name) for name in _TORCHRUN):
        return environment["RANK"] != "0"
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return environment.get("SLURM_PROCID", "0") != "0"
    return environment.get("WORLD_SIZE", "1") != "1" and environment.get("NODE_RANK", "0") != "0"


def _of_torchrun(section: str, environment: Mapping[str, str]) -> World:
    total, each = (_count(environment, name, 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    rank, local = (_count(environment, name, 0) for name in ("RANK", "LOCAL_RANK"))
    if total % each or rank % each != local:
        raise SpecError(
            f"{section}.num_gpus: torchrun started {total} processes, but not {each} on every node.",
            "Use the same --nproc-per-node on every node.",
        )
    address, port = environment.get("MASTER_ADDR", "127.0.0.1"), _port(environment)
    return World(total // each, each, rank // each, local, address, port, "torchrun")


def _of_variables(section: str, num_gpus: int | None, num_nodes: int | None, environment: Mapping[str, str]) -> World:
    """Return the topology; ``WORLD_SIZE`` counts nodes if ``NUM_GPU_PER_NODE`` is set, and processes otherwise."""
    if missing := [name for name in PUBLISHED if not environment.get(name)]:
        why = "NODE_RANK and WORLD_SIZE are set" if environment.get("NODE_RANK") else "WORLD_SIZE is more than 1"
        if (num_nodes or 1) > 1:
            why = f"{section}.num_nodes is {num_nodes}"
        raise SpecError(
            f"{why}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set.",
            "Set WORLD_SIZE, NODE_RANK, MASTER_ADDR, MASTER_PORT and NUM_GPU_PER_NODE on each node (WORLD_SIZE then "
            "counts nodes), or start the command with torchrun or srun.",
        )
    total, rank = _count(environment, "WORLD_SIZE", 1), _count(environment, "NODE_RANK", 0)
    each, nodes = gpus_per_node(environment), total
    if each is None:
        each = num_gpus or 1
        nodes = total // each
        if total % each or (each > 1 and num_nodes == total):
            raise _ambiguous(section, num_nodes, total, each)
    if rank >= nodes:
        raise SpecError(
            f"NODE_RANK must be from 0 to {nodes - 1} for {nodes} nodes, got {rank}.",
            "Number the nodes from 0; each has its own.",
        )
    return World(nodes, each, rank, None if each > 1 else 0, environment["MASTER_ADDR"], _port(environment))


def _ambiguous(section: str, num_nodes: int | None, total: int, each: int) -> SpecError:
    """Return the error for a ``WORLD_SIZE`` that counts processes, but may be meant to count nodes."""
    nodes = num_nodes if num_nodes and num_nodes > 1 else None
    key, value = (f"{section}.num_nodes", nodes) if nodes else (f"{section}.num_gpus", each)
    return SpecError(
        f"WORLD_SIZE is {total} and counts processes, as NUM_GPU_PER_NODE is not set, which does not fit {key}={value} "
        f"with {counted(each, 'process')} per node.",
        f"Set WORLD_SIZE={(nodes or total) * each} or change {key}. If it is meant to count nodes, set "
        f"NUM_GPU_PER_NODE={each}.",
    )


def _slurm_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return ``MASTER_ADDR`` and ``MASTER_PORT``; by default, the first node and a port derived from the job ID."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "127.0.0.1")
    first = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])  # n[01-02,07] -> n01
    digits = (environment.get("SLURM_JOB_ID", "0") + environment.get("SLURM_STEP_ID", "0"))[-4:]
    port = _port(environment) if environment.get("MASTER_PORT") else 20000 + int(digits)
    return environment.get("MASTER_ADDR") or first, port


def _slurm_tasks_per_node(environment: Mapping[str, str], tasks: int) -> int:
    """Return the number in ``SLURM_STEP_TASKS_PER_NODE``, such as 2 in ``2(x3)``."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    found = {int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?", text)}
    if len(found) != 1 or tasks % min(found):
        raise SpecError(
            f"SLURM started {tasks} tasks unevenly over the nodes ({text or 'SLURM_STEP_TASKS_PER_NODE is not set'}).",
            "Give --nodes and --ntasks-per-node.",
        )
    return found.pop()


def _port(environment: Mapping[str, str]) -> int:
    port = _count(environment, "MASTER_PORT", _PORTS.start)
    if port not in _PORTS:
        raise SpecError(f"MASTER_PORT must be a port from 1 to 65535, got {port}.", "Choose a free port of node 0.")
    return port


def _count(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment.get(name, "").strip()
    if not text.isdecimal() or int(text) < least:
        raise SpecError(f"{name} must be an integer of {least} or more, got {text!r}.", "Correct it on every node.")
    return int(text)
