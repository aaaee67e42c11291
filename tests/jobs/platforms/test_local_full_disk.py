"""Roots of jobs on full, read-only or faulty disks: states are shown, and a job can be canceled."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.helpers.platform_contract import RunCode, Submit, until

from openmae.cli.main import main
from openmae.errors import RunError
from openmae.jobs import Client, Job, store
from openmae.machine import is_running

SLEEP = "import time; print('ready', flush=True); time.sleep(60)"
NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Mount a disk of 2 MB with the root of the jobs."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a disk takes root")
    monkeypatch.setenv("OPENMAE_JOBS", str(place / "jobs"))
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def client(disk: Path) -> Client:
    return Client("local", disk / "jobs")


def _fill(disk: Path) -> Path:
    path = disk / "fill"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1024))
    return path


@pytest.fixture
def running(client: Client, submit: Submit, run_code: RunCode) -> Job:
    run_code(SLEEP)
    job = submit()
    until(lambda: "ready" in client.get_job_logs(job.id), "the job's first line")
    return job


def _process(client: Client, job: Job, which: str = "process") -> dict[str, object]:
    found: dict[str, object] = getattr(client.store.read(job.id).handle, which)
    return found


def test_a_job_is_canceled_while_the_disk_is_full(
    client: Client, running: Job, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = _process(client, running)
    _fill(disk)
    assert main(["jobs", "list"]) == 0
    assert main(["jobs", "status", running.id]) == 0
    assert main(["jobs", "cancel", "--wait", running.id]) == 0
    assert "CANCELED" in capsys.readouterr().out
    assert not is_running(process)
    assert client.store.read(running.id).exit_code == -2, "its end was not recorded"


def test_a_job_is_canceled_although_nothing_can_be_recorded(
    client: Client, running: Job, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = _process(client, running)
    (client.store.folder(running.id) / ".reserve").unlink()
    _fill(disk)
    client.cancel_job(running.id)
    assert "could not be recorded; it is stopped anyway" in caplog.text
    assert "No space left on device" in caplog.text
    assert not is_running(process)
    assert client.wait(running.id, 20).finished


def test_a_job_that_fills_the_disk_has_its_end_recorded(
    client: Client, submit: Submit, run_code: RunCode, disk: Path
) -> None:
    run_code(f"f = open({str(disk / 'fill')!r}, 'wb', buffering=0)\nwhile True: f.write(bytes(1024))")
    done = client.wait(submit().id, 20)
    assert (done.status, done.exit_code) == ("ERROR", 1)
    assert client.store.read(done.id).state == "ERROR"


def test_a_job_that_waits_is_canceled_although_nothing_can_be_recorded(
    client: Client, running: Job, submit: Submit, disk: Path
) -> None:
    waiting = submit()
    until(lambda: (client.store.root / ".queue" / f"{waiting.id}.json").exists(), "the entry in the queue")
    supervisor = _process(client, waiting, "supervisor")
    (client.store.folder(waiting.id) / ".reserve").unlink()
    fill = _fill(disk)
    client.cancel_job(waiting.id)
    assert client.wait(waiting.id, 20).finished
    until(lambda: not is_running(supervisor), "the end of its supervisor")
    fill.unlink()
    client.cancel_job(running.id)
    client.wait(running.id, 20)


def test_no_job_is_made_on_a_full_disk(
    client: Client, submit: Submit, run_code: RunCode, disk: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_code("pass")
    _fill(disk)
    with pytest.raises(RunError, match=rf"No space left on device\)\.\n  Fix: Free space in {disk}, or use"):
        submit()
    assert main(["jobs", "submit", "train", f"dataset.train_data_sources={images / 'train'}"]) == 1
    assert f"Fix: Free space in {disk}, or use a folder on another disk." in capsys.readouterr().err
    assert client.list_jobs() == []
    assert os.listdir(client.store.root) == [], "files of a job are left"


def test_on_an_almost_full_disk_a_job_runs_or_is_refused_with_the_reason(
    client: Client, submit: Submit, run_code: RunCode, disk: Path
) -> None:
    run_code("pass")
    fill = disk / "fill"
    refusals: list[RunError] = []
    for pages in range(8):
        _fill(disk)
        os.truncate(fill, fill.stat().st_size - 4096 * pages)
        try:
            assert client.wait(submit().id, 20).finished
        except RunError as error:
            refusals.append(error)
        fill.unlink()
        for left in client.list_jobs():
            assert left.finished, left
            client.store.discard(left.id)
    assert 1 <= len(refusals) < 8
    for error in refusals:
        assert "could not be written (No space left on device)." in error.problem
        assert error.fix == f"Free space in {disk}, or use a folder on another disk."


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_a_state_that_cannot_be_recorded_is_shown(
    client: Client, running: Job, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for which in ("supervisor", "process"):
        os.kill(int(str(_process(client, running, which)["pid"])), 9)
        until(lambda which=which: not is_running(_process(client, running, which)), "the death of a killed process")
    before = client.store.read(running.id)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), str(client.store.root))

    with monkeypatch.context() as patched:
        patched.setattr(store.os, "fsync", fail)
        assert [job.status for job in client.list_jobs()] == ["ERROR"]
        assert client.get_job_status(running.id).status == "ERROR"
        assert client.get_failure_analysis(running.id) is not None
        assert client.cancel_job(running.id).status == "ERROR"
        assert client.store.read(running.id) == before
    assert client.get_job_status(running.id).status == "ERROR"
    assert client.store.read(running.id).state == "ERROR"


def test_a_read_only_root_is_listed(
    client: Client, running: Job, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "read-only"
    place.mkdir()
    subprocess.run(["mount", "--bind", disk, place], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
    try:
        root = ["--root", str(place / "jobs")]
        assert main(["jobs", "list", *root]) == 0
        assert main(["jobs", "status", running.id, *root]) == 0
        assert main(["jobs", "logs", running.id, *root]) == 0
        assert capsys.readouterr().out.count("RUNNING") >= 2
        process = _process(client, running)
        assert main(["jobs", "cancel", "--wait", running.id, *root]) == 0
        assert "could not be recorded; it is stopped anyway" in capsys.readouterr().err
        assert not is_running(process)
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_root_that_cannot_be_written_is_reported(
    client: Client, submit: Submit, run_code: RunCode, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_code("pass")
    real: Callable[..., object] = getattr(os, call)

    def fail(path: object, *arguments: object, **options: object) -> object:
        if str(path).startswith(str(client.store.root)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(RunError, match=r"Read-only file system\)\.\n  Fix: The file system at .* is read-only"):
            submit()
    assert client.list_jobs() == []
