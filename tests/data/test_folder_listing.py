"""Listing of folders: images, skipped files and results."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from openmae.data.folder_listing import SkippedFiles, describe_skipped, file_kind, list_folder
from openmae.data.index import index_folder
from openmae.data.open import open_index
from openmae.errors import DataError


def touch(folder: Path, *names: str) -> Path:
    """Write empty files; an index only needs names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def kinds(folder: Path) -> dict[str, tuple[int, str]]:
    return {kind.kind: (kind.count, kind.example) for kind in list_folder(folder).skipped}


def test_images_are_sorted_and_hidden_files_skipped(tmp_path: Path) -> None:
    wanted = ["B/2.JPG", "a.jpeg", "b/deep/er/1.png", "c.BMP", "d.tif", "e.tiff", "f.WebP"]
    touch(tmp_path, *wanted, ".hidden.png", ".git/x.png", "__MACOSX/._a.jpg", "__MACOSX/b.jpg", "notes.txt")
    assert list_folder(tmp_path).images == sorted(wanted)
    assert kinds(tmp_path) == {".txt": (1, "notes.txt")}


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "1.png")
    touch(tmp_path / "set", "0.png")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert list_folder(tmp_path / "set").images == ["0.png", "link/1.png"]
    assert kinds(tmp_path / "set") == {"link to a folder that is read already": (1, "loop")}


def test_a_folder_is_read_under_its_real_name(tmp_path: Path) -> None:
    touch(tmp_path, "zebra/1.png", "dog/1.png")
    (tmp_path / "alias").symlink_to("zebra")
    assert list_folder(tmp_path).images == ["dog/1.png", "zebra/1.png"]


def test_broken_links(tmp_path: Path) -> None:
    touch(tmp_path, "0.png")
    for name, target in (("1.png", "gone.png"), ("folder", "/nowhere/x"), ("self", "self"), ("me.png", "me.png")):
        (tmp_path / name).symlink_to(target)
    assert list_folder(tmp_path).images == ["0.png", "1.png", "me.png"], "missing images count as corrupt later"
    assert kinds(tmp_path) == {"broken link": (2, "folder")}


def test_skipped_files_are_counted_by_kind(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "a/1.jpg",
        "a/2.CR2",
        "a/1.cr2",
        "b.svg",
        "README",
        "x.tar.gz",
        "y.gz",
        "labels.csv",
        "s.tar.index.json",
    )
    touch(tmp_path, os.fsdecode(b"caf\xe9.svg"))
    assert kinds(tmp_path) == {
        ".cr2": (2, "a/1.cr2"),
        ".svg": (2, "b.svg"),
        ".gz": (1, "y.gz"),
        ".tar.gz": (1, "x.tar.gz"),
        "without a suffix": (1, "README"),
    }
    assert file_kind("a.b/C.TAR.GZ") == ".tar.gz"
    assert file_kind(os.fsdecode(b"a.\xe9")) == ".\\xe9"


def test_files_of_openmae_are_not_counted_as_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "labels.csv", "corrupt_files.txt", "s.tar.index.json")
    assert kinds(tmp_path) == {}


def test_a_source_is_found_by_its_printable_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path / os.fsdecode(b"caf\xe9"), "2024/1.jpg", "2025/1.jpg", "notes.txt")
    index = open_index(f"{tmp_path}/caf\\xe9", None)
    assert [text.partition(": ")[0] for text in caplog.messages] == [f"{tmp_path}/caf\\xe9"] * 2
    assert index.place == f"{tmp_path}/caf\\xe9"
    assert index.file(0).exists()


def test_long_lists_of_kinds_are_truncated() -> None:
    some = [SkippedFiles(f".{number}", 1, "x") for number in range(10)]
    assert describe_skipped(some).endswith("1 .7 (such as x) and 2 more kinds")


def test_skipped_files_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "1.jpg", "2.jpg", *(f"{number}.cr2" for number in range(3)), "notes.txt")
    index = open_index(str(tmp_path), False)
    assert len(index) == 2
    assert (
        f"{tmp_path}: 2 images are found; 4 files of other kinds are skipped: 3 .cr2 (such as 0.cr2), 1 .txt (such as "
        "notes.txt). To read them: .cr2: develop them to JPEG, PNG or TIFF." in caplog.text
    )


# -------------------------------------------------------------------------- folders that cannot be read


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def without_rights() -> Iterator[None]:
    """Act as another user than root, to whom permissions apply."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def deny_everything(folder: Path) -> None:
    folder.chmod(0)


def deny_listing(folder: Path) -> None:
    folder.chmod(0o311)


@pytest.mark.parametrize("deny", [deny_everything, deny_listing])
@pytest.mark.parametrize("name", ["set/dog", "set/cat/deep", "set"])
def test_folder_without_read_permission_is_an_error(shared: Path, name: str, deny: Callable[[Path], None]) -> None:
    touch(shared, "set/cat/1.png", "set/cat/deep/1.png", "set/dog/1.png")
    deny(shared / name)
    try:
        with without_rights(), pytest.raises(DataError, match=r"cannot be read \(Permission denied\)") as caught:
            open_index(str(shared / "set"), False)
    finally:
        (shared / name).chmod(0o755)
    assert str(shared / name) in caught.value.problem
    assert "chmod -R u+rX" in caught.value.fix


@pytest.mark.parametrize("name", ["set", "set.tar", "set/a.tar"])
def test_source_in_a_folder_without_permission_is_an_error(shared: Path, name: str) -> None:
    touch(shared, f"closed/{name}")
    (shared / "closed").chmod(0)
    try:
        with without_rights(), pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
            open_index(str(shared / "closed" / name), False)
    finally:
        (shared / "closed").chmod(0o755)


def test_disk_failure_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "cat/1.png", "dog/1.png")
    scandir = os.scandir

    def failing(path: Path) -> object:
        if Path(path).name == "dog":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(DataError, match=rf"The folder {tmp_path}/dog.? cannot be read \(Input/output error\), so its"):
        index_folder(tmp_path, None)


# ------------------------------------------------------------------------------------ results of OpenMAE

STATUS = json.dumps({"date": "1/1/2026", "time": "0:0:0", "status": "STARTED", "message": ""}) + "\n"


def as_run(folder: Path, *pictures: str) -> None:
    touch(folder, *(pictures or ("curves.png", "reconstructions/last.png")))
    (folder / "status.json").write_text(STATUS)


def test_results_below_the_source_are_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "1.png", "2.png")
    before = open_index(str(tmp_path), None).paths
    as_run(tmp_path / "results" / "train")
    as_run(tmp_path / "results" / "train-2026-11-30T14-05-09", "reconstructions/epoch_0001.png")
    as_run(tmp_path / "elsewhere", "history.png")
    touch(tmp_path / "jobs" / "7f", "job.json", "spec.yaml", "x.png")
    (touch(tmp_path / "check", "dataset.png") / "report.html").write_text('<meta name="generator" content="OpenMAE 1">')
    (touch(tmp_path / "quick", "images/1.png") / "README.txt").write_text("made by mae quickstart")
    index = open_index(str(tmp_path), None)
    assert index.paths == before
    runs = ("results/train", "results/train-2026-11-30T14-05-09")
    assert index.results == ("check", "elsewhere", "jobs/7f", "quick", *runs)
    text = "results of OpenMAE are not read as images: check, elsewhere, jobs/7f and 3 more."
    assert f"{tmp_path}: {text}" in caplog.text


def test_images_of_a_user_in_a_results_folder_are_read(tmp_path: Path) -> None:
    """As after `mae dataset check photos/cat --results_dir photos/cat`, or with results_dir=photos and photos/train."""
    touch(tmp_path, "cat/1.png", "dog/1.png", "train/owl/1.png")
    as_run(tmp_path / "cat", "dataset.png")
    as_run(tmp_path / "train")
    listing = list_folder(tmp_path)
    assert listing.images == ["cat/1.png", "dog/1.png", "train/owl/1.png"]
    assert set(listing.results) == {"cat", "train"}


def test_system_folders_are_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "lost+found/2.png", "$RECYCLE.BIN/3.png")
    assert list_folder(tmp_path).images == ["1.png"]


def test_results_in_the_source_itself_are_not_read(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "dog/1.png")
    as_run(tmp_path)
    listing = list_folder(tmp_path)
    assert listing.images == ["cat/1.png", "dog/1.png"]
    assert listing.results == (".",)


def test_results_do_not_affect_a_single_inner_folder(tmp_path: Path) -> None:
    touch(tmp_path, "images/cat/1.png", "images/dog/1.png")
    before = index_folder(tmp_path, None)
    as_run(tmp_path / "results" / "train")
    assert index_folder(tmp_path, None) == before
    assert before.class_names == ("cat", "dog")


@pytest.mark.parametrize("content", ["", "{}", "[1]", "[" * 3000, '{"status": "STARTED"}\n'])
def test_status_file_of_another_program_is_no_sign_of_results(tmp_path: Path, content: str) -> None:
    touch(tmp_path, "a/1.png")
    (tmp_path / "a" / "status.json").write_text(content)
    assert list_folder(tmp_path).images == ["a/1.png"]


def test_source_with_only_results(tmp_path: Path) -> None:
    as_run(tmp_path / "results" / "train")
    with pytest.raises(DataError, match="results/train holds results of OpenMAE, which are not read as images"):
        index_folder(tmp_path, None)
