"""Two runs in one results folder: one continues, the other is told which process holds the folder."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from openmae.errors import RunError, UserError
from openmae.storage import layout, lock
from openmae.storage.filesystem import ask
from openmae.storage.lock import FolderLock, StoreLock

pytestmark = pytest.mark.integration

HOLD = """
import sys
from pathlib import Path
from openmae.storage.lock import FolderLock

with FolderLock(Path(sys.argv[1]), "results_dir"):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds a folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_run_is_told_which_process_holds_the_folder_until_that_is_killed(tmp_path):
    process = hold(tmp_path)
    try:
        with pytest.raises(UserError) as caught, FolderLock(tmp_path, "train.results_dir"):
            pass
    finally:
        process.kill()
        process.wait()
    holder = json.loads((tmp_path / layout.LOCK_HOLDER).read_text())
    assert holder["pid"] == process.pid
    assert caught.value.problem == (
        f"train.results_dir: another run is writing to {tmp_path}: process {process.pid} on {holder['host']}, started "
        f"at {holder['since']}."
    )
    assert caught.value.fix.startswith("Wait until it ends, or set another train.results_dir.")
    with FolderLock(tmp_path, "results_dir"):
        assert json.loads((tmp_path / layout.LOCK_HOLDER).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir()), "a file of the lock is left"


def test_a_locked_folder_is_moved_aside_and_a_new_one_locked(tmp_path):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "disk" / "run" / "old").touch()
    folder, aside = tmp_path / "link", tmp_path / "disk" / "run-2026"
    folder.symlink_to(tmp_path / "disk" / "run")
    with FolderLock(folder, "results_dir") as held:
        held.move_aside(aside)
        assert [path.name for path in aside.iterdir()] == ["old"], "it is not locked"
        with pytest.raises(UserError, match=f"process {os.getpid()} on "):
            FolderLock(tmp_path / "disk" / "run", "results_dir").__enter__()
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_moved_stays_locked(tmp_path):
    (tmp_path / "full" / "x").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    with FolderLock(tmp_path / "run", "results_dir") as held:
        with pytest.raises(UserError, match=r"results_dir: .*run cannot be renamed to full"):
            held.move_aside(tmp_path / "full")
        assert (tmp_path / "run" / layout.LOCK).exists()


def test_a_run_that_begins_in_the_place_of_a_moved_folder_keeps_its_lock(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    other: list[subprocess.Popen[str]] = []

    def make_folder(folder: Path, key: str) -> None:
        folder.mkdir()
        other.append(hold(folder))

    monkeypatch.setattr(lock, "make_folder", make_folder)
    with (
        pytest.raises(UserError, match="another run is writing to"),
        FolderLock(tmp_path / "run", "results_dir") as held,
    ):
        held.move_aside(tmp_path / "aside")
    assert json.loads((tmp_path / "run" / layout.LOCK_HOLDER).read_text())["pid"] == other[0].pid
    other[0].kill()
    other[0].wait()


def test_a_file_that_its_holder_has_deleted_is_no_lock(tmp_path, monkeypatch):
    """A process opens the file, then its holder deletes it and ends: a third process would not see this lock."""
    flock, calls = fcntl.flock, []

    def flock_after_deletion(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / layout.LOCK).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_deletion)
    with FolderLock(tmp_path, "results_dir"):
        assert len(calls) == 2, "locked, found to be deleted, locked again"
        assert (tmp_path / layout.LOCK).exists()


def test_children_of_a_killed_process_are_waited_for(tmp_path, monkeypatch):
    """Forked children may have inherited the lock; they end soon after their parent."""
    (tmp_path / layout.LOCK_HOLDER).write_text(json.dumps({**holder_here(), "start": 1}))  # the parent, which is dead
    child = (tmp_path / layout.LOCK).open("w")
    fcntl.flock(child, fcntl.LOCK_EX)
    looks = []

    def look(seconds):
        looks.append(seconds)
        child.close()

    monkeypatch.setattr(lock.time, "sleep", look)
    with FolderLock(tmp_path, "results_dir"):
        assert looks


def test_the_same_process_does_not_hold_a_folder_twice(tmp_path):
    with FolderLock(tmp_path, "results_dir"), pytest.raises(UserError, match=f"process {os.getpid()} on "):
        FolderLock(tmp_path, "results_dir").__enter__()
    with FolderLock(tmp_path, "results_dir"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_with_a_warning(number, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / layout.LOCK).write_text("1\nanother-host\n")  # left by a killed run
    with caplog.at_level(logging.WARNING, "openmae"), FolderLock(tmp_path, "results_dir"):
        pass
    assert f"{tmp_path} is on a file system without locks: do not start two runs in it." in caplog.messages


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fcntl, "flock", full)
    with pytest.raises(RunError, match=r"could not be written \(No space left on device\): .*\.openmae\.lock"):
        FolderLock(tmp_path, "results_dir").__enter__()


def holder_here() -> dict[str, object]:
    """Return what a lock of this process says about it."""
    with TemporaryDirectory() as folder, FolderLock(Path(folder), "results_dir"):
        return json.loads(Path(folder, layout.LOCK_HOLDER).read_text())


def never(error: RunError) -> None:
    raise AssertionError(error)


def body(store, bucket) -> dict[str, object]:
    return json.loads(store.get(bucket, f"runs/train/{layout.LOCK_HOLDER}"))


@pytest.fixture
def url(bucket):
    return f"s3://{bucket}/runs/train"


def test_the_lock_of_a_store_is_released(store, bucket, url):
    with StoreLock(url, "results_dir", never):
        assert body(store, bucket)["pid"] == os.getpid()
        with pytest.raises(UserError) as caught:
            StoreLock(url, "results_dir", never).__enter__()
    assert f"results_dir: another run is writing to {url}: process {os.getpid()} on " in caught.value.problem
    assert store.names(bucket) == []


def put(store, bucket, **facts) -> None:
    holder = {**holder_here(), "token": "theirs", **facts}
    store.put(bucket, {f"runs/train/{layout.LOCK_HOLDER}": json.dumps(holder).encode()})


def test_the_lock_of_a_dead_process_is_taken_over_at_once(store, bucket, url, monkeypatch, caplog):
    put(store, bucket, start=1)  # the pid is used again, by this process
    monkeypatch.setattr(lock.time, "sleep", never)
    with caplog.at_level(logging.WARNING, "openmae"), StoreLock(url, "results_dir", never):
        assert body(store, bucket)["token"] != "theirs"
    assert f"{url} was locked by process {os.getpid()} on " in caplog.text
    assert store.names(bucket) == []


def test_a_lock_of_an_older_version_whose_process_lives_is_respected(store, bucket, url):
    put(store, bucket, start="12345")
    with pytest.raises(UserError, match="another run is writing"):
        StoreLock(url, "results_dir", never).__enter__()


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock: time passes when the lock sleeps, and ``clock.then`` is called."""

    class Clock:
        now = 0.0

        def then(self) -> None: ...

        def sleep(self, seconds: float) -> None:
            self.now += seconds
            self.then()

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(lock, "time", clock)
    return clock


def test_a_silent_holder_on_another_machine_is_replaced_in_time(store, bucket, url, clock):
    put(store, bucket, machine="another", start=1)
    with StoreLock(url, "results_dir", never):
        assert body(store, bucket)["token"] != "theirs"
    assert lock.STALE <= clock.now <= lock.STALE + 3


def test_a_living_holder_on_another_machine_is_named(store, bucket, url, clock):
    put(store, bucket, machine="another", host="node7", pid=12, since="noon")
    clock.then = lambda: put(store, bucket, machine="another", host="node7", pid=12, since="noon", beat=clock.now)
    with pytest.raises(UserError, match=r"process 12 on node7, started at noon\."):
        StoreLock(url, "results_dir", never).__enter__()
    assert clock.now < lock.STALE


def test_a_holder_on_another_machine_that_ends_is_followed(store, bucket, url, clock):
    put(store, bucket, machine="another")
    clock.then = lambda: store.client.delete_object(Bucket=bucket, Key=f"runs/train/{layout.LOCK_HOLDER}")
    with StoreLock(url, "results_dir", never):
        pass
    assert clock.now < lock.STALE


def test_of_two_runs_that_take_over_at_once_one_wins(store, bucket, url):
    """The second has seen the same dead lock as the first."""
    put(store, bucket, start=1)
    first, second = (StoreLock(url, "results_dir", never) for _ in range(2))
    stale = second._read()
    assert stale is not None
    with first:
        token = body(store, bucket)["token"]
        assert not second._write(stale[1])
        assert not second._write(""), "there is one"
        assert body(store, bucket)["token"] == token != "theirs"


def test_a_run_that_loses_the_lock_is_notified(store, bucket, url, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    lost, told = threading.Event(), []
    with StoreLock(url, "results_dir", lambda error: (told.append(error), lost.set())):
        put(store, bucket, machine="another", host="node7")
        assert lost.wait(30)
    assert "node7" in told[0].problem
    assert told[0].problem.endswith("It has taken the folder over from this run.")
    assert body(store, bucket)["token"] == "theirs", "the lock of another run was removed"


def test_the_lock_is_refreshed(store, bucket, url, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    refreshed, write = threading.Event(), StoreLock._write

    def counting(self, version):
        written = write(self, version)
        if self._me["beat"] >= 3:
            refreshed.set()
        return written

    monkeypatch.setattr(StoreLock, "_write", counting)
    with StoreLock(url, "results_dir", never):
        assert refreshed.wait(30)
    assert store.names(bucket) == []


def test_a_heartbeat_that_was_sent_twice_keeps_the_lock(store, bucket, url):
    one = StoreLock(url, "results_dir", never)
    with one:
        one._me["beat"] += 1
        ask(url, one._put(one._version))  # written, but the answer is lost
        assert one._write(one._version), "it is refused because of its own result"
        one._me["beat"] += 1
        assert one._write(one._version)
        assert body(store, bucket)["beat"] == one._me["beat"]


def test_a_store_without_conditional_writes_keeps_the_lock_of_a_living_run(store, bucket, url):
    one, two = StoreLock(url, "results_dir", never), StoreLock(url, "results_dir", never)
    two._conditional = False
    with one:
        assert not two._write("")
        assert one._holds()
