"""Sources that hold images, shards or both."""

from __future__ import annotations

import logging
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.shards import sharded

from openmae.data.folder_listing import SkippedFiles
from openmae.data.index import ImageIndex
from openmae.data.open import open_index
from openmae.errors import DataError


def test_a_folder_may_have_braces_in_its_name(tmp_path: Path, make_images: Any) -> None:
    make_images(tmp_path / "{a,b}", ["1.png"])
    assert len(open_index(str(tmp_path / "{a,b}"), None)) == 1


def test_a_folder_of_shards_is_a_source(index: ImageIndex, tmp_path: Path) -> None:
    sharded(index, tmp_path / "out")
    assert open_index(str(tmp_path / "out"), True).labels == index.labels


def test_shards_beside_an_image_are_read(index: ImageIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sharded(index, tmp_path / "out")
    shutil.copy(index.file(0), tmp_path / "out" / "preview.png")
    (tmp_path / "out" / "notes.txt").touch()
    found = open_index(str(tmp_path / "out"), True)
    assert found.labels == index.labels
    assert found.skipped == (SkippedFiles(".txt", 1, "notes.txt"),)
    assert f"{tmp_path}/out holds shards and also 1 image (preview.png): only the shards are read." in (caplog.text)


def test_a_tar_file_without_images_does_not_hide_the_images_beside_it(
    index: ImageIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(index.root, tmp_path / "both")
    (tmp_path / "clip.mp4").write_bytes(bytes(10**6))
    with tarfile.open(tmp_path / "both" / "videos.tar", "w") as tar:
        tar.add(tmp_path / "clip.mp4", "clip.mp4")
    assert open_index(str(tmp_path / "both"), True).labels == index.labels
    assert "both: its tar files hold no images (videos.tar); the images next to them are read." in caplog.text


def test_an_archive_beside_its_images_is_not_read(
    index: ImageIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(index.root, tmp_path / "both" / "images")
    with tarfile.open(tmp_path / "both" / "images.tar", "w") as tar:
        tar.add(index.root, "images")
    found = open_index(str(tmp_path / "both"), False)
    assert len(found) == len(index)
    assert found.paths[0] == "images/cat/0.png"
    assert "holds images and also 1 tar file (images.tar): only the images are read." in caplog.text


def test_messages_name_an_archive_as_the_user_does(
    tmp_path: Path, make_images: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make_images(tmp_path / "set", ["all/2023/1.png", "all/2024/1.png", "all/x.txt.png"])
    (tmp_path / "set" / "all" / "x.txt.png").rename(tmp_path / "set" / "all" / "notes.txt")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "set" / "all", "all")
    assert open_index(str(tmp_path / "a.tar.gz"), None).labels is None
    assert f"{tmp_path}/a.tar.gz/all: the folders 2023, 2024 are dates, so they are not used as classes." in caplog.text
    assert (
        f"{tmp_path}/a.tar.gz: 2 images are found; 1 file of another kind is skipped: 1 .txt (such as all/notes.txt)."
        in (caplog.text)
    )
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert not [text for text in warnings if "/cache/" in text]


def test_links_to_themselves_are_no_folders(tmp_path: Path, make_images: Any) -> None:
    make_images(tmp_path / "set", ["1.png"])
    (tmp_path / "set" / "a.tar").symlink_to("a.tar")
    assert open_index(str(tmp_path / "set"), None).skipped == (SkippedFiles("broken link", 1, "a.tar"),)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x").symlink_to("x")
    with pytest.raises(DataError, match=r"holds no images .*, but 1 broken link \(such as x\)"):
        open_index(str(tmp_path / "empty"), None)


def test_results_beside_shards_are_not_read(index: ImageIndex, tmp_path: Path) -> None:
    sharded(index, tmp_path / "out")
    (tmp_path / "out" / "results" / "train").mkdir(parents=True)
    shutil.copy(index.file(0), tmp_path / "out" / "results" / "train" / "curves.png")
    (tmp_path / "out" / "results" / "train" / "status.json").write_text('{"date": "", "time": "", "status": ""}\n')
    assert open_index(str(tmp_path / "out"), True).results == ("results/train",)
