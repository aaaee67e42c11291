"""Disks that are full, results that cannot be written, files that are damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.helpers.fault_runs import Server, assert_same_end, draw_pictures, last_status, newest, until

from openmae.checkpoints.folder import list_checkpoints
from openmae.results.status import read_status

LONG = {"train.num_epochs": 60}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(megabytes)`` mounts a file system of that size, or resizes the mounted one."""
    place = tmp_path / "disk"
    place.mkdir()

    def size(megabytes: int) -> Path:
        options = f"size={megabytes}m" + (",remount" if os.path.ismount(place) else "")
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True, capture_output=True)
        return place

    try:
        size(1)
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("mounting a small disk requires root")
    yield size
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_destroys_no_checkpoint(server: Server, photos: Path, tmp_path: Path, small_disk) -> None:
    folder = small_disk(100) / "results"
    training = server.start(folder, photos)
    assert training.code() == 1, training.text
    assert "could not be written (No space left on device)" in training.text
    assert "Traceback" not in training.text
    assert last_status(folder) in ("FAILURE", "RUNNING"), "a failed run reported success"
    assert newest(folder)["progress"]["epoch"] >= 1, "the checkpoint that fitted is gone"
    assert not list(folder.glob(".*.tmp"))
    small_disk(1000)
    server.finish(folder, photos)
    server.finish(tmp_path / "whole", photos)
    assert_same_end(tmp_path / "whole", folder)


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], Callable[[], None]]]:
    """``read_only(folder)`` makes a folder read-only and returns a function that ends it."""
    undo: list[Callable[[], None]] = []

    def make(folder: Path) -> Callable[[], None]:
        if os.geteuid():
            folder.chmod(0o555)
            undo.append(lambda: folder.chmod(0o755))
        else:
            # a second mount over it: the first cannot become read-only while a file in it is open
            subprocess.run(["mount", "--bind", folder, folder], check=True)
            undo.append(lambda: subprocess.run(["umount", folder], check=True) and None)
            subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        return lambda: undo.pop()()

    yield make
    for end in undo:
        end()


def test_results_that_become_read_only_end_the_run(server: Server, photos: Path, tmp_path: Path, read_only) -> None:
    folder = tmp_path / "results"
    training = server.start(folder, photos, LONG)
    until(lambda: list_checkpoints(folder), training, "the first checkpoint")
    writable_again = read_only(folder)
    assert training.code() == 1, training.text
    assert "could not be written (" in training.text, training.text
    assert "Traceback" not in training.text
    again = server.start(folder, photos, LONG)
    assert again.code() == 2, again.text
    assert "results_dir: cannot write to" in again.text
    writable_again()
    assert last_status(folder) != "SUCCESS"
    done = newest(folder)["progress"]["epoch"]
    assert done >= 1
    until_next = {**LONG, "train.stop_after_epoch": done + 1}
    server.finish(folder, photos, until_next)
    server.finish(tmp_path / "whole", photos, until_next)
    assert_same_end(tmp_path / "whole", folder)


def test_images_that_become_corrupt_during_the_run_are_listed(server: Server, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    training = server.start(folder, photos, {"train.num_epochs": 12, "dataset.max_corrupt_fraction": 0.2})
    until(lambda: list_checkpoints(folder), training, "the first checkpoint")
    (photos / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + os.urandom(500))
    (photos / "dog" / "1.png").write_bytes(b"")
    (photos / "cat" / "2.png").unlink()
    assert training.code() == 0, training.text
    listed = {line.split("\t")[0] for line in (folder / "corrupt_files.txt").read_text().splitlines()}
    assert {Path(name).name for name in listed} == {"0.png", "1.png", "2.png"}
    assert last_status(folder) == "SUCCESS"


def test_too_many_corrupt_images_end_the_run(server: Server, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    training = server.start(folder, photos, LONG)
    until(lambda: list_checkpoints(folder), training, "the first checkpoint")
    for path in list(photos.rglob("*.png"))[:10]:
        path.write_bytes(b"gone")
    assert training.code() == 2, training.text
    assert "images in" in training.text
    assert "are corrupt" in training.text
    assert last_status(folder) == "FAILURE"
    assert newest(folder)["progress"]["epoch"] >= 1


def _zip(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w") as bundle:
        for path in sorted(folder.rglob("*.png")):
            bundle.write(path, path.relative_to(folder))
    return archive


@pytest.mark.parametrize("count", [21, 33], ids=["as many images", "more images"])
def test_an_archive_replaced_between_runs_is_reported(server: Server, photos: Path, tmp_path: Path, count: int) -> None:
    folder, archive = tmp_path / "results", _zip(photos, tmp_path / "photos.zip")
    server.finish(folder, archive, {"train.stop_after_epoch": 1})
    shutil.rmtree(photos)
    _zip(draw_pictures(photos, count, seed=1), archive)
    if count == 21:
        (photos / "cat" / "0.png").rename(photos / "cat" / "other.png")
        _zip(photos, archive)
    training = server.finish(folder, archive)
    assert "are not those that checkpoint" in training.text
    assert newest(folder)["progress"]["epoch"] == 3


@pytest.mark.parametrize("rest", [b'{"date": "1/', b"\0\0\0\0", b'{"a": 1}\nnot JSON\n{"b":'])
def test_a_truncated_status_file(server: Server, photos: Path, tmp_path: Path, rest: bytes) -> None:
    folder = tmp_path / "results"
    server.finish(folder, photos, {"train.stop_after_epoch": 1})
    status = folder / "status.json"
    status.write_bytes(status.read_bytes()[:-20] + rest)
    server.finish(folder, photos, {"train.stop_after_epoch": 2})
    assert [entry["status"] for entry in read_status(status) if "status" in entry][-3:] == [
        "STARTED",
        "RUNNING",
        "SUCCESS",
    ]


def test_a_clock_that_goes_backwards(server: Server, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    server.finish(tmp_path / "whole", photos)
    server.finish(folder, photos, {"train.stop_after_epoch": 1}, clock=3600)
    for path in list_checkpoints(folder):
        os.utime(path, (0, 0))
    server.finish(folder, photos, clock=100_000)
    assert_same_end(tmp_path / "whole", folder)
    told = [entry["status"] for entry in read_status(folder / "status.json")]
    assert told == ["STARTED", "RUNNING", "SUCCESS", "STARTED", "RUNNING", "RUNNING", "SUCCESS"]
    assert torch.load(folder / "model_best.pth", weights_only=True)["progress"]["best"] is not None
