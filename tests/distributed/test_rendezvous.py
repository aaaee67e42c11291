"""Processes that wait for each other, and name the missing ones."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from openmae.distributed import rendezvous
from openmae.distributed.rendezvous import join
from openmae.distributed.topology import World
from openmae.errors import RunError, SpecError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setenv("OPENMAE_JOIN_SECONDS", "0.5")


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _join(world: World) -> None:
    join(world, CPU)


@pytest.mark.parametrize(
    ("there", "text"), [([], "node 1 did not join"), ([1, 2], "process 3 did not join"), ([1], "node 1 did not join")]
)
def test_missing_processes_are_named(there, text, port, monkeypatch):
    """Four processes on two nodes; the store is the one that node 0 opens."""
    opened = rendezvous._open_store

    def open_with(*arguments):
        store = opened(*arguments)
        for other in there:
            store.set(f"joined/{other}", "")
        return store

    monkeypatch.setattr(rendezvous, "_open_store", open_with)
    world = World(2, 2, 0, 0, "127.0.0.1", port) if there else World(2, 1, 0, 0, "127.0.0.1", port)
    with pytest.raises(RunError, match=r"Waited 0\.5 s for 2 nodes of ") as caught:
        _join(world)
    assert text in caught.value.problem
    assert f"MASTER_PORT={port}" in caught.value.fix


def test_a_node_0_that_does_not_answer_is_an_error(port):
    with pytest.raises(RunError, match=rf"Node 0 did not answer at 127\.0\.0\.1:{port} within 0\.5 s"):
        _join(World(2, 1, 1, 0, "127.0.0.1", port))


def test_a_port_in_use_is_an_error():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(RunError, match=rf"MASTER_PORT: node 0 cannot listen on port {taken}") as caught:
            _join(World(2, 1, 0, 0, "127.0.0.1", taken))
    assert caught.value.fix == "Set another MASTER_PORT, the same on every node."


def test_nodes_of_different_runs_do_not_join(port):
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    store.set("shape", "2 nodes of 4 processes, openmae 0.0.1")
    with pytest.raises(SpecError, match=r"Node 0 runs with 2 nodes of 4 processes, openmae 0\.0\.1, but node 1"):
        _join(World(2, 1, 1, 0, "127.0.0.1", port))


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_the_time_limit_is_a_number_of_seconds(text, monkeypatch, port):
    monkeypatch.setenv("OPENMAE_JOIN_SECONDS", text)
    with pytest.raises(SpecError, match="OPENMAE_JOIN_SECONDS must be a number of seconds above 0"):
        _join(World(2, 1, 1, 0, "127.0.0.1", port))


def test_gloo_uses_the_interface_that_leads_to_node_0(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    rendezvous._choose_interface(World(2, 1, 1, 0, "127.0.0.1", 29500))
    assert rendezvous.os.environ.pop("GLOO_SOCKET_IFNAME") == "lo"
    rendezvous._choose_interface(World(1, 2, 0, 0, "127.0.0.1", 29500))
    assert "GLOO_SOCKET_IFNAME" not in rendezvous.os.environ
