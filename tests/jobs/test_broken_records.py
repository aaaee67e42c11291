"""Records and queue files that are damaged, foreign or newer: each is named, and no other job is affected."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.helpers.platform_contract import Submit, Tiny, until

from openmae.cli.main import main
from openmae.errors import RunError, SpecError
from openmae.jobs import Client, Job
from openmae.jobs.job import as_job, checked, now
from openmae.jobs.platforms.local.queue import Machine, Queue
from openmae.jobs.processes import identify
from openmae.jobs.store import JobStore

_OTHER = "0a1b2c3d-0000-4000-8000-000000000001"
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def job(client: Client) -> Job:
    """One that has ended."""
    times = [{"at": now(), "state": state, "message": "told"} for state in ("PENDING", "RUNNING", "COMPLETE")]
    record = {
        **{"version": 1, "id": "f" * 32, "action": "train", "name": "train", "platform": "local", "host": "here"},
        **{"created_at": now(), "parent_job_id": None, "results_dir": "r", "results_folder": "r", "exit_code": 0},
        **{"notices": [], "handle": {}, "submitter": None, "own_results": True, "cancel_requested": None},
        **{"processes": 1, "transitions": times},
    }
    client.store.create(record)
    return client.get_job_status("f" * 32)


def _write(client: Client, job_id: str, text: str | bytes) -> Path:
    folder = client.store.folder(job_id)
    folder.mkdir(exist_ok=True)
    (folder / "job.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / "job.json"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "it has no id, action, name, platform, created_at"),
        ("[]", "it is no JSON object but a list"),
        ("null", "it is no JSON object but null"),
        ("", "Expecting value"),
        ("[" * 100_000, "it is nested too deeply"),
        (b"\xff\xfe", "codec can't decode"),
        ({"version": 2}, r"a newer version of OpenMAE wrote it \(record version 2, this one reads 1\)"),
        ({"version": "1"}, "version must be an integer, but is a text"),
        ({"id": _OTHER[:-1] + "2"}, r"it is the record of job 0a1b.*2, but stands in the folder of 0a1b.*1"),
        ({"transitions": []}, "transitions is empty"),
        ({"transitions": [1]}, "a transition must be an object, but is an integer"),
        ({"transitions": [{"at": "today", "state": "PENDING", "message": ""}]}, "'today' is no date and time"),
        ({"transitions": [{"at": "2026-01-01", "state": "DONE", "message": ""}]}, "there is no state 'DONE'"),
        ({"handle": {"supervisor": {"pid": "1"}}}, "pid of supervisor in handle must be an integer, but is a text"),
        ({"handle": {"process": 1}}, "process in handle must be an object, but is an integer"),
        ({"created_at": 5}, "created_at must be a text, but is an integer"),
        ({"exit_code": True}, "exit_code must be an integer or null, but is true or false"),
        ({"submitter": []}, "submitter must be an object or null, but is a list"),
    ],
)
def test_a_broken_record_is_named_and_affects_no_other_job(
    client: Client, job: Job, text: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(text, dict):
        text = json.dumps({**client.store.read(job.id), "id": _OTHER, **text})
    path = _write(client, _OTHER, text)
    assert main(["jobs", "list", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [item["id"] for item in json.loads(out)] == [job.id]
    assert f"The record {path} cannot be read (" in err
    with pytest.raises(RunError, match=rf"The record {path} cannot be read \(.*{reason}"):
        client.get_job_status(_OTHER)
    assert client.get_job_status(job.id).status == "COMPLETE"
    assert main(["jobs", "cancel", _OTHER]) == 1
    assert "Other jobs are not affected." in capsys.readouterr().err


def test_a_record_of_another_job_does_not_overwrite_it(client: Client, submit: Submit, tiny: Tiny) -> None:
    tiny("import time; time.sleep(60)")
    running = submit()
    before = client.store.read(running.id)
    _write(client, _OTHER, json.dumps({**before, "handle": {}, "submitter": None}))
    assert [one.id for one in client.list_jobs()] == [running.id]
    with pytest.raises(RunError, match="it is the record of job"):
        client.cancel_job(_OTHER)
    assert client.get_job_status(running.id).status in ("PENDING", "RUNNING")
    client.cancel_job(running.id)
    client.wait(running.id, 20)


def test_fields_of_a_later_version_are_kept(client: Client, job: Job) -> None:
    record = client.store.read(job.id)
    record["transitions"][0]["by"] = record["host_name"] = "somebody"
    _write(client, job.id, json.dumps(record))
    assert client.get_job_status(job.id) == job
    with client.store.update(job.id):
        pass
    assert client.store.read(job.id)["host_name"] == "somebody"


def test_a_record_of_an_early_version_is_shown(client: Client, job: Job) -> None:
    record = client.store.read(job.id)
    early = ("version", "host", "handle", "submitter", "own_results", "cancel_requested", "processes")
    _write(client, job.id, json.dumps({name: value for name, value in record.items() if name not in early}))
    assert client.get_job_status(job.id) == job


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/nowhere", path)])
def test_a_record_that_is_no_file_does_not_hang(client: Client, job: Job, make: Callable[[Path], None]) -> None:
    client.store.folder(_OTHER).mkdir()
    make(client.store.folder(_OTHER) / "job.json")
    assert [one.id for one in client.list_jobs()] == [job.id]
    with pytest.raises((RunError, SpecError)):
        client.get_job_status(_OTHER)


def test_a_copy_of_a_jobs_folder_is_no_job(client: Client, job: Job, caplog: pytest.LogCaptureFixture) -> None:
    copy = client.store.root / "copy of a job"
    copy.mkdir()
    (copy / "job.json").write_text(json.dumps(client.store.read(job.id)))
    assert [one.id for one in client.list_jobs()] == [job.id]
    assert f"{copy / 'job.json'} is no job: the name of its folder is no id." in caplog.text


def test_a_name_that_no_terminal_can_print_is_listed(
    client: Client, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(client, job.id, json.dumps({**client.store.read(job.id), "name": "a\udcff", "results_folder": "/\udc80"}))
    assert main(["jobs", "list"]) == 0
    assert main(["jobs", "status", job.id]) == 0
    capsys.readouterr().out.encode()


@given(value=_JSON, name=st.sampled_from(["version", "id", "handle", "transitions", "submitter", "notices", "host"]))
def test_whatever_a_field_holds_is_refused_or_shown(value: Any, name: str) -> None:
    transition = {"at": "2026-01-01T00:00:00+00:00", "state": "RUNNING", "message": ""}
    record = {
        **{"id": _OTHER, "action": "train", "name": "train", "platform": "local", "parent_job_id": None},
        **{"created_at": "2026-01-01", "results_dir": "r", "results_folder": "r", "exit_code": None, "notices": []},
        "transitions": [transition],
        name: value,
    }
    with suppress(ValueError):
        assert as_job(checked(record, _OTHER)).id == _OTHER


class TestQueue:
    @pytest.fixture
    def queue(self, client: Client) -> Queue:
        return Queue(client.store, Machine((), 1))

    @pytest.mark.parametrize("text", ["{}", "[", "null", '{"id": 3}', "[" * 100_000])
    def test_a_broken_entry_holds_up_no_job(
        self, client: Client, submit: Submit, tiny: Tiny, queue: Queue, text: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        queue.folder.mkdir(exist_ok=True)
        (queue.folder / f"{_OTHER}.json").write_text(text)
        tiny("pass")
        done = client.wait(submit().id, 20)
        assert done.status == "COMPLETE", client.get_job_logs(done.id)
        assert (queue.folder / f"{_OTHER}.broken").exists()
        assert f"The entry {queue.folder / _OTHER}.json of the queue cannot be read" in client.get_job_logs(done.id)

    def test_a_broken_entry_of_a_running_job_keeps_its_slot(
        self, client: Client, submit: Submit, tiny: Tiny, queue: Queue
    ) -> None:
        tiny("import time; print('ready', flush=True); time.sleep(60)")
        first = submit()
        until(lambda: "ready" in client.get_job_logs(first.id), "the job's first line")
        (queue.folder / f"{first.id}.json").write_text("{}")
        tiny("pass")
        second = submit()
        until(lambda: (queue.folder / f"{second.id}.json").exists(), "the second job's entry")
        until(lambda: json.loads((queue.folder / f"{first.id}.json").read_text()) != {}, "the entry made anew")
        assert client.get_job_status(second.id).status == "PENDING"
        client.cancel_job(first.id)
        assert client.wait(second.id, 20).status == "COMPLETE"

    def test_a_running_job_with_a_broken_entry_holds_all_gpus(self, client: Client, job: Job) -> None:
        me = identify(os.getpid())
        with client.store.update(job.id) as record:
            record |= {"gpus": 1, "handle": {"supervisor": me, "process": me}}
        queue = Queue(client.store, Machine(("0", "1"), 1))
        queue.enter(_OTHER, job.created_at, 1, me or {})
        (queue.folder / f"{job.id}.json").write_text("broken")
        assert queue.claim(_OTHER) is None
        queue.leave(job.id)
        assert queue.claim(_OTHER) == ["0"]

    def test_a_deleted_queue_is_made_anew(self, client: Client, submit: Submit, tiny: Tiny, queue: Queue) -> None:
        tiny("import time; print('ready', flush=True); time.sleep(60)")
        first, second = submit(), submit()
        until(lambda: "ready" in client.get_job_logs(first.id), "the job's first line")
        until(lambda: (queue.folder / f"{second.id}.json").exists(), "the second job's entry")
        queue.folder.rename(queue.folder.with_name(".gone"))
        until(lambda: client.get_job_status(second.id).status != "PENDING", "the start of the second job")
        assert client.get_job_status(second.id).status == "RUNNING", client.get_job_logs(second.id)
        for one in (first, second):
            client.cancel_job(one.id)
            client.wait(one.id, 20)


def test_the_root_may_hold_anything_else(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs")
    (store.root / "notes.txt").touch()
    (store.root / "photos").mkdir()
    assert store.records() == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(data=st.binary(max_size=200))
def test_whatever_bytes_a_record_has_it_is_left_out(tmp_path: Path, data: bytes) -> None:
    store = JobStore(tmp_path / "jobs")
    (store.root / _OTHER).mkdir(exist_ok=True)
    (store.root / _OTHER / "job.json").write_bytes(data)
    assert store.records() == []
