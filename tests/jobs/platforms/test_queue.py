"""The queue of local jobs when its files are damaged or deleted: no job is affected."""

from __future__ import annotations

import json
import os

import pytest
from tests.helpers.job_records import make_record
from tests.helpers.platform_contract import RunCode, Submit, until

from openmae.jobs import Client
from openmae.jobs.job import Handle
from openmae.jobs.platforms.local.queue import Machine, Queue
from openmae.machine import identify

_OTHER = "0a1b2c3d-0000-4000-8000-000000000001"


@pytest.fixture
def queue(client: Client) -> Queue:
    return Queue(client.store, Machine((), 1))


@pytest.mark.parametrize("text", ["{}", "[", "null", '{"id": 3}', "[" * 100_000])
def test_a_damaged_entry_blocks_no_job(
    client: Client, submit: Submit, run_code: RunCode, queue: Queue, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    queue.folder.mkdir(exist_ok=True)
    (queue.folder / f"{_OTHER}.json").write_text(text)
    run_code("pass")
    done = client.wait(submit().id, 20)
    assert done.status == "COMPLETE", client.get_job_logs(done.id)
    assert (queue.folder / f"{_OTHER}.broken").exists()
    assert f"The queue entry {queue.folder / _OTHER}.json cannot be read" in client.get_job_logs(done.id)


def test_a_running_job_with_a_damaged_entry_keeps_its_slot(
    client: Client, submit: Submit, run_code: RunCode, queue: Queue
) -> None:
    run_code("import time; print('ready', flush=True); time.sleep(60)")
    first = submit()
    until(lambda: "ready" in client.get_job_logs(first.id), "the job's first line")
    (queue.folder / f"{first.id}.json").write_text("{}")
    run_code("pass")
    second = submit()
    until(lambda: (queue.folder / f"{second.id}.json").exists(), "the second job's entry")
    until(lambda: json.loads((queue.folder / f"{first.id}.json").read_text()) != {}, "the entry made anew")
    assert client.get_job_status(second.id).status == "PENDING"
    client.cancel_job(first.id)
    assert client.wait(second.id, 20).status == "COMPLETE"


def test_a_running_job_with_a_damaged_entry_claims_all_gpus(client: Client) -> None:
    job = make_record()
    client.store.create(job)
    me = identify(os.getpid())
    assert me is not None
    with client.store.update(job.id) as record:
        record.gpus, record.handle = 1, Handle(me, me)
    queue = Queue(client.store, Machine(("0", "1"), 1))
    client.store.create(make_record(_OTHER, gpus=1, handle=Handle(me)))
    queue.folder.mkdir()
    (queue.folder / f"{job.id}.json").write_text("broken")
    assert queue.claim(_OTHER) is None
    queue.leave(job.id)
    assert queue.claim(_OTHER) == ["0"]


def test_a_deleted_queue_is_created_again(client: Client, submit: Submit, run_code: RunCode, queue: Queue) -> None:
    run_code("import time; print('ready', flush=True); time.sleep(60)")
    first, second = submit(), submit()
    until(lambda: "ready" in client.get_job_logs(first.id), "the job's first line")
    until(lambda: (queue.folder / f"{second.id}.json").exists(), "the second job's entry")
    queue.folder.rename(queue.folder.with_name(".gone"))
    until(lambda: client.get_job_status(second.id).status != "PENDING", "the start of the second job")
    assert client.get_job_status(second.id).status == "RUNNING", client.get_job_logs(second.id)
    for one in (first, second):
        client.cancel_job(one.id)
        client.wait(one.id, 20)
