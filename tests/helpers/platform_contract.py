"""Tests that every platform must pass: subclass the contract and define ``client`` and ``capacity``."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from openmae.jobs import Client, Job
from openmae.jobs.job import FINAL, STATES, Handle

RunCode = Callable[[str], None]
Submit = Callable[..., Job]
SLEEP = "import time; time.sleep(60)"
_CHILD = """
import os, signal, sys
import openmae.jobs.client as module
import openmae.jobs.prepare as prepare
prepare.command_of = lambda action, spec: [sys.executable, "-c", "import time; time.sleep(0.5); print('survived')"]
client = module.Client(sys.argv[1], sys.argv[2])
print(client.create_job("train", None, {"dataset.train_data_sources": sys.argv[3]}, automl_policy="off").id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def until(ready: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """Wait until ``ready`` returns a true value, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := ready()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        time.sleep(0.02)
    return value


class PlatformContract:
    """Tests of a platform that runs ``capacity`` jobs at the same time."""

    capacity: ClassVar[int]

    def test_a_job_runs_to_its_end(self, client: Client, submit: Submit, run_code: RunCode) -> None:
        run_code("print('hello from the job')")
        job = submit(name="first")
        assert job.status in STATES
        done = client.wait(job.id, 30)
        states = [transition.state for transition in done.transitions]
        assert (done.status, done.exit_code, done.name) == ("COMPLETE", 0, "first")
        assert states in (["PENDING", "RUNNING", "COMPLETE"], ["PENDING", "COMPLETE"]), states
        assert client.get_job_logs(job.id) == "hello from the job\n"
        assert client.get_failure_analysis(job.id) is None

    def test_an_exit_code_is_kept(self, client: Client, submit: Submit, run_code: RunCode) -> None:
        run_code("import sys; print('SpecError: no'); sys.exit(2)")
        done = client.wait(submit().id, 30)
        assert (done.status, done.exit_code) == ("ERROR", 2)
        assert "the request was invalid" in done.message
        failure = client.get_failure_analysis(done.id)
        assert failure is not None
        assert (failure.category, failure.error, failure.exit_code) == ("spec", "SpecError: no", 2)

    def test_a_canceled_job_can_write_its_checkpoint(
        self, client: Client, submit: Submit, run_code: RunCode, tmp_path: Path
    ) -> None:
        run_code(
            f"import time, pathlib\nprint('ready', flush=True)\ntry: time.sleep(60)\n"
            f"except KeyboardInterrupt: pathlib.Path({str(tmp_path / 'checkpoint')!r}).touch(); raise SystemExit(130)"
        )
        job = submit()
        until(lambda: "ready" in client.get_job_logs(job.id), "the job's first line")
        client.cancel_job(job.id)
        done = client.wait(job.id, 30)
        assert done.status == "CANCELED", done
        assert (tmp_path / "checkpoint").exists(), "the job received no SIGINT"

    def test_a_job_that_ignores_signals_is_killed(self, client: Client, submit: Submit, run_code: RunCode) -> None:
        run_code(
            "import signal, time\nfor n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, signal.SIG_IGN)\n"
            "print('ready', flush=True); time.sleep(300)"
        )
        job = submit()
        until(lambda: "ready" in client.get_job_logs(job.id), "the job's first line")
        client.cancel_job(job.id)
        assert client.wait(job.id, 40).status == "CANCELED"

    def test_jobs_wait_for_their_turn_and_can_be_canceled_while_they_wait(
        self, client: Client, submit: Submit, run_code: RunCode
    ) -> None:
        run_code(SLEEP)
        first = [submit() for _ in range(self.capacity)]
        for job in first:
            until(lambda job=job: client.get_job_status(job.id).status == "RUNNING", "the first jobs' start")
        run_code("print('started')")
        waiting, unwanted = submit(), submit()
        assert client.get_job_status(waiting.id).status == "PENDING"
        assert client.cancel_job(unwanted.id).status == "CANCELED"
        assert client.get_job_logs(unwanted.id) == ""
        client.cancel_job(first[0].id)
        assert client.wait(waiting.id, 40).status == "COMPLETE"
        for job in first:
            client.cancel_job(job.id)
            client.wait(job.id, 40)

    def test_a_job_outlives_a_killed_client(self, client: Client, images: Path) -> None:
        arguments = [client.platform, str(client.store.root), str(images / "train")]
        killed = subprocess.run(
            [sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True, check=False, timeout=60
        )
        assert killed.returncode == -9, killed.stderr
        job = client.wait(killed.stdout.strip(), 30)
        assert job.status == "COMPLETE", job
        assert client.get_job_logs(job.id) == "survived\n"

    def test_secrets_reach_only_the_job(self, client: Client, submit: Submit, run_code: RunCode) -> None:
        run_code(
            "import os, time; e = os.environ\n"
            "print(e['TOKEN'][::-1], e['OPENMAE_ENCRYPTION_KEY'][::-1], flush=True); time.sleep(60)"
        )
        job = submit(env_vars={"TOKEN": "s3cr3t-t0ken"}, spec_overrides={"encryption_key": "lit3ral-k3y"})
        until(lambda: "\n" in client.get_job_logs(job.id), "the job's line")
        assert client.get_job_logs(job.id) == "nek0t-t3rc3s y3k-lar3til\n", "the job did not get its variables"
        shown = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        written = [path.read_bytes() for path in client.store.root.rglob("*") if path.is_file()]
        for text in (*shown, *written, str(client.explain_job(job.id)).encode(), repr(job).encode()):
            assert b"s3cr3t-t0ken" not in text
            assert b"lit3ral-k3y" not in text
        record = client.store.read(job.id)
        assert record.spec["encryption_key"] == "***"
        assert record.env_vars == ["TOKEN"]
        assert "A literal encryption_key is never stored: child jobs need it again." in job.notices[0]
        client.cancel_job(job.id)
        assert client.wait(job.id, 40).status in FINAL

    def test_more_nodes_than_the_platform_has_are_refused(self, client: Client, submit: Submit) -> None:
        with pytest.raises(ValueError, match=r"num_nodes"):
            submit(num_nodes=64)
        assert client.list_jobs() == []


class ClusterContract(PlatformContract):
    """Tests of a platform with a job system of its own."""

    def test_a_job_whose_client_died_after_the_submission_is_found_by_name(
        self, client: Client, submit: Submit, run_code: RunCode
    ) -> None:
        run_code(SLEEP)
        job = submit()
        with client.store.update(job.id) as record:
            assert record.submitter is not None
            record.handle, record.submitter = Handle(), {**record.submitter, "start": 1}
        until(lambda: client.get_job_status(job.id).status == "RUNNING", "its state RUNNING")
        client.cancel_job(job.id)
        assert client.wait(job.id, 40).status == "CANCELED"
