from __future__ import annotations

from pathlib import Path

import pytest

from openmae.data.corrupt import CorruptFiles
from openmae.data.index import ImageIndex
from openmae.errors import DataError


def index_of(folder: Path, count: int) -> ImageIndex:
    return ImageIndex(folder, tuple(f"{i:03}.png" for i in range(count)))


def test_corrupt_files_are_counted_once_and_listed(tmp_path: Path) -> None:
    index = index_of(tmp_path / "set", 100)
    ranks = [CorruptFiles(index, tmp_path / "out", max_fraction=0.02) for _ in range(2)]
    ranks[0].record([])
    assert not (tmp_path / "out").exists()
    ranks[0].record([("003.png", "truncated")])
    ranks[1].record([("003.png", "truncated"), ("007.png", "empty")])
    ranks[0].record([("007.png", "empty")])
    assert [rank.count for rank in ranks] == [2, 2]
    listed = (tmp_path / "out" / "corrupt_files.txt").read_text()
    assert listed == f"{tmp_path}/set/003.png\ttruncated\n{tmp_path}/set/007.png\tempty\n"


def test_too_many_corrupt_files_end_the_run(tmp_path: Path) -> None:
    record = CorruptFiles(index_of(tmp_path / "set", 100), tmp_path, max_fraction=0.01)
    record.record([("003.png", "truncated")])
    with pytest.raises(DataError) as caught:
        record.record([("009.png", "cannot identify")])
    text = str(caught.value)
    assert f"2 of 100 images in {tmp_path}/set are corrupt (2.00%)" in text
    assert "more than dataset.max_corrupt_fraction=0.01 allows; the latest: " in text
    assert f"009.png (cannot identify).\n  Fix: Replace or remove the files listed in {tmp_path}" in text


def test_a_set_of_corrupt_files_ends_the_run_whatever_is_allowed(tmp_path: Path) -> None:
    record = CorruptFiles(index_of(tmp_path / "set", 2), tmp_path, max_fraction=1.0)
    record.record([("000.png", "truncated")])
    with pytest.raises(DataError, match=r"2 of 2 images in .* are corrupt \(100.00%\), so none is left; the latest"):
        record.record([("001.png", "truncated")])


def test_sets_share_the_list_but_not_the_count(tmp_path: Path) -> None:
    train = CorruptFiles(index_of(tmp_path / "train", 100), tmp_path, max_fraction=0.01)
    val = CorruptFiles(index_of(tmp_path / "val", 100), tmp_path, max_fraction=0.01)
    train.record([("001.png", "x")])
    val.record([("001.png", "x")])
    assert (train.count, val.count) == (1, 1)
