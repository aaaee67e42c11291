"""Which of a run's processes this one is: alone, one of several nodes, or started by torchrun or SLURM."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from openmae.errors import SpecError

PUBLISHED = ("WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_PORTS = range(1, 65536)


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's place among them.

    Attributes:
        nodes: machines.
        per_node: processes of each.
        node_rank: number of this machine.
        local_rank: number of this process on its machine; None: it starts the processes of its machine. The only one
            of a machine is there already.
        address, port: where node 0 is met; port 0 is any free one.
        launcher: what started the processes, for messages; empty where a person or an orchestrator did.
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
        """Processes of the run."""
        return self.nodes * self.per_node

    @property
    def leads(self) -> bool:
        """Whether this process writes the results and tells what happens."""
        return self.node_rank == 0 and not self.local_rank

    @property
    def opened_once(self) -> bool:
        """Whether one process opens data and checkpoints for all others."""
        return self.nodes == 1 and self.local_rank is None


def find_world(
    section: str, num_gpus: int | None, num_nodes: int | None, environment: Mapping[str, str] = os.environ
) -> World:
    """Read what torchrun, SLURM or the published variables say, and check it against the spec.

    Args:
        section: of the spec, for messages: ``train``, ``evaluate`` or ``inference``.
        num_gpus: processes of a node; None: not typed, so that the launcher's number holds.
        num_nodes: machines; None likewise.
        environment: the process's variables.

    Raises:
        SpecError: a variable is missing or wrong, or contradicts the spec.
    """
    asked = _Asked(section, num_gpus, num_nodes)
    if all(environment.get(name) for name in _TORCHRUN):
        return _under_torchrun(asked, environment)
    tasks = _count(environment, "SLURM_STEP_NUM_TASKS", 1) if environment.get("SLURM_STEP_NUM_TASKS") else 1
    each = _tasks_per_node(environment, tasks) if tasks > 1 else 1
    if each > 1:
        return _one_task_a_process(asked, environment, tasks // each, each)
    by_variables = environment.get("NODE_RANK") and environment.get("WORLD_SIZE", "1") != "1"
    if tasks > 1 and not by_variables:
        _agree(asked, "num_nodes", tasks, f"SLURM started a task on each of {tasks} nodes", f"srun --nodes={num_nodes}")
        address, port = _meeting_place(environment)
        rank = _count(environment, "SLURM_NODEID", 0)
        return World(tasks, num_gpus or 1, rank, None if (num_gpus or 1) > 1 else 0, address, port, "SLURM")
    if by_variables or (num_nodes or 1) > 1:
        return _by_variables(asked, environment)
    return World(per_node=num_gpus or 1)


def follows(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether another process is going to tell what happens, as far as the variables alone show."""
    if all(environment.get(name) for name in _TORCHRUN):
        return environment["RANK"] != "0"
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return environment.get("SLURM_PROCID", "0") != "0"
    return environment.get("WORLD_SIZE", "1") != "1" and environment.get("NODE_RANK", "0") != "0"


@dataclass(frozen=True)
class _Asked:
    section: str
    num_gpus: int | None
    num_nodes: int | None


def _under_torchrun(asked: _Asked, environment: Mapping[str, str]) -> World:
    total, each = (_count(environment, name, 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    rank, local = (_count(environment, name, 0) for name in ("RANK", "LOCAL_RANK"))
    if total % each or rank % each != local:
        raise SpecError(
            f"{asked.section}.num_gpus: torchrun started {total} processes, but not {each} on every node.",
            "Start equally many on each node, by the same --nproc-per-node.",
        )
    nodes = total // each
    fix = f"torchrun --nproc-per-node={asked.num_gpus}"
    _agree(asked, "num_gpus", each, f"torchrun started {each} process(es) a node", fix)
    _agree(asked, "num_nodes", nodes, f"torchrun runs on {nodes} node(s)", f"torchrun --nnodes={asked.num_nodes}")
    address, port = environment.get("MASTER_ADDR", "127.0.0.1"), _port(environment)
    return World(nodes, each, rank // each, local, address, port, "torchrun")


def _one_task_a_process(asked: _Asked, environment: Mapping[str, str], nodes: int, each: int) -> World:
    fix = f"srun --ntasks-per-node={asked.num_gpus} (or 1: one process then starts the others)"
    _agree(asked, "num_gpus", each, f"SLURM started {each} tasks a node", fix)
    _agree(asked, "num_nodes", nodes, f"SLURM started tasks on {nodes} node(s)", f"srun --nodes={asked.num_nodes}")
    address, port = _meeting_place(environment)
    node, local = (_count(environment, name, 0) for name in ("SLURM_NODEID", "SLURM_LOCALID"))
    return World(nodes, each, node, local, address if nodes > 1 else "127.0.0.1", port, "SLURM")


def _by_variables(asked: _Asked, environment: Mapping[str, str]) -> World:
    """``WORLD_SIZE`` counts nodes where ``NUM_GPU_PER_NODE`` is set, else processes."""
    section = asked.section
    if missing := [name for name in PUBLISHED if not environment.get(name)]:
        why = f"{section}.num_nodes is {asked.num_nodes}" if asked.num_nodes else "NODE_RANK and WORLD_SIZE are set"
        raise SpecError(
            f"{why}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set.",
            "Set WORLD_SIZE, NODE_RANK, MASTER_ADDR, MASTER_PORT and NUM_GPU_PER_NODE on each node (WORLD_SIZE then "
            "counts nodes), or start the command by torchrun or srun.",
        )
    total, rank = _count(environment, "WORLD_SIZE", 1), _count(environment, "NODE_RANK", 0)
    counts_nodes = bool(environment.get("NUM_GPU_PER_NODE"))
    if counts_nodes:
        each = _count(environment, "NUM_GPU_PER_NODE", 1)
        _agree(asked, "num_gpus", each, f"NUM_GPU_PER_NODE is {each}", f"NUM_GPU_PER_NODE={asked.num_gpus}")
        nodes = total
    else:
        each = asked.num_gpus or 1
        nodes = total // each
    if nodes * (1 if counts_nodes else each) != total or asked.num_nodes not in (None, nodes):
        wanted = (asked.num_nodes or 1) * (1 if counts_nodes else each)
        unit = "nodes" if counts_nodes else "processes"
        because = f"as NUM_GPU_PER_NODE is {'set' if counts_nodes else 'not set'}"
        typed = f"{section}.num_nodes={asked.num_nodes}" if asked.num_nodes else f"{section}.num_gpus={each}"
        mend = "" if counts_nodes else f" If it is meant to count nodes, set NUM_GPU_PER_NODE={each}."
        raise SpecError(
            f"WORLD_SIZE is {total} and counts {unit}, {because}, which does not fit {typed} with {each} process(es) "
            "a node.",
            (f"Set WORLD_SIZE={wanted} or change {typed.partition('=')[0]}." if asked.num_nodes else "") + mend,
        )
    if rank >= nodes:
        raise SpecError(
            f"NODE_RANK must be from 0 to {nodes - 1} for {nodes} nodes, got {rank}.",
            "Number the nodes from 0; each has its own.",
        )
    return World(nodes, each, rank, None if each > 1 else 0, environment["MASTER_ADDR"], _port(environment))


def _agree(asked: _Asked, name: str, found: int, told: str, other: str) -> None:
    """The spec and the launcher must say the same where both say something."""
    typed = getattr(asked, name)
    if typed not in (None, found):
        key = f"{asked.section}.{name}"
        raise SpecError(f"{key} is {typed}, but {told}.", f"Remove {key}, set it to {found}, or use {other}.")


def _meeting_place(environment: Mapping[str, str]) -> tuple[str, int]:
    """``MASTER_ADDR`` and ``MASTER_PORT``; else the first node of the step, and a port that follows from the job."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "127.0.0.1")
    first = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])  # n[01-02,07] -> n01
    place = (environment.get("SLURM_JOB_ID", "0") + environment.get("SLURM_STEP_ID", "0"))[-4:]
    port = _port(environment) if environment.get("MASTER_PORT") else 20000 + int(place)
    return environment.get("MASTER_ADDR") or first, port


def _tasks_per_node(environment: Mapping[str, str], tasks: int) -> int:
    """Of ``SLURM_STEP_TASKS_PER_NODE``, such as ``2(x3)``."""
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
