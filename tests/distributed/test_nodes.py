"""Several nodes, started as users do: one command per node with the published variables, torchrun, two hosts."""

from __future__ import annotations

import csv
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from openmae.checkpoints.resume import newest_checkpoint
from openmae.cli.main import main
from openmae.results.metrics_csv import read_metrics
from openmae.results.status import read_status

from .conftest import with_warnings

# one such test at a time: they need the cores
pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("several processes")]

_LIMIT = 240  # seconds
_HALF = {"dataset.batch_size": 2}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> list[tuple[int, str]]:
    """Run commands in parallel; return the exit code and stderr of each."""
    base = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
    base |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        started = []
        for command, variables in commands:
            process = subprocess.Popen(
                command, env={**base, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        texts = [process.communicate(timeout=_LIMIT)[1] for process in started]
        return [(process.returncode, text) for process, text in zip(started, texts, strict=True)]


def _mae(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "openmae", *arguments]


def _variables(node: int, address: str, port: int) -> dict[str, str]:
    numbers = {"WORLD_SIZE": 2, "NODE_RANK": node, "MASTER_PORT": port, "NUM_GPU_PER_NODE": 1}
    return {**{name: str(number) for name, number in numbers.items()}, "MASTER_ADDR": address}


def _on_two_nodes(*arguments: str) -> list[tuple[int, str]]:
    port = _free_port()
    return _run([(_mae(*arguments), _variables(node, "127.0.0.1", port)) for node in range(2)])


def _fork_two_nodes(folder: Path, *arguments: str) -> list[tuple[int, str]]:
    """Like ``_on_two_nodes``, but each node is forked from this process, and so need not import torch."""
    port, fork = _free_port(), multiprocessing.get_context("fork")
    logs = [folder / f"{node}.log" for node in range(2)]
    nodes = [
        fork.Process(target=_node, args=(arguments, _variables(node, "127.0.0.1", port), log))
        for node, log in enumerate(logs)
    ]
    with ExitStack() as stack:
        for node in nodes:
            node.start()
            stack.callback(node.join)
            stack.callback(node.kill)
        for node in nodes:
            node.join(_LIMIT)
        return [(node.exitcode, log.read_text()) for node, log in zip(nodes, logs, strict=True)]


def _node(arguments: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))]:
        del os.environ[name]
    os.environ.update(variables)
    with_warnings(lambda: sys.exit(main(list(arguments))))


@pytest.fixture(scope="module")
def one(train: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process with twice the batch."""
    folder = tmp_path_factory.mktemp("one")
    train(folder, {"dataset.batch_size": 4})
    return folder


def _assert_same_losses(folder: Path, one: Path) -> None:
    rows, expected = read_metrics(folder / "metrics.csv"), read_metrics(one / "metrics.csv")
    assert len(rows) == len(expected) == 12
    for got, wanted in zip(rows, expected, strict=True):
        assert got.keys() == wanted.keys()
        for name in wanted.keys() - {"images_per_s", "data_wait"}:
            assert got[name] == pytest.approx(wanted[name], rel=2e-3 if "loss" in name else 1e-9), name
    assert rows[0]["train_loss"] == pytest.approx(expected[0]["train_loss"], rel=1e-6)  # before weights can drift
    weights, wanted_weights = (
        torch.load(newest_checkpoint(place), weights_only=True)["state_dict"] for place in (folder, one)
    )
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, wanted_weights[name], atol=2e-3, rtol=1e-2)
    states = [line["status"] for line in read_status(folder / "status.json")]
    assert (states[0], states[-1], states.count("STARTED")) == ("STARTED", "SUCCESS", 1)


def test_two_nodes_train_as_one_process_with_twice_the_batch(one, tiny_overrides, tmp_path):
    command = ["train", *tiny_overrides(tmp_path / "two", _HALF)]
    if torch.cuda.is_available():  # it cannot be used in a forked process
        (first, text), (second, quiet) = _on_two_nodes(*command)
    else:
        (first, text), (second, quiet) = _fork_two_nodes(tmp_path, *command)
    assert (first, second) == (0, 0), text + quiet
    assert quiet == ""  # one log
    assert "running on the CPU with 2 processes on 2 nodes" in text
    assert "4 = 2 images x 2 nodes" in text
    _assert_same_losses(tmp_path / "two", one)


@pytest.mark.slow
def test_torchrun_trains_as_one_process(one, tiny_overrides, tmp_path):
    """torchrun sets the number of processes if the spec does not."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={_free_port()}"]
    ((code, text),) = _run([([*command, "-m", "openmae", "train", *tiny_overrides(tmp_path / "two", _HALF)], {})])
    assert code == 0, text
    assert text.count("Epoch 2 of 2, step 10") == 1
    assert "num_gpus: 2" in (tmp_path / "two" / "experiment.yaml").read_text()
    _assert_same_losses(tmp_path / "two", one)


@pytest.mark.slow
def test_two_nodes_predict_each_image_once_in_order(train, photos, tiny_overrides, tmp_path):
    """Nine images over two nodes: the metrics and the one results.csv are those of one process."""
    changes = {"train.stage": "finetune", "train.num_epochs": 1, "model.decoder_depth": None}
    train(tmp_path / "model", {**changes, "model.decoder_embed_dim": None})
    checkpoint = newest_checkpoint(tmp_path / "model")
    common = ["dataset.batch_size=2", "dataset.num_workers_per_gpu=0", "train.stage=finetune"]
    inference = [f"inference.checkpoint={checkpoint}", f"dataset.test_data_sources={photos / 'val'}", *common]
    evaluation = [f"evaluate.checkpoint={checkpoint}", f"dataset.val_data_sources={photos / 'val'}", *common]
    assert main(["inference", *inference, f"inference.results_dir={tmp_path / 'one'}"]) == 0
    assert main(["evaluate", *evaluation, f"evaluate.results_dir={tmp_path / 'one' / 'e'}"]) == 0
    done = _on_two_nodes("inference", *inference, f"inference.results_dir={tmp_path / 'two'}")
    done += _on_two_nodes("evaluate", *evaluation, f"evaluate.results_dir={tmp_path / 'two' / 'e'}")
    assert [code for code, _ in done] == [0] * 4, done
    places = (tmp_path / "one", tmp_path / "two")
    tables = [list(csv.reader((place / "results.csv").open())) for place in places]
    scores = [line["kpi"] for place in places for line in read_status(place / "e" / "status.json") if "kpi" in line]
    assert [row[:2] for row in tables[0]] == [row[:2] for row in tables[1]]
    assert len(tables[1]) == 10
    for mine, theirs in zip(tables[0][1:], tables[1][1:], strict=True):
        assert float(mine[2]) == pytest.approx(float(theirs[2]), abs=1e-5)
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


@pytest.fixture
def two_hosts() -> Iterator[tuple[list[list[str]], str]]:
    """Two connected network namespaces: prefixes of commands that run in them, and the first one's address."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command ip")
    names, third = [f"mae{os.getpid()}{side}" for side in "ab"], os.getpid() % 250
    with ExitStack() as stack:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
                pytest.skip("this machine allows no network namespaces")
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
        ends = [f"{name}0"[-15:] for name in names]
        subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
        for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            subprocess.run(["ip", "link", "set", end, "netns", name], check=True)
            inside = ["ip", "-n", name]
            subprocess.run([*inside, "addr", "add", f"10.231.{third}.{number}/24", "dev", end], check=True)
            for device in (end, "lo"):
                subprocess.run([*inside, "link", "set", device, "up"], check=True)
        yield [["ip", "netns", "exec", name] for name in names], f"10.231.{third}.1"


@pytest.mark.slow
def test_two_hosts_train_as_one_process(one, two_hosts, tiny_overrides, tmp_path):
    """Hosts that share only a network connection and the file system."""
    hosts, address = two_hosts
    command = _mae("train", *tiny_overrides(tmp_path / "two", {**_HALF, "train.num_nodes": 2}))
    done = _run([([*host, *command], _variables(node, address, 29500)) for node, host in enumerate(hosts)])
    assert [code for code, _ in done] == [0, 0], done
    _assert_same_losses(tmp_path / "two", one)


@pytest.mark.slow
def test_a_node_that_sees_other_images_is_named(tiny_overrides, photos, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(photos / "train", other)
    (other / "cat" / "0.png").unlink()
    port = _free_port()
    commands = [
        (_mae("train", *tiny_overrides(tmp_path / "two", {**_HALF, "dataset.train_data_sources": source})), variables)
        for source, variables in zip(
            (photos / "train", other), (_variables(node, "127.0.0.1", port) for node in range(2)), strict=True
        )
    ]
    for code, text in _run(commands):
        assert code == 2, text
        assert "Node 1 sees another training set than node 0: 20 images (" in text
        assert "instead of 21 images (" in text
