"""Process topology from the published variables, torchrun's and SLURM's; contradictions with the spec."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmae.distributed.topology import World, find_world, follows
from openmae.errors import SpecError

NODES = {"WORLD_SIZE": "2", "NODE_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
TORCHRUN |= {"MASTER_ADDR": "head"}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_PROCID": "2",
}
SLURM_NODES = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("gpus", "nodes", "variables", "world"),
    [
        (None, None, {}, World()),
        (4, 1, {}, World(per_node=4)),
        (2, 2, {**NODES, "NUM_GPU_PER_NODE": "2"}, World(2, 2, 1, None, "head", 29500)),
        (None, None, {**NODES, "NUM_GPU_PER_NODE": "2"}, World(2, 2, 1, None, "head", 29500)),
        (2, 2, {**NODES, "WORLD_SIZE": "4"}, World(2, 2, 1, None, "head", 29500)),
        (1, 2, NODES, World(2, 1, 1, 0, "head", 29500)),
        (2, 1, {"WORLD_SIZE": "1", "NODE_RANK": "0", "NUM_GPU_PER_NODE": "8"}, World(per_node=8)),
        (1, 1, {"WORLD_SIZE": "1", "NUM_GPU_PER_NODE": "2"}, World(per_node=2)),
        (1, 2, {"WORLD_SIZE": "1", "NUM_GPU_PER_NODE": "2"}, World(per_node=2)),
        (4, None, {"NUM_GPU_PER_NODE": "2"}, World(per_node=2)),
        (None, None, {"NUM_GPU_PER_NODE": "0"}, World(per_node=1)),
        (2, 1, {"WORLD_SIZE": "1"}, World(per_node=2)),
        (1, 1, {**NODES, "NUM_GPU_PER_NODE": "2"}, World(2, 2, 1, None, "head", 29500)),
        (4, 3, {**NODES, "NUM_GPU_PER_NODE": "1"}, World(2, 1, 1, 0, "head", 29500)),
        (1, 1, NODES, World(2, 1, 1, 0, "head", 29500)),
        (2, 1, {**NODES, "WORLD_SIZE": "4"}, World(2, 2, 1, None, "head", 29500)),
        (1, 1, TORCHRUN, World(2, 2, 1, 1, "head", 29500, "torchrun")),
        (4, 3, TORCHRUN, World(2, 2, 1, 1, "head", 29500, "torchrun")),
        (4, 1, SLURM, World(2, 2, 1, 0, "node07", 24560, "SLURM")),
        (2, 3, SLURM_NODES, World(2, 2, 1, None, "node07", 24560, "SLURM")),
        (1, 1, {**SLURM_NODES, "NUM_GPU_PER_NODE": "2"}, World(2, 2, 1, None, "node07", 24560, "SLURM")),
        (2, None, {"WORLD_SIZE": "8"}, World(per_node=2)),
        (None, None, TORCHRUN, World(2, 2, 1, 1, "head", 29500, "torchrun")),
        (2, 2, TORCHRUN, World(2, 2, 1, 1, "head", 29500, "torchrun")),
        (None, None, SLURM, World(2, 2, 1, 0, "node07", 24560, "SLURM")),
        (2, 2, {**SLURM, "MASTER_ADDR": "a", "MASTER_PORT": "7"}, World(2, 2, 1, 0, "a", 7, "SLURM")),
        (4, 2, SLURM_NODES, World(2, 4, 1, None, "node07", 24560, "SLURM")),
        (None, None, SLURM_NODES, World(2, 1, 1, 0, "node07", 24560, "SLURM")),
        (3, 2, {**SLURM_NODES, **NODES, "NUM_GPU_PER_NODE": "3"}, World(2, 3, 1, None, "head", 29500)),
        (2, None, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, World(per_node=2)),
        (
            None,
            None,
            {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"},
            World(1, 2, 0, 0, "127.0.0.1", 24560, "SLURM"),
        ),
    ],
)
def test_the_topology_follows_the_variables(gpus, nodes, variables, world):
    assert find_world("train", gpus, nodes, variables) == world


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n[1-2]", "n1"), ("a[01-03,07],b2", "a01"), ("gpu-3,gpu-9", "gpu-3")]
)
def test_the_first_node_of_a_list(nodes, first):
    assert find_world("train", None, None, {**SLURM, "SLURM_STEP_NODELIST": nodes}).address == first


@pytest.mark.parametrize(
    ("gpus", "nodes", "variables", "message"),
    [
        (1, 2, {}, "train.num_nodes is 2, but WORLD_SIZE, NODE_RANK, MASTER_ADDR, MASTER_PORT are not set."),
        (1, 2, {k: v for k, v in NODES.items() if k != "MASTER_PORT"}, "train.num_nodes is 2, but MASTER_PORT is not"),
        (1, None, {"WORLD_SIZE": "2", "NODE_RANK": "1"}, "NODE_RANK and WORLD_SIZE are set, but MASTER_ADDR, MASTER_"),
        (1, 2, {**NODES, "MASTER_PORT": "http"}, "MASTER_PORT must be an integer of 1 or more, got 'http'."),
        (1, 2, {**NODES, "MASTER_PORT": "70000"}, "MASTER_PORT must be a port from 1 to 65535, got 70000."),
        (1, 2, {**NODES, "NODE_RANK": "2"}, "NODE_RANK must be from 0 to 1 for 2 nodes, got 2."),
        (1, 2, {**NODES, "NODE_RANK": "-1"}, "NODE_RANK must be an integer of 0 or more, got '-1'."),
        (2, 2, NODES, "WORLD_SIZE is 2 and counts processes, as NUM_GPU_PER_NODE is not set"),
        (2, 2, NODES, "Set WORLD_SIZE=4 or change train.num_nodes. If it is meant to count nodes, set NUM_GPU_PER_NOD"),
        (4, None, NODES, "which does not fit train.num_gpus=4 with 4 processes per node."),
        (2, None, {**NODES, "WORLD_SIZE": "3"}, "WORLD_SIZE is 3 and counts processes"),
        (1, 1, {"WORLD_SIZE": "2", "NUM_GPU_PER_NODE": "2"}, "WORLD_SIZE is more than 1, but NODE_RANK, MASTER_ADDR, "),
        (1, 1, {"WORLD_SIZE": "1", "NUM_GPU_PER_NODE": "two"}, "NUM_GPU_PER_NODE must be an integer of 0 or more, got"),
        (None, None, {**TORCHRUN, "WORLD_SIZE": "5"}, "torchrun started 5 processes, but not 2 on every node."),
        (None, None, {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, "SLURM started 4 tasks unevenly over the nodes"),
    ],
)
def test_contradicting_variables_are_an_error(gpus, nodes, variables, message):
    with pytest.raises(SpecError) as caught:
        find_world("train", gpus, nodes, variables)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        (NODES, True),
        ({**NODES, "NODE_RANK": "0"}, False),
        (TORCHRUN, True),
        ({**TORCHRUN, "RANK": "0"}, False),
        (SLURM, True),
        ({**SLURM, "SLURM_PROCID": "0"}, False),
        ({"NODE_RANK": "1"}, False),
    ],
)
def test_one_process_logs_for_all(variables, expected):
    assert follows(variables) is expected


def test_the_first_process_of_node_0_leads():
    assert World(2, 2).leads
    assert World(2, 2, 0, 0).leads
    assert not World(2, 2, 0, 1).leads
    assert not World(2, 2, 1, 0).leads
    assert World(2, 3).size == 6


_TYPED = st.none() | st.integers(1, 5)


@given(
    gpus=_TYPED,
    nodes=_TYPED,
    variables=st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("WORLD_SIZE", "NUM_GPU_PER_NODE"), st.sampled_from(["", "0", "1", "2", "4", "x"])),
            "NODE_RANK": st.sampled_from(["0", "1", "3"]),
            "MASTER_ADDR": st.just("head"),
            "MASTER_PORT": st.sampled_from(["29500", "0"]),
        },
    ),
)
def test_variables_replace_the_spec_or_are_an_error(gpus, nodes, variables):
    try:
        world = find_world("train", gpus, nodes, variables)
    except SpecError:
        return
    if per_node := variables.get("NUM_GPU_PER_NODE"):
        assert world.per_node == max(int(per_node), 1)
        if size := variables.get("WORLD_SIZE"):
            assert world.nodes == int(size)
    assert 0 <= world.node_rank < world.nodes
    assert find_world("train", world.per_node, world.nodes, variables) == world, "asked again by the work itself"
