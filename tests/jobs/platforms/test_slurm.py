"""Jobs of a local SLURM cluster of two nodes; skipped if its programs are not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.helpers import slurm_node
from tests.helpers.platform_contract import SLEEP, ClusterContract, PlatformContract, RunCode, Submit, until

from openmae.errors import RunError, SpecError
from openmae.jobs import Client
from openmae.jobs.job import Handle
from openmae.machine import Identity
from openmae.results.metrics_csv import read_metrics

_ONE_THREAD = {"OMP_NUM_THREADS": "1"}

reason = slurm_node.missing()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if reason:
        pytest.skip(reason)
    with slurm_node.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture
def client(cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    return Client("slurm", tmp_path / "jobs")


class TestSlurm(ClusterContract):
    capacity = len(slurm_node.NODES)
    # SLURM itself waits 10 s between SIGTERM and SIGKILL
    test_a_job_that_ignores_signals_is_killed = pytest.mark.slow(
        PlatformContract.test_a_job_that_ignores_signals_is_killed
    )


def test_several_nodes_get_their_variables(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code(
        "import os; names = ('NODE_RANK', 'WORLD_SIZE', 'NUM_GPU_PER_NODE', 'MASTER_ADDR')\n"
        "print(*map(os.environ.get, names), int(os.environ['MASTER_PORT']) > 1024)"
    )
    done = client.wait(submit(num_nodes=2, gpu_count=3).id, 40)
    assert done.status == "COMPLETE", client.get_job_logs(done.id)
    assert sorted(client.get_job_logs(done.id).splitlines()) == ["0 2 3 127.0.0.1 True", "1 2 3 127.0.0.1 True"]


@pytest.mark.slow
def test_a_training_run_on_two_nodes(client: Client, submit: Submit, tmp_path: Path) -> None:
    """The loss is that of one process with twice the batch size."""
    overrides = {
        **{"model.arch": "vit_tiny_patch16", "model.decoder_depth": 1, "model.decoder_embed_dim": 32},
        **{"dataset.augmentation.input_size": 32, "dataset.num_workers_per_gpu": 0, "train.num_epochs": 2},
        "train.optim.lr": 1e-3,
    }
    jobs = [
        submit(num_nodes=nodes, spec_overrides={**overrides, "dataset.batch_size": 4 // nodes}, env_vars=_ONE_THREAD)
        for nodes in (2, 1)
    ]
    losses = []
    for job in jobs:
        done = client.wait(job.id, 240)
        logs = client.get_job_logs(job.id)
        assert done.status == "COMPLETE", logs
        assert logs.count("Epoch 2 of 2, step 6") == 1, logs
        rows = read_metrics(Path(client.store.read(job.id).results_folder) / "metrics.csv")
        losses.append([row["train_loss"] for row in rows if "train_loss" in row])
    assert "4 = 2 images x 2 nodes" in client.get_job_logs(jobs[0].id)
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--nodes=2", "--ntasks-per-node=1"], ["2 1 0 0", "2 1 1 0"]),
        (["--nodes=1", "--ntasks=2", "--overcommit"], ["1 2 0 0", "1 2 0 1"]),
        (["--nodes=1", "--ntasks=1"], ["1 1 0 None"]),
    ],
    ids=["one task per node", "one task per process", "one task"],
)
def test_the_process_topology_comes_from_srun(cluster: dict[str, str], options: list[str], expected: list[str]) -> None:
    code = (
        "from openmae.distributed.topology import find_world\n"
        "world = find_world('train', None, None)\n"
        "print(world.nodes, world.per_node, world.node_rank, world.local_rank)"
    )
    done = subprocess.run(
        ["srun", *options, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **cluster},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == expected


def test_the_message_has_the_state_in_slurm(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code("import time; time.sleep(1); raise SystemExit(1)")
    done = client.wait(submit().id, 40)
    assert "SLURM job" in done.message
    assert done.status == "ERROR"


def test_a_submission_that_slurm_refuses_is_an_error(
    client: Client, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    with pytest.raises(RunError, match=r"SLURM refused sbatch: .*partition"):
        submit()
    (job,) = client.list_jobs()
    assert (job.status, "could not be started" in job.message) == ("ERROR", True)


def test_without_slurms_commands_it_is_refused(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    client = Client("slurm", tmp_path / "jobs")
    with pytest.raises(SpecError, match=r"slurm needs SLURM's commands, but sbatch, squeue, scancel, sinfo is not on"):
        client.create_job("train", spec_overrides={"dataset.train_data_sources": str(images / "train")})


def test_a_job_that_slurm_no_longer_knows_is_an_error(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code("pass")
    record = client.store.read(client.wait(submit().id, 40).id)
    record = replace(record, id="a" * 32, transitions=record.transitions[:1], exit_code=None)
    client.store.create(record)
    seen = client.get_job_status("a" * 32)
    assert (seen.status, seen.message) == ("ERROR", f"SLURM no longer knows job {record.handle.slurm_job}")
    gone: Identity = {"pid": 1, "start": 1, "boot": ""}
    client.store.create(replace(record, id="c" * 32, handle=Handle(), submitter=gone))
    seen = client.get_job_status("c" * 32)
    assert (seen.status, seen.message) == ("ERROR", "the client died before the job was submitted to SLURM")


def test_a_controller_that_does_not_answer_makes_a_job_unknown(
    client: Client, submit: Submit, run_code: RunCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_code(SLEEP)
    job = submit()
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", str(tmp_path / "none.conf"))
        patch.setattr("openmae.jobs.platforms.slurm._PATIENCE", 0.5)
        seen = Client("slurm", client.store.root).get_job_status(job.id)
    assert (seen.status, seen.message) == ("UNKNOWN", "SLURM did not answer squeue within 0.5 s.")
    client.cancel_job(job.id)
    assert client.wait(job.id, 40).status == "CANCELED"


_PREEMPTED_ONCE = """
import os, pathlib, signal, sys, time
mark = pathlib.Path({mark!r} + os.environ.get("NODE_RANK", ""))
if mark.exists():
    print("resumed", flush=True)
    sys.exit(0)
mark.touch()
def stop(*_):
    time.sleep({slow} * (os.environ.get("NODE_RANK") == "0"))
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_job_at_its_time_limit_is_requeued_and_resumes(
    nodes: int, client: Client, submit: Submit, run_code: RunCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openmae.jobs.prepare._resources", lambda *arguments: (1, nodes))
    run_code(_PREEMPTED_ONCE.format(mark=str(tmp_path / "mark"), slow=nodes - 1))
    job = submit()
    until(lambda: client.get_job_logs(job.id).count("ready") == nodes, "the job's first lines")
    until(lambda: client.get_job_status(job.id).status == "RUNNING", "the sight of the job")
    number = client.store.read(job.id).handle.slurm_job or ""
    told = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=True).stdout
    assert "Requeue=1" in told
    subprocess.run(["scancel", "--signal=USR1", number], check=True)
    until(lambda: client.get_job_status(job.id).status == "PENDING", "the requeueing")
    # SLURM waits two minutes before it starts a job again. Some seconds are necessary: a node refuses credentials that
    # were issued in the second in which it revoked those of the job's first start.
    subprocess.run(["scontrol", "update", f"jobid={number}", "starttime=now+3"], check=True)
    done = client.wait(job.id, 60)
    assert (done.status, done.exit_code) == ("COMPLETE", 0), (done.message, client.get_job_logs(job.id))
    assert client.get_job_logs(job.id).count("resumed") == nodes
    assert "PENDING" in [transition.state for transition in done.transitions[1:]], "it was not requeued"


def test_a_canceled_training_is_not_requeued(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code(
        "import sys, time\nprint('ready', flush=True)\n"
        "try: time.sleep(60)\nexcept KeyboardInterrupt: sys.exit(75)"  # preempted and canceled at once
    )
    job = submit()
    until(lambda: "ready" in client.get_job_logs(job.id), "the job's first line")
    client.cancel_job(job.id)
    assert client.wait(job.id, 40).status == "CANCELED"
