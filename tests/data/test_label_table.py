"""Variants of labels.csv that are read, and errors for those that are not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from openmae.data.index import index_folder
from openmae.errors import DataError

MakeImages = Callable[..., Path]


def test_labels_table(tmp_path: Path, make_images: MakeImages, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, ["x/1.png", "2.png", "3.png", "left out.png"])
    (tmp_path / "labels.csv").write_text(
        'path, label, note\n3.png,ten,b\n./2.png,9,\n"x/1.png",ten,a\n', encoding="utf-8-sig"
    )
    index = index_folder(tmp_path, None)
    assert index.paths == ("2.png", "3.png", "x/1.png")
    assert index.labels == (0, 1, 1)
    assert index.class_names == ("9", "ten")
    assert "1 image is not in the table and is left out: left out.png." in caplog.text


def test_integer_labels_are_ordered_by_value(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["1.png", "2.png"])
    (tmp_path / "labels.csv").write_text("path,label\n1.png,10\n2.png,9\n")
    assert index_folder(tmp_path, True).class_names == ("9", "10")


BAD_TABLES = {
    "missing files": (
        "path,label\n1.png,a\nb.png,a\nc.png,a\nd.png,b\ne.png,b\n",
        "names 4 of 5 files that do not exist: b.png, c.png, d.png and 1 more.",
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
    "not utf-8": (
        "path,label\n1.png,k\u00e4se\n".encode("latin1"),
        "is not a UTF-8 table: line 2 contains the byte 0xe4; in Windows-1252 or Latin-1 "
        "it would read '1.png,k\u00e4se'.",
    ),
    "utf-16 without a mark": ("path,label\n1.png,a\n".encode("utf-16-le"), "perhaps UTF-16 without a byte order mark"),
    "windows path": ("path,label\nC:\\x\\1.png,a\n", "line 2: C:\\x\\1.png is not below the folder of the table"),
    "outside, backslashes": ("path,label\n..\\1.png,a\n", "line 2: ..\\1.png is not below the folder of the table"),
    "absolute": ("path,label\n/1.png,a\n", "line 2: /1.png is not below the folder of the table"),
    "case differs": (
        "path,label\n1.PNG,a\n",
        "do not exist: 1.PNG. 1.png exists, but its upper and lower case or Unicode form differs.\n"
        "  Fix: Write 1.png instead of 1.PNG, and so on.",
    ),
    "no suffix": ("path,label\n1,a\n", "do not exist: 1. 1.png exists, but its suffix differs."),
    "no folder": ("path,label\nin.png,a\n", "do not exist: in.png. x/in.png exists, but it is in a folder."),
    "other columns": (
        "image_id,label\n1,a\n",
        "found: image_id, label.\n  Fix: Rename the column of image paths (with suffix: cat/1.jpg) to path",
    ),
    "comma in a path": (
        "path,label\na,b.png,cat\n",
        "line 2 has 3 cells, but the first line names 2 columns.\n  Fix: Put a path or label that contains ','",
    ),
    "no image": (
        "path,label\n1.png,a\nreadme.txt,a\n",
        "names 1 of 2 files that are not read as images: readme.txt.",
    ),
    "open quote": ('path,label\n"1.png,a\n2.png,b\n', ": a quote that is opened before line 3 is not closed: '1.png,a"),
}


@pytest.mark.parametrize(("table", "text"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_bad_labels_table(tmp_path: Path, make_images: MakeImages, table: str | bytes, text: str) -> None:
    make_images(tmp_path, ["1.png", "x/in.png"])
    (tmp_path / "readme.txt").touch()
    (tmp_path / "labels.csv").write_bytes(table.encode() if isinstance(table, str) else table)
    with pytest.raises(DataError) as caught:
        index_folder(tmp_path, True)
    assert text in str(caught.value)
    assert caught.value.fix


ROWS = [("cat/0.png", "a"), ("cat/1.png", "a"), ("dog/0.png", "b"), ("dog/1.png", "b")]


def table(header: str = "path,label", row: str = "{path},{label}", end: str = "\n") -> str:
    return "".join(f"{line}{end}" for line in [header, *(row.format(path=path, label=label) for path, label in ROWS)])


@pytest.mark.parametrize(
    "content",
    [
        table(end="\r\n").encode("utf-8-sig"),
        table("path;label", "{path};{label}"),
        "sep=;\r\n" + table("path;label", "{path};{label}", "\r\n"),
        table("path\tlabel", "{path}\t{label}"),
        table("path\tlabel", "{path}\t{label}").encode("utf-16"),
        table("path|label", "{path}|{label}"),
        table('"path","label"', '"{path}","{label}"'),
        table(row="./{path},{label}"),
        table(",path,label", "7,{path},{label}"),
        table("Path,LABEL"),
        table("label,path", "{label},{path}"),
        table("path,label,", "{path},{label},"),
        table(row="{path},{label},"),
        table("path, label", "{path}, {label} "),
        table(end="\n\n"),
        table().replace("/", "\\"),
        table().replace("cat", "{folder}/cat"),
    ],
)
def test_table_variants(tmp_path: Path, make_images: MakeImages, content: str | bytes) -> None:
    make_images(tmp_path, [path for path, _ in ROWS])
    text = content.replace("{folder}", str(tmp_path)).encode() if isinstance(content, str) else content
    (tmp_path / "labels.csv").write_bytes(text)
    index = index_folder(tmp_path, True)
    assert index.paths == tuple(path for path, _ in ROWS)
    assert (index.class_names, index.labels, index.labelled_by) == (("a", "b"), (0, 0, 1, 1), "labels.csv")


@pytest.mark.parametrize(
    ("labels", "classes", "notice"),
    [
        (("0.0", "10.0", "2.0"), ("0", "2", "10"), "labels such as 0.0 are read as integers"),
        (("0.0", "0.5", "1.0"), ("0.0", "0.5", "1.0"), ""),
        (("-10", "-1", "0"), ("-10", "-1", "0"), "-1 is used as a class. If it means 'no label', remove"),
        (
            ("a", "A", "b"),
            ("A", "a", "b"),
            "differ only in upper and lower case, and are different classes: 'A' and 'a'",
        ),
    ],
)
def test_suspicious_labels(
    tmp_path: Path,
    make_images: MakeImages,
    caplog: pytest.LogCaptureFixture,
    labels: tuple[str, ...],
    classes: tuple[str, ...],
    notice: str,
) -> None:
    make_images(tmp_path, ["1.png", "2.png", "3.png"])
    rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels, 1))
    (tmp_path / "labels.csv").write_text(f"path,label\n{rows}")
    assert index_folder(tmp_path, True).class_names == classes
    assert notice in caplog.text
    assert bool(notice) == bool(caplog.text)


def test_repeated_rows_are_counted(tmp_path: Path, make_images: MakeImages, caplog: pytest.LogCaptureFixture) -> None:
    make_images(tmp_path, ["1.png", "2.png"])
    (tmp_path / "labels.csv").write_text("path,label\n1.png,a\n2.png,b\n./1.png,a\n")
    assert len(index_folder(tmp_path, True)) == 2
    assert "1 row repeats an earlier one, such as that of ./1.png; each image is used once." in caplog.text


def test_names_that_are_not_utf8_can_be_written(tmp_path: Path, make_images: MakeImages) -> None:
    names = [os.fsdecode(name) for name in (b"caf\xe9.png", b"new\nline.png", b"a\\b.png")]
    make_images(tmp_path, names)
    rows = "caf\\xe9.png,a\nnew\\x0aline.png,a\na\\b.png,b\n"
    (tmp_path / "labels.csv").write_text(f"path,label\n{rows}")
    assert index_folder(tmp_path, True).paths == tuple(sorted(names))


def test_a_file_without_a_suffix_may_be_listed(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["1.png"])
    (tmp_path / "1.png").rename(tmp_path / "1")
    (tmp_path / "x.png").touch()
    (tmp_path / "labels.csv").write_text("path,label\n1,a\n")
    assert index_folder(tmp_path, True).paths == ("1",)
