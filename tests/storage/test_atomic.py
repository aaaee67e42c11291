"""Errors of disks: the path and the fix are named."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from openmae.errors import DataError, RunError, UserError
from openmae.storage.atomic import disk_errors, make_folder, write_atomically


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, r"Free space in /"),
        (errno.EDQUOT, r"Free space in /.* or have your quota raised"),
        (errno.EROFS, r"The file system at /.* is read-only: mount it with write access"),
        (errno.EIO, r"Check the disk or the file server of /"),
        (errno.ESTALE, r"Check the disk or the file server of /"),
    ],
)
def test_disk_errors_name_the_path_and_the_fix(tmp_path: Path, number: int, fix: str) -> None:
    path = tmp_path / "not there" / "file"
    with (
        pytest.raises(RunError, match=rf"{path} could not be written \({os.strerror(number)}\)\.\n  Fix: {fix}"),
        disk_errors(path),
    ):
        raise OSError(number, os.strerror(number))
    with (
        pytest.raises(RunError, match=r"The results could not be written \(.*\): /other/file\."),
        disk_errors(path, key="results_dir"),
    ):
        raise OSError(number, os.strerror(number), "/other/file")


def test_a_denied_permission_without_a_path_is_no_disk_error(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"/x/y could not be written \(Permission denied\)\.\n  Fix: Give your user"),
        disk_errors(tmp_path),
    ):
        raise PermissionError(errno.EACCES, "Permission denied", "/x/y")
    with pytest.raises(PermissionError), disk_errors(tmp_path):
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as from sending a signal


def test_disk_errors_wrapped_by_a_library_are_recognised(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"could not be written \(No space left on device\)"), disk_errors(tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    wrapping = ValueError("cannot save")
    wrapping.__cause__ = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    with pytest.raises(RunError, match=r"could not be written \(Disk quota exceeded\)"), disk_errors(tmp_path):
        raise wrapping


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), ValueError("no"), DataError("a", "b")])
def test_other_errors_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_a_name_that_is_not_utf8_can_be_printed(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught, disk_errors(tmp_path):
        raise OSError(errno.EIO, "Input/output error", b"/x/\xff")
    str(caught.value).encode()


def test_the_error_names_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(RunError, match=rf"^{path} could not be written"), disk_errors(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / ".file.123.tmp"))


def test_a_folder_on_a_full_disk_is_a_run_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", full)
        with pytest.raises(RunError, match="No space left on device"):
            make_folder(tmp_path / "results")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"results_dir: cannot write to .*\(not a directory\)"):
        make_folder(tmp_path / "file" / "results")


def test_a_limit_on_the_size_of_files_is_reported(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with (
            pytest.raises(RunError, match=r"\(File too large\)\.\n  Fix: Raise the limit .*ulimit -f"),
            disk_errors(tmp_path / "file"),
        ):
            write_atomically(tmp_path / "file", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def no_inodes(tmp_path: Path) -> Iterator[Path]:
    """A file system with space but without inodes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=2", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a disk takes root")
    (place / "last").touch()
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.integration
def test_a_disk_without_inodes_is_distinguished_from_a_full_one(no_inodes: Path) -> None:
    path = no_inodes / "file"
    with (
        pytest.raises(RunError, match=rf"Fix: The file system at {no_inodes} has no inodes left: delete files there"),
        disk_errors(path),
    ):
        write_atomically(path, "text")
