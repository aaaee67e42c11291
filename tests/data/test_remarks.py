"""Multi-page files and Pillow's warnings: one notice per run, not one per image, epoch and process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from openmae.actions.dataset import check_source, pack_source
from openmae.data.index import index_folder
from openmae.data.loaders import EvaluationLoader, LoaderSettings, TrainingLoader
from openmae.data.shards.packing import PackOptions
from openmae.data.transforms import EvalTransform, PretrainTransform

MakeImages = Callable[..., Path]
LISTED = "`mae dataset check` lists all such images."


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
@pytest.mark.filterwarnings("error")
def test_a_training_reports_each_kind_once(
    odd: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    index = index_folder(odd, False)
    settings = LoaderSettings(2, tmp_path / "results", 0.0, num_workers=workers)
    loader = TrainingLoader(index, PretrainTransform((16, 16)), settings, seed=0)
    for epoch in range(3):
        assert len(list(loader.from_position(epoch, 0))) == 5
    pages = [text for text in caplog.messages if "pages" in text]
    some = [f"{odd / name}: it has several pages; only the first is read. {LISTED}" for name in ("a.tif", "b.tif")]
    assert len(pages) == 1
    assert pages[0] in some
    warned = [text for text in caplog.messages if "Pillow warn" in text]
    assert len(warned) == 1
    assert "jpg: Pillow warns: Corrupt EXIF data." in warned[0]
    assert "Warning" not in capfd.readouterr().err, "a process printed a warning of Pillow"


def test_an_evaluation_reports_each_kind_once(odd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = LoaderSettings(4, tmp_path / "results", 0.0)
    loader = EvaluationLoader(index_folder(odd, False), EvalTransform((16, 16)), settings)
    loader.first(10)
    for _ in range(2):
        assert sum(len(batch.images) for batch in loader) == 10
    assert caplog.messages[0] == f"{odd / 'a.tif'}: it has several pages; only the first is read. {LISTED}"
    assert len(caplog.messages) == 2


def test_ordinary_images_are_not_remarked_on(
    tmp_path: Path, make_images: MakeImages, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_images(tmp_path / "set", ["1.png", "2.png", "3.tif"])
    settings = LoaderSettings(2, tmp_path / "results", 0.0)
    assert list(EvaluationLoader(index_folder(folder, False), EvalTransform((16, 16)), settings))
    assert caplog.messages == []


def test_dataset_check_lists_them(odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_source(str(odd), tmp_path / "results")
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "several pages 2, of which only the first is read" in said
    assert "Pillow warnings 2, such as" in said
    rows = dict(line.split("\t") for line in (tmp_path / "results" / "remarks.txt").read_text().splitlines())
    assert [Path(name).name for name in rows] == ["a.tif", "b.tif", "c.jpg", "d.jpg"]
    assert rows[str(odd / "b.tif")] == "it has several pages; only the first is read"
    assert "several pages" in (tmp_path / "results" / "report.html").read_text()


def test_packing_reports_them(odd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed = pack_source(str(odd), tmp_path / "packed", PackOptions(size=20))
    assert (packed.images, packed.corrupt) == (10, [])
    assert f"{odd / 'a.tif'}: it has several pages; only the first is read." in caplog.text
