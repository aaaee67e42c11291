"""Jobs of a local Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient
from tests.helpers import ray_cluster
from tests.helpers.platform_contract import SLEEP, ClusterContract, RunCode, Submit, until

import openmae
from openmae.errors import RunError, SpecError
from openmae.jobs import Client
from openmae.jobs.job import Handle
from openmae.jobs.platforms.ray import RayPlatform
from openmae.machine import Identity, identify, is_running
from openmae.results.metrics_csv import read_metrics

pytestmark = pytest.mark.xdist_group("ray")  # one cluster for all tests


@pytest.fixture(scope="module")
def cluster() -> Iterator[ray_cluster.Cluster]:
    with ray_cluster.cluster() as one:
        yield one


@pytest.fixture
def client(cluster: ray_cluster.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    return Client("ray", tmp_path / "jobs")


class TestRay(ClusterContract):
    capacity = ray_cluster.CPUS


@pytest.mark.slow(reason="trains twice")
def test_a_training_job_has_the_losses_of_a_local_run(client: Client, images: Path, tmp_path: Path) -> None:
    """It is submitted with the command of README."""
    spec = {
        "model": {"arch": "vit_tiny_patch16", "decoder_depth": 1, "decoder_embed_dim": 32},
        "dataset": {
            "train_data_sources": str(images / "train"),
            "batch_size": 4,
            "num_workers_per_gpu": 0,
            "augmentation": {"input_size": 32},
        },
        "train": {"num_epochs": 2, "optim": {"lr": 1e-3}},
        "wandb": {"enable": False},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(spec), encoding="utf-8")
    words = ["jobs", "submit", "train", "-e", "spec.yaml", "--platform", "ray", "--automl", "off", "--wait"]
    done = subprocess.run(
        [sys.executable, "-m", "openmae", *words, f"results_dir={tmp_path / 'ray'}"],
        cwd=tmp_path, env={**os.environ, "OPENMAE_JOBS": str(client.store.root)}, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    openmae.train({**spec, "results_dir": str(tmp_path / "alone")})
    losses = [
        [row["train_loss"] for row in read_metrics(tmp_path / where / "train" / "metrics.csv") if "train_loss" in row]
        for where in ("alone", "ray")
    ]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    (job,) = client.list_jobs()
    assert (job.platform, job.status) == ("ray", "COMPLETE")
    assert any(result.path.endswith("report.html") for result in client.list_results(job.id))


@pytest.mark.slow(reason="a search of two trials, each of which imports torch")
def test_a_search_is_a_job_whose_trials_are_jobs(client: Client, submit: Submit, tmp_path: Path) -> None:
    short = {
        **{"model.arch": "vit_tiny_patch16", "model.decoder_depth": 1, "model.decoder_embed_dim": 32},
        **{"dataset.augmentation.input_size": 32, "dataset.num_workers_per_gpu": 0, "dataset.batch_size": 4},
        **{"train.num_epochs": 1, "automl.max_recommendations": 2, "automl.algorithm": "random"},
        **{"automl.max_concurrent": 2, "results_dir": str(tmp_path / "results")},
    }
    job = submit(automl_policy="auto", spec_overrides=short, env_vars={"WANDB_MODE": "disabled"})
    done = client.wait(job.id, 400)
    assert done.status == "COMPLETE", client.get_job_logs(job.id)
    trainings = Client("ray", tmp_path / "results" / "automl" / "jobs" / "ray").list_jobs()
    assert {training.platform for training in trainings} == {"ray"}
    assert [training.status for training in trainings] == ["COMPLETE"] * len(trainings)
    assert {"000 to epoch 1", "001 to epoch 1"} <= {training.name for training in trainings}
    assert (tmp_path / "results" / "automl" / "report.html").is_file()


@pytest.mark.slow(reason="starts jobs")
def test_GPUs_and_CPUs_are_requested_FAKE_GPUS(
    client: Client, submit: Submit, run_code: RunCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_code(
        "import os, time; print(repr(os.environ['CUDA_VISIBLE_DEVICES']), os.environ['OMP_NUM_THREADS'], flush=True)"
    )
    monkeypatch.setenv("OPENMAE_JOB_CPUS", "2")
    two = submit(gpu_count=2)
    assert client.wait(two.id, 40).status == "COMPLETE"
    assert client.get_job_logs(two.id) == "'0,1' 1\n", "two processes share the node's two CPUs"
    none = submit(gpu_count=0)
    assert client.wait(none.id, 40).status == "COMPLETE"
    assert client.get_job_logs(none.id) == "'' 2\n"
    with pytest.raises(
        SpecError, match=r"gpu_count: 3 GPUs are requested, but the largest node of the Ray cluster has 2\."
    ):
        submit(gpu_count=3)
    monkeypatch.setattr(RayPlatform, "_largest", lambda self: (2, 0))  # as if it had no GPUs
    without = submit(gpu_count=3)
    assert client.wait(without.id, 40).status == "COMPLETE"
    assert client.get_job_logs(without.id) == "'' 1\n"
    monkeypatch.setenv("OPENMAE_JOB_CPUS", "all")
    with pytest.raises(SpecError, match=r"OPENMAE_JOB_CPUS must be a number of CPUs, 1 or more, got 'all'"):
        submit()


def test_a_job_that_needs_all_CPUs_runs_alone(
    client: Client, submit: Submit, run_code: RunCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_code(SLEEP)
    monkeypatch.setenv("OPENMAE_JOB_CPUS", "64")
    first = submit()
    until(lambda: client.get_job_status(first.id).status == "RUNNING", "the start on as many CPUs as there are")
    monkeypatch.delenv("OPENMAE_JOB_CPUS")
    waiting = submit()
    seen = client.get_job_status(waiting.id)
    assert (seen.status, seen.message) == ("PENDING", f"Ray job mae-{waiting.id}: PENDING")
    for job in (waiting, first):
        client.cancel_job(job.id)
        assert client.wait(job.id, 40).status == "CANCELED"


def test_secrets_are_not_passed_to_Ray(
    client: Client, submit: Submit, run_code: RunCode, cluster: ray_cluster.Cluster
) -> None:
    """Ray shows what it is given in its dashboard and logs."""
    run_code("import os; print(os.environ['TOKEN'][::-1])")
    job = submit(env_vars={"TOKEN": "s3cr3t-t0ken"})
    assert client.wait(job.id, 40).status == "COMPLETE"
    assert client.get_job_logs(job.id) == "nek0t-t3rc3s\n"
    with urllib.request.urlopen(f"{cluster.address}/api/jobs/mae-{job.id}", timeout=10) as answer:
        shown = answer.read()
    assert b"OPENMAE_JOB_KEY" in shown, "that is not where Ray shows a job's variables"
    logs = [path.read_bytes() for path in cluster.folder.rglob("*") if path.is_file()]
    assert any(b"OPENMAE_JOB_KEY" in text for text in logs), "that is not where Ray keeps its logs"
    assert not [text for text in (shown, *logs) if b"s3cr3t-t0ken" in text]
    assert not list(client.store.folder(job.id).glob("environment*")), (
        "Ray has the key, and the encrypted environment was not deleted"
    )


_PREEMPTED = """
import signal, sys, time
def stop(*_):
    time.sleep(3.5)
    print("checkpoint", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.slow(reason="starts a job")
def test_a_job_that_Ray_stops_has_time_for_its_checkpoint(
    client: Client, submit: Submit, run_code: RunCode, cluster: ray_cluster.Cluster
) -> None:
    """By default, Ray waits for 3 s."""
    run_code(_PREEMPTED)
    listening = submit()
    run_code("import time; print('ready', flush=True); time.sleep(60)")
    other = submit()
    for job in (listening, other):
        until(lambda job=job: "ready" in client.get_job_logs(job.id), "the job's first line")
        JobSubmissionClient(cluster.address).stop_job(f"mae-{job.id}")
    done = client.wait(listening.id, 40)
    assert client.get_job_logs(listening.id) == "ready\ncheckpoint\n"
    assert (done.status, done.exit_code) == ("CANCELED", 75)
    assert done.message.startswith("preempted: a job with results_dir=")
    assert done.message.endswith(" resumes from its checkpoint (exit code 75)")
    done = client.wait(other.id, 40)
    assert (done.status, done.message) == ("CANCELED", "interrupted by another program (exit code 130)")


@pytest.mark.slow(reason="starts a job")
def test_if_Rays_part_of_a_job_dies_no_process_is_left(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    job = submit()
    until(lambda: client.get_job_logs(job.id).endswith("\n"), "the job's line")
    process = identify(int(client.get_job_logs(job.id)))
    runners = [
        path.parent
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists() and path.read_bytes().split(b"\0")[-2:-1] == [job.id.encode()]
    ]
    assert len(runners) == 2, "one in Ray's process group, and one that supervises the job"
    first = min(runners, key=lambda path: int(path.name))
    os.kill(int((first / "stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    until(lambda: not is_running(process), "the job's end")
    done = client.wait(job.id, 40)
    assert (done.status, done.exit_code) == ("ERROR", None)
    assert done.message.startswith(f"Ray job mae-{job.id}: FAILED: Job supervisor actor died")


def test_a_root_that_the_node_does_not_see_is_reported(
    client: Client, submit: Submit, run_code: RunCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_code("pass")
    moved = client.store.root.with_name("elsewhere")
    ask = RayPlatform._ask

    def hide(self: RayPlatform, question: Any) -> Any:
        client.store.root.rename(moved)
        try:
            answer = ask(self, question)
            if answer and str(answer).startswith("mae-"):
                until(lambda: ask(self, lambda ray: ray.get_job_status(answer).is_terminal()), "the job's end")
            return answer
        finally:
            moved.rename(client.store.root)

    monkeypatch.setattr(RayPlatform, "_ask", hide)
    job = submit()
    monkeypatch.setattr(RayPlatform, "_ask", ask)
    done = client.wait(job.id, 40)
    assert (done.status, done.exit_code) == ("ERROR", 125)
    assert f"The job could not start: {client.store.folder(job.id)} cannot be seen on " in done.message


def test_a_job_that_Ray_no_longer_knows_is_an_error(
    client: Client, submit: Submit, run_code: RunCode, cluster: ray_cluster.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_code("pass")
    record = client.store.read(client.wait(submit().id, 40).id)
    record = replace(record, id="a" * 32, transitions=record.transitions[:1], exit_code=None)
    client.store.create(record)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address.replace("127.0.0.1", "localhost"))
    seen = client.get_job_status("a" * 32)
    assert seen.status == "UNKNOWN"
    assert seen.message.startswith(
        f"it was submitted to the Ray cluster at {cluster.address}, not at http://localhost:"
    )
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    seen = client.get_job_status("a" * 32)
    assert (seen.status, seen.message) == (
        "ERROR",
        f"Ray no longer knows mae-{'a' * 32}, as after a restart",
    )
    gone: Identity = {"pid": 1, "start": 1, "boot": ""}
    client.store.create(replace(record, id="c" * 32, handle=Handle(), submitter=gone))
    seen = client.get_job_status("c" * 32)
    assert (seen.status, seen.message) == ("ERROR", "the client died before the job was submitted to Ray")


def test_a_cluster_that_cannot_be_reached(
    client: Client, submit: Submit, run_code: RunCode, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_code(SLEEP)
    job = submit()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with monkeypatch.context() as patch:
            patch.setenv("RAY_ADDRESS", address)
            patch.setattr("openmae.jobs.platforms.ray._PATIENCE", 0.5)
            seen = Client("ray", client.store.root).get_job_status(job.id)
            assert (seen.status, seen.message) == (
                "UNKNOWN",
                f"platform: the Ray cluster at {address} did not answer within 0.5 s.",
            )
    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", address)
        with pytest.raises(
            RunError, match=rf"there is no Ray cluster at {address}\.\n  Fix: Start a cluster with `ray start --head`"
        ):
            Client("ray", tmp_path / "others").create_job(
                "train", spec_overrides={"dataset.train_data_sources": str(images / "train")}
            )
    client.cancel_job(job.id)
    assert client.wait(job.id, 40).status == "CANCELED"


def test_without_the_package_it_is_refused(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.job_submission", None)
    with pytest.raises(SpecError, match=r"platform: ray needs the package ray\.\n  Fix: pip install 'openmae\[ray\]'"):
        Client("ray", tmp_path / "jobs").create_job(
            "train", spec_overrides={"dataset.train_data_sources": str(images / "train")}
        )


def test_other_commands_do_not_import_it() -> None:
    code = "import sys; from openmae.jobs import Client; import openmae.cli.main; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.slow(reason="restarts the cluster")
def test_a_restarted_cluster_no_longer_knows_its_jobs(
    client: Client, submit: Submit, run_code: RunCode, cluster: ray_cluster.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_code("print('done')")
    done = submit()
    until((client.store.folder(done.id) / "exit_code").exists, "the first job's end")
    run_code(SLEEP)
    lost = submit()
    until(lambda: client.get_job_status(lost.id).status == "RUNNING", "the second job's start")
    cluster.stop()
    seen = Client("ray", client.store.root).get_job_status(lost.id)
    assert (seen.status, seen.message) == ("UNKNOWN", f"platform: there is no Ray cluster at {cluster.address}.")
    assert client.get_job_status(done.id).status == "COMPLETE"
    cluster.start()
    seen = client.wait(lost.id, 20)
    assert seen.status == "ERROR"
    assert seen.message == f"Ray no longer knows mae-{lost.id}, as after a restart"
    run_code("print('again')")
    assert client.wait(submit().id, 40).status == "COMPLETE"
