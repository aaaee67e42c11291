from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from openmae.data.index import ImageIndex, index_folder, skipped_files_table
from openmae.errors import DataError

MakeImages = Callable[..., Path]


def test_class_folders(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["dog/2.png", "cat/in/1.png", "cat/0.png"])
    for labelled in (True, None):
        index = index_folder(tmp_path, labelled)
        assert index == ImageIndex(tmp_path, ("cat/0.png", "cat/in/1.png", "dog/2.png"), (0, 0, 1), ("cat", "dog"))
    assert index_folder(tmp_path, False).labels is None
    assert index.file(2) == tmp_path / "dog/2.png"
    assert len(index) == 3


def test_single_inner_folder_is_indexed(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["images_train/data/dog/2.png", "images_train/data/cat/1.png"])
    (tmp_path / ".openmae-complete").touch()
    index = index_folder(tmp_path, True)
    assert index.root == tmp_path / "images_train/data"
    assert index.class_names == ("cat", "dog")


def test_one_class_folder(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["cat/1.png", "cat/2.png"])
    assert index_folder(tmp_path, True).class_names == ("cat",)
    assert index_folder(tmp_path, None).labels is None


def test_loose_images_have_no_labels(tmp_path: Path, make_images: MakeImages, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, ["cat/1.png", "dog/1.png", "x.png"])
    index = index_folder(tmp_path, None)
    assert (index.class_names, index.labels, index.unlabelled) == (("cat", "dog"), (0, 1, -1), [2])
    assert "1 of 3 images are outside of the 2 class folders and have no label: x.png." in caplog.text
    with pytest.raises(DataError) as caught:
        index_folder(tmp_path, True)
    assert "1 of 3 images are outside of class folders, such as x.png; no labels.csv" in str(caught.value)
    assert "one folder per class (cat/1.jpg, dog/2.jpg), or a labels.csv with columns path,label" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["2023/a", "2024/b"], "the folders 2023, 2024 are dates"),
        (["2024/01/a", "2024/02/b"], "the folders 01, 02 are dates"),
        (["2024-01 Rome/a", "2024-02-11/b"], "the folders 2024-01 Rome, 2024-02-11 are dates"),
        (["100CANON/a", "101CANON/b"], "the folders 100CANON, 101CANON are named by a camera"),
    ],
)
def test_folders_that_are_not_classes(
    tmp_path: Path, make_images: MakeImages, caplog: pytest.LogCaptureFixture, names: list[str], why: str
) -> None:
    make_images(tmp_path, [f"{name}.png" for name in names])
    assert index_folder(tmp_path, None).labels is None
    assert f"{why}, so they are not used as classes." in caplog.text
    caplog.clear()
    assert len(index_folder(tmp_path, True).class_names) == len(names), "whoever asks for classes gets them"
    assert f"{why}, but they are used as classes." in caplog.text


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (("train", "val"), "dataset.train_data_sources={}/train dataset.val_data_sources={}/val"),
        (("Test", "train", "valid"), "dataset.train_data_sources={}/train dataset.val_data_sources={}/valid"),
        (
            ("images_test", "images_train"),
            "dataset.train_data_sources={}/images_train dataset.val_data_sources={}/images_test",
        ),
        (("eval", "test"), "dataset.val_data_sources={}/eval"),
    ],
)
def test_splits_are_not_classes(
    tmp_path: Path, make_images: MakeImages, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], keys: str
) -> None:
    make_images(tmp_path, [f"{name}/cat/1.png" for name in names])
    assert index_folder(tmp_path, None).labels is None
    assert (
        f"{tmp_path}: the folders {', '.join(names)} look like the splits of a data set, so they are not used as "
        "classes. To read one split, name its folder."
    ) in caplog.text
    with pytest.raises(DataError) as caught:
        index_folder(tmp_path, True)
    assert (
        caught.value.problem
        == f"The only class folders of {tmp_path} are {' and '.join(names)}, the splits of a data set."
    )
    assert caught.value.fix == f"Set {keys.format(tmp_path, tmp_path)}."
    with pytest.raises(DataError, match=r"Fix: Use each split as a separate source, such as a folder"):
        index_folder(tmp_path, True, "photos.zip")
    make_images(tmp_path, ["cat/1.png"])
    assert len(index_folder(tmp_path, True).class_names) == len(names) + 1, "one of several classes may be named test"


@pytest.mark.parametrize(
    "names",
    [
        ["0", "1"],
        ["01", "12"],
        ["may", "bee"],
        ["n01440764", "n01443537"],
        ["1999", "x"],
        ["2011 Ford", "2012 Tesla"],
        ["marble", "octagon"],
        ["marigold", "junco"],
        ["12345678", "12345679"],
    ],
)
def test_folders_that_may_be_classes(tmp_path: Path, make_images: MakeImages, names: list[str]) -> None:
    make_images(tmp_path, [f"{name}/1.png" for name in names])
    assert index_folder(tmp_path, None).class_names == tuple(sorted(names))


def test_class_names_that_differ_only_in_case(
    tmp_path: Path, make_images: MakeImages, caplog: pytest.LogCaptureFixture
) -> None:
    make_images(tmp_path, ["Cat/1.png", "cat/1.png", "caf\u00e9/1.png", "cafe\u0301/2.png"])
    index = index_folder(tmp_path, True)
    assert index.class_names == ("Cat", "caf\u00e9", "cat"), "two forms of one name are one class"
    assert "differ only in upper and lower case, and are different classes: 'Cat' and 'cat'." in caplog.text


def test_class_names_can_be_written(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, [f"{os.fsdecode(name)}/1.png" for name in (b"caf\xe9", b"a\nb")])
    assert index_folder(tmp_path, True).class_names == ("a\\x0ab", "caf\\xe9")


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "a.svg").touch()
    with pytest.raises(DataError, match="holds no images") as caught:
        index_folder(tmp_path, None)
    assert " bmp gif " in caught.value.problem


@pytest.mark.parametrize("name", ["Labels.csv", "labels.tsv", "label.csv", "labels.xlsx"])
def test_table_with_another_name_is_reported(
    tmp_path: Path, make_images: MakeImages, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    make_images(tmp_path, ["cat/1.png", "dog/1.png"])
    (tmp_path / name).touch()
    index_folder(tmp_path, None)
    assert f"{tmp_path}/{name} is not read. Labels are only read from a table named labels.csv." in caplog.text


def test_archives_instead_of_images(tmp_path: Path) -> None:
    for name in ("s-0.tar.gz", "s-1.tar.gz"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"holds no images \(.*\), but 2 .tar.gz \(such as s-0.tar.gz\)") as caught:
        index_folder(tmp_path, None)
    assert caught.value.fix.startswith(f"Name one archive ({tmp_path}/s-0.tar.gz); it is extracted.")
    assert "decompress them into plain .tar files" in caught.value.fix


def test_report_lists_skipped_files(tmp_path: Path, make_images: MakeImages) -> None:
    assert skipped_files_table([index_folder(make_images(tmp_path / "a", ["1.png"]), None)]) == []
    (tmp_path / "a" / "x.svg").touch()
    (table,) = skipped_files_table([index_folder(tmp_path / "a", None)])
    assert table.rows == [[str(tmp_path / "a"), ".svg", 1, "x.svg", "render them to PNG"]]
