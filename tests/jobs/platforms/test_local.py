"""Jobs on this machine: the contract of platforms, and killed, stopped and foreign processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.job_records import make_record
from tests.helpers.platform_contract import PlatformContract, RunCode, Submit, until

from openmae.errors import RunError, SpecError
from openmae.jobs import Client, Job, processes, store
from openmae.jobs.job import Handle, State
from openmae.jobs.platforms.local.queue import Machine, Queue
from openmae.jobs.processes import session_members
from openmae.jobs.store import locked
from openmae.machine import identify, is_running, is_stopped

_SUBMITTER = """
import sys
import openmae.jobs.client as module
import openmae.jobs.prepare as prepare
code = f"import os, time; f = {sys.argv[3]!r}; os.close(os.open(f, os.O_CREAT | os.O_EXCL)); time.sleep(.05)"
code += "; os.remove(f)"
prepare.command_of = lambda action, spec: [sys.executable, "-c", code]
for _ in range(2):
    client = module.Client("local", sys.argv[1])
    client.create_job("train", None, {"dataset.train_data_sources": sys.argv[2]}, automl_policy="off")
"""
SLEEP = "import time; print('ready', flush=True); time.sleep(60)"


class TestLocal(PlatformContract):
    capacity = 1


def _process(client: Client, job: Job, which: str) -> dict[str, Any]:
    return until(lambda: getattr(client.store.read(job.id).handle, which), f"the record of the {which}")


def _kill(identity: dict[str, Any]) -> None:
    os.kill(identity["pid"], signal.SIGKILL)
    until(lambda: not is_running(identity), "the death of a killed process")


def _stop(identity: dict[str, Any]) -> None:
    os.kill(identity["pid"], signal.SIGSTOP)
    until(lambda: is_stopped(identity), "the stop of a process")


def _running(client: Client, job: Job) -> dict[str, Any]:
    """Return the job's process once it has printed its first line."""
    until(lambda: "ready" in client.get_job_logs(job.id), "the job's first line")
    return _process(client, job, "process")


def _status_writer(last: str) -> str:
    """Return Python code that writes the status.json of a run."""
    return f"""
import json, os, sys, time, pathlib, yaml
from datetime import datetime
root = pathlib.Path(os.environ["WHERE"])
root.mkdir(parents=True)
now = datetime.now()
line = {{"date": f"{{now.month}}/{{now.day}}/{{now.year}}", "time": f"{{now.hour}}:{{now.minute}}:{{now.second}}"}}
for status in ("STARTED", {last!r}):
    with (root / "status.json").open("a") as file:
        file.write(json.dumps(line | {{"status": status, "message": "DataError: an image is damaged"}}) + "\\n")
print("written", flush=True)
time.sleep(1)
"""


def test_canceling_a_job_that_has_ended_has_no_effect(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code("pass")
    done = client.wait(submit().id, 30)
    assert client.cancel_job(done.id) == done


def test_a_log_can_be_followed(client: Client, submit: Submit, run_code: RunCode, tmp_path: Path) -> None:
    go = tmp_path / "go"
    run_code(
        f"import os, time\nprint('one', flush=True)\nwhile not os.path.exists({str(go)!r}): time.sleep(.02)\n"
        "print('two'); print('three', end='')"
    )
    job = submit()
    lines = client.get_job_logs(job.id, follow=True)
    assert next(lines) == "one"
    until(lambda: client.get_job_status(job.id).status == "RUNNING", "the line before the job's end")
    go.touch()
    assert list(lines) == ["two", "three"]
    assert client.get_job_logs(job.id, tail=2) == "two\nthree"
    assert list(client.get_job_logs(job.id, 1, follow=True)) == ["three"]


@pytest.mark.parametrize(("last", "state"), [("SUCCESS", "COMPLETE"), ("FAILURE", "ERROR"), ("RUNNING", "ERROR")])
def test_without_its_supervisor_the_outcome_comes_from_status_json(
    client: Client, submit: Submit, run_code: RunCode, tmp_path: Path, last: str, state: str
) -> None:
    run_code(_status_writer(last))
    results = tmp_path / "results"
    job = submit(env_vars={"WHERE": str(results / "train")}, spec_overrides={"results_dir": str(results)})
    until(lambda: "written" in client.get_job_logs(job.id), "the job's line")
    _kill(_process(client, job, "supervisor"))
    assert client.get_job_status(job.id).status == "RUNNING", "the job itself was not killed"
    done = client.wait(job.id, 30)
    assert done.status == state, done
    assert "supervisor" in done.message
    if last == "FAILURE":
        failure = client.get_failure_analysis(job.id)
        assert failure is not None
        assert (failure.category, failure.evidence) == ("data", "status.json")


def test_the_success_of_an_earlier_run_is_ignored(
    client: Client, submit: Submit, run_code: RunCode, tmp_path: Path
) -> None:
    run_code(SLEEP)
    folder = tmp_path / "results" / "train"
    folder.mkdir(parents=True)
    old = {"date": "1/2/2020", "time": "3:4:5", "status": "SUCCESS", "message": "train finished"}
    (folder / "status.json").write_text(json.dumps(old) + "\n", encoding="utf-8")
    os.utime(folder / "status.json", (1.6e9, 1.6e9))
    job = submit(spec_overrides={"results_dir": str(tmp_path / "results")})
    process = _running(client, job)
    _kill(_process(client, job, "supervisor"))
    _kill(process)
    assert client.get_job_status(job.id).status == "ERROR"


def test_a_killed_job_is_an_error_of_memory(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code(SLEEP)
    job = submit()
    _kill(_process(client, job, "process"))
    done = client.wait(job.id, 20)
    assert (done.status, done.exit_code) == ("ERROR", -9)
    assert "SIGKILL" in done.message
    failure = client.get_failure_analysis(job.id)
    assert failure is not None
    assert failure.category == "out of memory"
    assert "batch_size" in failure.suggestions[0]


def test_a_supervisor_killed_in_the_queue_leaves_an_error(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code(SLEEP)
    first, waiting = submit(), submit()
    _kill(_process(client, waiting, "supervisor"))
    done = client.get_job_status(waiting.id)
    assert done.status == "ERROR"
    assert done.message == "its supervisor was killed before the job was started"
    third = submit()
    client.cancel_job(first.id)
    until(lambda: client.get_job_status(third.id).status == "RUNNING", "the start of the job after the dead one")
    client.cancel_job(third.id)
    client.wait(third.id, 20)


def test_a_job_without_its_supervisor_can_be_canceled(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code(SLEEP)
    job = submit()
    process = _running(client, job)
    _kill(_process(client, job, "supervisor"))
    assert client.cancel_job(job.id).status == "CANCELED"
    assert not is_running(process)


def test_a_job_without_its_supervisor_keeps_its_slot(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code(SLEEP)
    job = submit()
    process = _running(client, job)
    _kill(_process(client, job, "supervisor"))
    run_code("pass")
    waiting = submit()
    until(lambda: (client.store.root / ".queue" / f"{waiting.id}.json").exists(), "the entry in the queue")
    assert client.get_job_status(waiting.id).status == "PENDING"
    _kill(process)
    assert client.wait(waiting.id, 20).status == "COMPLETE"


def test_another_process_with_the_same_id_is_not_the_job(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code(SLEEP)
    job = submit()
    process, supervisor = _running(client, job), _process(client, job, "supervisor")
    _kill(supervisor)
    _kill(process)
    me = identify(os.getpid())
    assert me is not None
    with client.store.update(job.id) as record:  # as if this process had got both ids
        again = {**me, "start": me["start"] - 1000}
        record.handle = Handle(again, again)
    assert client.get_job_status(job.id).status == "ERROR"
    assert session_members({**me, "start": me["start"] - 1000}) == []
    assert is_running(me)
    assert not is_running({**me, "boot": "another"})


def test_canceling_ends_processes_that_left_the_group(
    client: Client, submit: Submit, run_code: RunCode, tmp_path: Path
) -> None:
    child = (
        f"import os, time; os.setpgrp(); open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    run_code(f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)")
    job = submit()
    pid = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the worker"))
    worker = identify(pid)
    client.cancel_job(job.id)
    assert client.wait(job.id, 20).status == "CANCELED"
    until(lambda: not is_running(worker), "the worker's end")


def test_jobs_share_gpus(client: Client, submit: Submit, run_code: RunCode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    run_code("import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(60)")
    jobs = [submit(gpu_count=count) for count in (1, 1, 2, 0)]
    one, two, both, none = jobs
    for job in (one, two):
        until(lambda job=job: client.get_job_logs(job.id), "two jobs at once")
    assert {client.get_job_logs(job.id) for job in (one, two)} == {"4\n", "6\n"}
    assert client.get_job_status(none.id).status == "PENDING", "a younger job started before an older one"
    assert client.get_job_status(both.id).status == "PENDING"
    client.cancel_job(one.id)
    client.cancel_job(two.id)
    until(lambda: client.get_job_logs(both.id) == "4,6\n", "the job on both GPUs")
    until(lambda: client.get_job_logs(none.id) == "\n", "the job without a GPU beside it")
    for job in (both, none):
        client.cancel_job(job.id)
        client.wait(job.id, 20)


def test_many_clients_share_one_slot(client: Client, images: Path, tmp_path: Path) -> None:
    """Each job fails if another one runs at the same time."""
    arguments = [str(client.store.root), str(images / "train"), str(tmp_path / "only one")]
    clients = [subprocess.Popen([sys.executable, "-c", _SUBMITTER, *arguments]) for _ in range(3)]
    assert [one.wait(timeout=60) for one in clients] == [0, 0, 0]
    done = [client.wait(job.id, 30) for job in client.list_jobs()]
    assert [job.status for job in done] == ["COMPLETE"] * 6, [client.get_job_logs(job.id) for job in done]
    starts = [transition.at for job in done for transition in job.transitions if transition.state == "RUNNING"]
    assert len(starts) == 6


def test_what_the_machine_does_not_have_is_refused(
    client: Client, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(SpecError, match=r"gpu_count: 3 GPUs are requested, but this machine has 2\.\n  Fix: Request 2"):
        submit(gpu_count=3)
    with pytest.raises(
        SpecError, match=r"train.gpu_ids: a platform numbers the GPUs that it gives to a job from 0, got 1"
    ):
        submit(spec_overrides={"train.gpu_ids": [1]})
    with monkeypatch.context() as patch:
        patch.setenv("OPENMAE_JOB_SLOTS", "many")
        with pytest.raises(SpecError, match=r"OPENMAE_JOB_SLOTS must be a number of jobs, 1 or more, got 'many'"):
            submit()
    for grace in ("a minute", "-1", "nan"):
        monkeypatch.setenv("OPENMAE_JOB_GRACE", grace)
        with pytest.raises(
            SpecError, match=rf"OPENMAE_JOB_GRACE must be a number of seconds, 0 or more, got '{grace}'"
        ):
            submit()
    assert client.list_jobs() == []


def test_a_job_of_another_machine_is_unknown_here(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code(SLEEP)
    job = submit()
    _process(client, job, "process")
    here = client.store.read(job.id).host
    with client.store.update(job.id) as record:
        record.host = "elsewhere"
    seen = client.get_job_status(job.id)
    assert (seen.status, seen.message) == (
        "UNKNOWN",
        "its processes are on elsewhere, which cannot be seen from this machine",
    )
    assert client.store.read(job.id).state == "RUNNING", "the unknown state was recorded"
    with client.store.update(job.id) as record:
        record.host = here
    client.cancel_job(job.id)
    client.wait(job.id, 20)


def test_a_job_of_a_platform_that_is_missing_here_is_not_canceled(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    record = make_record("a" * 32, ("PENDING", "RUNNING"), platform="slurm")
    client.store.create(record)
    with pytest.raises(
        RunError, match=rf"Job {record.id} cannot be canceled from this machine\. .*sbatch, squeue, .*\n  Fix: Install"
    ):
        client.cancel_job(record.id)
    assert client.get_job_status(record.id).status == "UNKNOWN"
    assert client.store.read(record.id).cancel_requested, "a Ray job finds the request there"


def test_a_client_killed_before_the_start_leaves_an_error(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code("pass")
    done = client.wait(submit().id, 20)
    record = client.store.read(done.id)
    assert record.submitter is not None
    client.store.create(make_record("a" * 32, submitter={**record.submitter, "start": 1}))
    assert client.get_job_status("a" * 32).message == "the client died before the job was started"


def test_a_client_that_ignores_sigint_starts_jobs_that_do_not(
    client: Client, submit: Submit, run_code: RunCode
) -> None:
    run_code("import time; print('ready', flush=True); time.sleep(60)")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        job = submit()
    finally:
        signal.signal(signal.SIGINT, before)
    until(lambda: "ready" in client.get_job_logs(job.id), "the job's first line")
    client.cancel_job(job.id)
    done = client.wait(job.id, 20)
    assert (done.status, done.exit_code) == ("CANCELED", -signal.SIGINT), "the job ignored SIGINT"


def test_a_job_killed_before_its_first_instruction_has_its_exit_code(
    client: Client, submit: Submit, run_code: RunCode, tmp_path: Path
) -> None:
    """The supervisor then writes to a pipe that nobody reads."""
    run_code("pass")
    code = (
        "import os, signal, sys\nfrom openmae.jobs.platforms.local import supervisor\n"
        "started = supervisor.Queue.started\n"
        "def kill(self, job_id, process):\n    os.kill(process['pid'], signal.SIGKILL)\n"
        "    started(self, job_id, process)\n    import time; time.sleep(0.2)\n"
        "supervisor.Queue.started = kill\nsupervisor.main(*sys.argv[1:])\n"
    )
    done = client.wait(submit().id, 20)
    record = client.store.read(done.id)
    client.store.create(make_record("a" * 32, command=record.command, cwd=record.cwd))
    subprocess.run([sys.executable, "-c", code, str(client.store.root), "a" * 32], check=True, timeout=20)
    assert client.get_job_status("a" * 32).exit_code == -9


def test_a_preempted_job_reports_that_it_can_be_resumed(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code("raise SystemExit(75)")
    done = client.wait(submit().id, 20)
    assert (done.status, done.exit_code) == ("CANCELED", 75)
    assert done.message.startswith("preempted: a job with results_dir=")
    assert done.message.endswith(" resumes from its checkpoint (exit code 75)")


def test_a_job_whose_folder_is_deleted_is_stopped(
    client: Client, submit: Submit, run_code: RunCode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "hears").touch()
    run_code(
        "import os, signal, time\n"
        f"signal.signal(signal.SIGINT, lambda *_: os.remove({str(tmp_path / 'hears')!r}))\n"
        "print('ready', flush=True)\nwhile True: time.sleep(0.1)"
    )
    job = submit()
    process, supervisor = _running(client, job), _process(client, job, "supervisor")
    shutil.rmtree(client.store.folder(job.id))
    assert client.list_jobs() == []
    assert f"The folder of job {job.id} was deleted while it ran." in caplog.text
    assert str(process["pid"]) in caplog.text
    until(lambda: not is_running(process), "the end of the job")
    assert not (tmp_path / "hears").exists(), "the job received no SIGINT"
    until(lambda: not is_running(supervisor), "the end of the supervisor")
    run_code("pass")
    assert client.wait(submit().id, 20).status == "COMPLETE", "the deleted job kept its slot"
    with pytest.raises(SpecError, match="There is no job"):
        client.cancel_job(job.id)


def test_a_stopped_supervisor_is_continued_to_cancel_its_job(
    client: Client, submit: Submit, run_code: RunCode, caplog: pytest.LogCaptureFixture
) -> None:
    run_code(SLEEP)
    job = submit()
    process, supervisor = _running(client, job), _process(client, job, "supervisor")
    _stop(supervisor)
    client.cancel_job(job.id)
    assert f"The supervisor of job {job.id} (process {supervisor['pid']}) was stopped" in caplog.text
    assert client.wait(job.id, 20).status == "CANCELED"
    assert not is_running(process)


def test_a_stopped_supervisor_that_holds_the_lock_keeps_no_job_running(
    client: Client, submit: Submit, run_code: RunCode, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_code(SLEEP)
    job = submit()
    process = _running(client, job)
    monkeypatch.setattr("openmae.jobs.store.PATIENCE", 0.2)
    with locked(client.store.folder(job.id) / ".lock"):
        client.cancel_job(job.id)
    assert "could not be recorded; it is stopped anyway" in caplog.text
    assert "Another process has held the lock" in caplog.text
    assert not is_running(process)
    done = client.wait(job.id, 20)
    assert (done.status, done.exit_code) == ("CANCELED", -signal.SIGINT)


def test_a_supervisor_that_does_not_respond_is_killed_with_its_job(
    client: Client, submit: Submit, run_code: RunCode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_code(SLEEP)
    job = submit()
    process, supervisor = _running(client, job), _process(client, job, "supervisor")
    monkeypatch.setattr("openmae.jobs.platforms.local.platform.is_stopped", lambda identity: False)
    _stop(supervisor)
    assert client.cancel_job(job.id).status == "RUNNING", "it was killed within the grace period"
    monkeypatch.setattr("openmae.jobs.platforms.local.platform._LAST_SIGNALS", -1.0)
    done = client.wait(job.id, 20)
    assert done.status == "CANCELED"
    assert f"The supervisor of job {job.id} (process {supervisor['pid']}) did not respond within" in caplog.text
    until(lambda: not is_running(supervisor), "the killed supervisor to end")
    until(lambda: not is_running(process), "the end of the job")


def test_a_stopped_job_is_continued_to_be_canceled(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code(SLEEP)
    job = submit()
    _stop(_running(client, job))
    client.cancel_job(job.id)
    done = client.wait(job.id, 20)
    assert (done.status, done.exit_code) == ("CANCELED", -signal.SIGINT), "it had to be killed"


def test_a_stopped_supervisor_blocks_no_other_job(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code(SLEEP)
    first = submit()
    _running(client, first)
    waiting = submit()
    supervisor = _process(client, waiting, "supervisor")
    until(lambda: (client.store.root / ".queue" / f"{waiting.id}.json").exists(), "the entry in the queue")
    with locked(client.store.root / ".queue" / ".lock"):  # so that it does not hold the lock when it is stopped
        _stop(supervisor)
    run_code("pass")
    third = submit()
    client.cancel_job(first.id)
    assert client.wait(third.id, 20).status == "COMPLETE"
    assert client.cancel_job(waiting.id).status == "CANCELED"
    until(lambda: not is_running(supervisor), "the end of its supervisor")


def test_a_lock_that_a_stopped_process_holds_fails_no_waiting_job(
    client: Client, submit: Submit, run_code: RunCode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "PATIENCE", 0.05)
    queue = Queue(client.store, Machine((), 1))
    client.store.create(make_record("7f", handle=Handle(identify(os.getpid()))))
    queue.folder.mkdir()
    with locked(client.store.root / ".queue" / ".lock"):
        assert queue.claim("7f") is None
    assert "Another process has held the lock" in caplog.text
    assert queue.claim("7f") == []


def test_many_dead_jobs_are_checked_with_one_look_at_the_processes(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = identify(os.getpid())
    assert me is not None
    dead = {**me, "start": me["start"] - 1000}
    for number in range(30):
        states: tuple[State, ...] = ("PENDING", "RUNNING")
        client.store.create(make_record(f"{number:032x}", states, submitter=dead, handle=Handle(dead, dead)))
    looks = []
    monkeypatch.setattr(
        "openmae.jobs.platforms.local.platform.living_sessions", lambda: looks.append(1) or processes.living_sessions()
    )
    monkeypatch.setattr("openmae.jobs.platforms.common._FRESH", 60.0)
    assert [job.status for job in client.list_jobs()] == ["ERROR"] * 30
    assert len(looks) <= 1, "the processes were listed for each job"
    assert [record.state for record in client.store.records()] == ["ERROR"] * 30
