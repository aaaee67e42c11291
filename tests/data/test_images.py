from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from openmae.data.images import ImageIndex, find_images, index_images
from openmae.errors import DataError

MakeImages = Callable[..., Path]

# ---------------------------------------------------------------------------------------------- index


def test_find_images_sorted_any_case_no_hidden(tmp_path: Path, make_images: MakeImages) -> None:
    wanted = ["B/2.JPG", "a.jpeg", "b/deep/er/1.png", "c.BMP", "d.tif", "e.tiff", "f.WebP"]
    make_images(tmp_path, [*wanted, ".hidden.png", ".git/x.png", "__MACOSX/._a.jpg", "__MACOSX/b.jpg"])
    (tmp_path / "notes.txt").touch()
    assert find_images(tmp_path) == sorted(wanted)


def test_find_images_follows_links_without_going_round(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path / "elsewhere", ["1.png"])
    make_images(tmp_path / "set", ["0.png"])
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert find_images(tmp_path / "set") == ["0.png", "link/1.png"]


def test_class_folders(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["dog/2.png", "cat/in/1.png", "cat/0.png"])
    for labelled in (True, None):
        index = index_images(tmp_path, labelled)
        assert index == ImageIndex(tmp_path, ("cat/0.png", "cat/in/1.png", "dog/2.png"), (0, 0, 1), ("cat", "dog"))
    assert index_images(tmp_path, False).labels is None
    assert index.file(2) == tmp_path / "dog/2.png"
    assert len(index) == 3


def test_wrapping_folder_is_stepped_into(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["images_train/data/dog/2.png", "images_train/data/cat/1.png"])
    (tmp_path / ".openmae-complete").touch()
    index = index_images(tmp_path, True)
    assert index.root == tmp_path / "images_train/data"
    assert index.class_names == ("cat", "dog")


def test_one_class_folder(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["cat/1.png", "cat/2.png"])
    assert index_images(tmp_path, True).class_names == ("cat",)
    assert index_images(tmp_path, None).labels is None


def test_loose_images_have_no_labels(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["cat/1.png", "dog/1.png", "x.png"])
    assert index_images(tmp_path, None).labels is None
    with pytest.raises(DataError) as caught:
        index_images(tmp_path, True)
    assert "1 of 3 images lie outside of class folders, such as x.png; no labels.csv" in str(caught.value)
    assert "one folder per class (cat/1.jpg, dog/2.jpg), or a labels.csv with columns path,label" in str(caught.value)


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "a.svg").touch()
    with pytest.raises(DataError, match="holds no images") as caught:
        index_images(tmp_path, None)
    assert " bmp gif " in caught.value.problem


def test_labels_table(tmp_path: Path, make_images: MakeImages, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, ["x/1.png", "2.png", "3.png", "left out.png"])
    (tmp_path / "labels.csv").write_text(
        'path, label, note\n3.png,ten,b\n./2.png,9,\n"x/1.png",ten,a\n', encoding="utf-8-sig"
    )
    index = index_images(tmp_path, None)
    assert index.paths == ("2.png", "3.png", "x/1.png")
    assert index.labels == (0, 1, 1)
    assert index.class_names == ("9", "ten")
    assert "1 images are not in the table" in caplog.text


def test_integer_labels_are_ordered_by_value(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["1.png", "2.png"])
    (tmp_path / "labels.csv").write_text("path,label\n1.png,10\n2.png,9\n")
    assert index_images(tmp_path, True).class_names == ("9", "10")


BAD_TABLES = {
    "missing files": (
        "path,label\n1.png,a\nb.png,a\nc.png,a\nd.png,b\ne.png,b\n",
        "names 4 of 5 files that do not exist: b.png, c.png, d.png.",
    ),
    "no header": (
        "1.png,a\n",
        "must begin with a line that names the columns path and label; found: 1.png, a",
    ),
    "empty": ("", "found: nothing"),
    "no rows": ("path,label\n", "has no rows"),
    "empty label": ("path,label\n1.png,\n", "line 2: path '1.png' and label '' must not be empty"),
    "short row": ("path,label\n1.png\n", "line 2: path '1.png' and label '' must not be empty"),
    "two labels": ("path,label\n1.png,a\n1.png,b\n", "line 3: 1.png is labelled 'b' here and 'a' above"),
    "outside": ("path,label\n../1.png,a\n", "line 2: ../1.png is not below the folder of the table"),
    "not utf-8": (b"path,label\n1.png,\xff\n", "is not a UTF-8 table"),
}


@pytest.mark.parametrize(("table", "text"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_bad_labels_table(tmp_path: Path, make_images: MakeImages, table: str | bytes, text: str) -> None:
    make_images(tmp_path, ["1.png"])
    (tmp_path / "labels.csv").write_bytes(table.encode() if isinstance(table, str) else table)
    with pytest.raises(DataError) as caught:
        index_images(tmp_path, True)
    assert text in str(caught.value)
    assert caught.value.fix
