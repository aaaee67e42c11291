"""Records that are damaged, of another job or of a newer version: each is named, and no other job is affected."""

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
from tests.helpers.job_records import make_record
from tests.helpers.platform_contract import RunCode, Submit

from openmae.cli.main import main
from openmae.errors import RunError, SpecError
from openmae.jobs import Client, Job
from openmae.jobs.job import Record
from openmae.jobs.store import JobStore

_OTHER = "0a1b2c3d-0000-4000-8000-000000000001"
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def job(client: Client) -> Job:
    """Return a job that has ended."""
    record = make_record(states=("PENDING", "RUNNING", "COMPLETE"), exit_code=0, own_results=True)
    client.store.create(record)
    return client.get_job_status(record.id)


def _write(client: Client, job_id: str, text: str | bytes) -> Path:
    folder = client.store.folder(job_id)
    folder.mkdir(exist_ok=True)
    (folder / "job.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / "job.json"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "it has no id, action, name, platform, created_at"),
        ("[]", "the record must be an object, but is a list"),
        ("null", "the record must be an object, but is null"),
        ("", "Expecting value"),
        ("[" * 100_000, "it is nested too deeply"),
        (b"\xff\xfe", "codec can't decode"),
        ({"version": 2}, r"a newer version of OpenMAE wrote it \(record version 2, this one reads 1\)"),
        ({"version": "1"}, "version must be an integer, but is a string"),
        ({"id": _OTHER[:-1] + "2"}, r"it is the record of job 0a1b.*2 in the folder of job 0a1b.*1"),
        ({"transitions": []}, "transitions is empty"),
        ({"transitions": [1]}, r"transitions\[0\] must be an object, but is an integer"),
        ({"transitions": [{"at": "today", "state": "PENDING", "message": ""}]}, "'today' is not a date and time"),
        ({"transitions": [{"at": "2026-01-01", "state": "DONE", "message": ""}]}, "there is no state 'DONE'"),
        ({"handle": {"supervisor": {"pid": "1"}}}, "handle.supervisor.pid must be an integer, but is a string"),
        ({"handle": {"process": 1}}, "handle.process must be an object or null, but is an integer"),
        ({"created_at": 5}, "created_at must be a string, but is an integer"),
        ({"exit_code": True}, "exit_code must be an integer or null, but is true or false"),
        ({"submitter": []}, "submitter must be an object or null, but is a list"),
    ],
)
def test_a_damaged_record_is_named_and_affects_no_other_job(
    client: Client, job: Job, text: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(text, dict):
        text = json.dumps({**client.store.read(job.id).to_dict(), "id": _OTHER, **text})
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


@pytest.mark.integration
def test_a_record_of_another_job_does_not_overwrite_it(client: Client, submit: Submit, run_code: RunCode) -> None:
    run_code("import time; time.sleep(60)")
    running = submit()
    before = client.store.read(running.id)
    _write(client, _OTHER, json.dumps({**before.to_dict(), "handle": {}, "submitter": None}))
    assert [one.id for one in client.list_jobs()] == [running.id]
    with pytest.raises(RunError, match="it is the record of job"):
        client.cancel_job(_OTHER)
    assert client.get_job_status(running.id).status in ("PENDING", "RUNNING")
    client.cancel_job(running.id)
    client.wait(running.id, 20)


def test_fields_of_a_later_version_are_kept(client: Client, job: Job) -> None:
    record = client.store.read(job.id).to_dict()
    record["transitions"][0]["by"] = record["host_name"] = "somebody"
    _write(client, job.id, json.dumps(record))
    assert client.get_job_status(job.id) == job
    with client.store.update(job.id):
        pass
    assert client.store.read(job.id).later["host_name"] == "somebody"


def test_a_record_of_an_early_version_is_shown(client: Client, job: Job) -> None:
    record = client.store.read(job.id).to_dict()
    early = ("version", "host", "handle", "submitter", "own_results", "cancel_requested", "processes")
    _write(client, job.id, json.dumps({name: value for name, value in record.items() if name not in early}))
    assert client.get_job_status(job.id) == job


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/nowhere", path)])
def test_a_record_that_is_not_a_regular_file_does_not_block(
    client: Client, job: Job, make: Callable[[Path], None]
) -> None:
    client.store.folder(_OTHER).mkdir()
    make(client.store.folder(_OTHER) / "job.json")
    assert [one.id for one in client.list_jobs()] == [job.id]
    with pytest.raises((RunError, SpecError)):
        client.get_job_status(_OTHER)


def test_a_copy_of_a_jobs_folder_is_not_a_job(client: Client, job: Job, caplog: pytest.LogCaptureFixture) -> None:
    copy = client.store.root / "copy of a job"
    copy.mkdir()
    (copy / "job.json").write_text(json.dumps(client.store.read(job.id).to_dict()))
    assert [one.id for one in client.list_jobs()] == [job.id]
    assert f"{copy / 'job.json'} cannot be read (it is the record of job {job.id} in the folder of job" in caplog.text


def test_a_name_that_no_terminal_can_print_is_listed(
    client: Client, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(
        client,
        job.id,
        json.dumps({**client.store.read(job.id).to_dict(), "name": "a\udcff", "results_folder": "/\udc80"}),
    )
    assert main(["jobs", "list"]) == 0
    assert main(["jobs", "status", job.id]) == 0
    capsys.readouterr().out.encode()


@given(value=_JSON, name=st.sampled_from(["version", "id", "handle", "transitions", "submitter", "notices", "host"]))
def test_any_value_of_a_field_is_refused_or_shown(value: Any, name: str) -> None:
    transition = {"at": "2026-01-01T00:00:00+00:00", "state": "RUNNING", "message": ""}
    record = {
        **{"id": _OTHER, "action": "train", "name": "train", "platform": "local", "parent_job_id": None},
        **{"created_at": "2026-01-01", "results_dir": "r", "results_folder": "r", "exit_code": None, "notices": []},
        "transitions": [transition],
        name: value,
    }
    with suppress(ValueError):
        assert Record.from_dict(record, _OTHER).to_job().id == _OTHER


def test_other_files_in_the_root_are_ignored(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs")
    (store.root / "notes.txt").touch()
    (store.root / "photos").mkdir()
    assert store.records() == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(data=st.binary(max_size=200))
def test_a_record_of_any_bytes_is_skipped(tmp_path: Path, data: bytes) -> None:
    store = JobStore(tmp_path / "jobs")
    (store.root / _OTHER).mkdir(exist_ok=True)
    (store.root / _OTHER / "job.json").write_bytes(data)
    assert store.records() == []
