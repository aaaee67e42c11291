from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from openmae.actions.dataset import check_source, pack_source
from openmae.data.corrupt import CorruptFiles
from openmae.data.index import ImageIndex, index_folder
from openmae.data.loaders import EvaluationLoader, LoaderSettings, TrainingLoader
from openmae.data.shards.packing import PackOptions
from openmae.data.transforms import EvalTransform, PretrainTransform
from openmae.errors import DataError

MakeImages = Callable[..., Path]
PAGES = "has several pages, of which only the first is read. `mae dataset check` lists all such files."


def index_of(folder: Path, count: int) -> ImageIndex:
    return ImageIndex(folder, tuple(f"{i:03}.png" for i in range(count)))


def test_corrupt_files_are_counted_once_and_listed(tmp_path: Path) -> None:
    index = index_of(tmp_path / "set", 100)
    ranks = [CorruptFiles(index, tmp_path / "out", max_fraction=0.02) for _ in range(2)]
    ranks[0].record([])
    assert not (tmp_path / "out").exists()
    ranks[0].record([(3, "truncated")])
    ranks[1].record([(3, "truncated"), (7, "empty")])
    ranks[0].record([(7, "empty")])
    assert [rank.count for rank in ranks] == [2, 2]
    listed = (tmp_path / "out" / "corrupt_files.txt").read_text()
    assert listed == f"{tmp_path}/set/003.png\ttruncated\n{tmp_path}/set/007.png\tempty\n"


def test_too_many_corrupt_files_end_the_run(tmp_path: Path) -> None:
    record = CorruptFiles(index_of(tmp_path / "set", 100), tmp_path, max_fraction=0.01)
    record.record([(3, "truncated")])
    with pytest.raises(DataError) as caught:
        record.record([(9, "cannot identify")])
    text = str(caught.value)
    assert f"2 of 100 images in {tmp_path}/set are corrupt (2.00%)" in text
    assert "more than dataset.max_corrupt_fraction=0.01 allows; the latest: " in text
    assert f"009.png (cannot identify).\n  Fix: Replace or remove the files listed in {tmp_path}" in text


def test_run_ends_if_all_files_are_corrupt(tmp_path: Path) -> None:
    record = CorruptFiles(index_of(tmp_path / "set", 2), tmp_path, max_fraction=1.0)
    record.record([(0, "truncated")])
    with pytest.raises(DataError, match=r"2 of 2 images in .* are corrupt \(100.00%\), so none is left; the latest"):
        record.record([(1, "truncated")])


def test_data_sets_share_the_list_but_not_the_count(tmp_path: Path) -> None:
    train = CorruptFiles(index_of(tmp_path / "train", 100), tmp_path, max_fraction=0.01)
    val = CorruptFiles(index_of(tmp_path / "val", 100), tmp_path, max_fraction=0.01)
    train.record([(1, "x")])
    val.record([(1, "x")])
    assert (train.count, val.count) == (1, 1)


@pytest.fixture
def odd(tmp_path: Path, make_images: MakeImages) -> Path:
    """Six ordinary images, two TIFFs of three pages and two JPEGs with a broken EXIF block."""
    folder = make_images(tmp_path / "set", [f"{number}.png" for number in range(6)])
    page = Image.new("RGB", (48, 40), (200, 30, 40))
    for name in ("a.tif", "b.tif"):
        page.save(folder / name, save_all=True, append_images=[page, page])
    for name in ("c.jpg", "d.jpg"):
        page.save(folder / name, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_training_warns_of_several_pages_once(
    odd: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    index = index_folder(odd, False)
    settings = LoaderSettings(2, tmp_path / "results", 0.0, num_workers=workers)
    with closing(TrainingLoader(index, PretrainTransform((16, 16)), settings, seed=0)) as loader:
        for epoch in range(3):
            assert len(list(loader.from_position(epoch, 0))) == 5
    assert len(caplog.messages) == 1
    assert caplog.messages[0] in [f"{odd / name} {PAGES}" for name in ("a.tif", "b.tif")]
    assert "Warning" not in capfd.readouterr().err, "a process printed a warning of Pillow"


def test_evaluation_warns_of_several_pages_once(odd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = LoaderSettings(4, tmp_path / "results", 0.0)
    loader = EvaluationLoader(index_folder(odd, False), EvalTransform((16, 16)), settings)
    loader.first(10)
    for _ in range(2):
        assert sum(len(batch.images) for batch in loader) == 10
    assert caplog.messages == [f"{odd / 'a.tif'} {PAGES}"]


def test_ordinary_images_cause_no_warning(
    tmp_path: Path, make_images: MakeImages, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_images(tmp_path / "set", ["1.png", "2.png", "3.tif"])
    settings = LoaderSettings(2, tmp_path / "results", 0.0)
    assert list(EvaluationLoader(index_folder(folder, False), EvalTransform((16, 16)), settings))
    assert caplog.messages == []


def test_dataset_check_lists_files_with_several_pages(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_source(str(odd), tmp_path / "results")
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "several pages 2, of which only the first is read" in said
    rows = dict(line.split("\t") for line in (tmp_path / "results" / "remarks.txt").read_text().splitlines())
    assert rows == {str(odd / name): "several pages, of which only the first is read" for name in ("a.tif", "b.tif")}
    assert "several pages" in (tmp_path / "results" / "report.html").read_text()


def test_packing_warns_of_several_pages(odd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed = pack_source(str(odd), tmp_path / "packed", PackOptions(size=20))
    assert (packed.images, packed.corrupt) == (10, [])
    assert caplog.messages == [f"{odd / 'a.tif'} {PAGES}"]
