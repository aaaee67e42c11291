"""Records of jobs under concurrent clients, killed writers and damage."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.job_records import make_record

from openmae.errors import RunError, SpecError
from openmae.jobs.job import Record, Transition, now
from openmae.jobs.store import JobStore

_ID = "0a1b2c3d-0000-4000-8000-00000000000{}"
_CREATOR = """
import sys, uuid
from dataclasses import replace
from openmae.jobs.job import Transition, now
from openmae.jobs.store import JobStore
store = JobStore(sys.argv[1])
for number in range(20):
    with store.update(sys.argv[2]) as record:
        record.transitions.append(Transition(now(), "PENDING", f"{sys.argv[3]} {number}"))
    store.create(replace(store.read(sys.argv[2]), id=str(uuid.uuid4()), created_at=now()))
"""
_WRITER = """
import sys
from openmae.jobs.job import Transition, now
from openmae.jobs.store import JobStore
store = JobStore(sys.argv[1])
while True:
    with store.update(sys.argv[2]) as record:
        record.transitions.append(Transition(now(), "PENDING", "x" * 2000))
    print("written", flush=True)
"""


def _record(number: int = 1, **changes: Any) -> Record:
    return make_record(_ID.format(number), **changes)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    made = JobStore(tmp_path / "jobs")
    made.create(_record())
    return made


@pytest.mark.integration
def test_concurrent_clients_lose_no_update(store: JobStore) -> None:
    first = _ID.format(1)
    clients = [
        subprocess.Popen([sys.executable, "-c", _CREATOR, str(store.root), first, str(number)]) for number in range(4)
    ]
    assert [client.wait(timeout=60) for client in clients] == [0] * 4
    transitions = store.read(first).transitions
    assert sorted(item.message for item in transitions[1:]) == sorted(f"{c} {n}" for c in range(4) for n in range(20))
    times = [item.at for item in transitions]
    assert times == sorted(times), "transitions are out of order"
    records = store.records()
    assert len(records) == 81
    assert [record.created_at for record in records] == sorted(record.created_at for record in records)


@pytest.mark.integration
def test_a_killed_writer_leaves_a_complete_record_and_no_lock(store: JobStore) -> None:
    first, chance, count = _ID.format(1), random.Random(0), 1
    for _ in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(store.root), first], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        time.sleep(chance.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        with store.update(first) as record:
            assert len(record.transitions) >= count, "a transition was lost"
            record.transitions.append(Transition(now(), "PENDING", "after a kill"))
        count = len(store.read(first).transitions)
    assert count >= 17


def test_transitions_are_append_only(store: JobStore) -> None:
    with pytest.raises(ValueError, match="append-only"), store.update(_ID.format(1)) as record:
        record.transitions[0] = replace(record.transitions[0], message="rewritten")


def test_an_update_that_fails_writes_nothing(store: JobStore) -> None:
    with pytest.raises(KeyError), store.update(_ID.format(1)) as record:
        record.notices = record.spec["no such"]
    assert store.read(_ID.format(1)).notices == []


def test_a_final_state_does_not_change() -> None:
    record = _record()
    assert record.move("RUNNING", "on")
    assert record.move("CANCELED", "stopped", 130)
    assert not record.move("COMPLETE", "finished", 0)
    job = record.to_job()
    assert (job.status, job.exit_code, job.finished) == ("CANCELED", 130, True)
    assert [transition.state for transition in job.transitions] == ["PENDING", "RUNNING", "CANCELED"]


def test_only_the_user_can_read_a_root(store: JobStore) -> None:
    paths = [store.root, *store.root.rglob("*")]
    assert len(paths) == 3
    open_ones = [path for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert open_ones == []


def test_a_job_is_found_by_the_first_characters_of_its_id(store: JobStore) -> None:
    store.create(make_record("ffff0000-0000-4000-8000-000000000000"))
    assert store.find("ffff") == "ffff0000-0000-4000-8000-000000000000"
    store.create(_record(3))
    with pytest.raises(SpecError, match=r"2 jobs begin with '0a1b': 0a1b.*\n  Fix: Give more characters of the id\."):
        store.find("0a1b")
    for text in ("", "abc", "../jobs", "*"):
        with pytest.raises(SpecError, match=r"There is no job .* in .*\n  Fix: `mae jobs list` shows all jobs\."):
            store.find(text)


def test_a_damaged_record_is_named_and_hides_no_other(store: JobStore, caplog: pytest.LogCaptureFixture) -> None:
    store.create(_record(2))
    (store.folder(_ID.format(2)) / "job.json").write_text("{", encoding="utf-8")
    (store.root / _ID.format(3)).mkdir()  # a client was killed before it wrote the record
    assert [record.id for record in store.records()] == [_ID.format(1)]
    assert "cannot be read" in caplog.text
    with pytest.raises(RunError, match=r"The record .*job\.json cannot be read .*\n  Fix: Restore it, or remove"):
        store.read(_ID.format(2))


def test_a_root_must_be_a_local_folder(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"records of jobs are kept in a local folder, got 's3://bucket/jobs'"):
        JobStore("s3://bucket/jobs")
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match=r"root: .*file/jobs cannot be created"):
        JobStore(tmp_path / "file" / "jobs")
    assert os.listdir(tmp_path) == ["file"]


def test_times_are_shown_in_utc() -> None:
    record = _record(created_at="2026-01-01T12:00:00+02:00")
    record.transitions[0] = Transition("2026-01-01T10:00:01", "PENDING", "")  # as early versions wrote UTC
    job = record.to_job()
    assert job.created_at == "2026-01-01T10:00:00.000000+00:00"
    assert job.transitions[0].at == "2026-01-01T10:00:01.000000+00:00"


def test_records_are_sorted_by_time_and_not_by_text(store: JobStore) -> None:
    store.create(_record(2, created_at="2999-01-01T12:00:00+02:00"))
    store.create(_record(3, created_at="2999-01-01T11:00:00"))
    assert [record.id[-1] for record in store.records()] == ["1", "2", "3"]
