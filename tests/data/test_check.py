"""``mae dataset check``."""

from __future__ import annotations

import io
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from openmae.cli.main import main
from openmae.data.index import index_folder
from openmae.data.shards.packing import PackOptions, pack


def test_check_of_a_folder(photos: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    (photos / "cat" / "3.png").write_bytes(b"broken")
    same = (photos / "cat" / "0.png").read_bytes()
    (photos / "cat" / "again.png").write_bytes(same)
    (photos / "dog" / "again.png").write_bytes(same)
    Image.new("L", (10, 30)).save(photos / "dog" / "0.jpg")
    assert main(["dataset", "check", str(photos), "--results_dir", str(tmp_path / "results")]) == 0
    rows = dict(re.findall(r"│ (\S[\w ]*?) +│ (.*?) +│", capsys.readouterr().out))
    assert rows == {
        "images": "17",
        "classes": "2, of 8 to 9 (median 8) images; taken from the folders cat, dog",
        "width": "10 to 48 (median 48) pixels",
        "height": "30 to 40 (median 40) pixels",
        "file size": rows["file size"],
        "format": "PNG RGB 15, JPEG L 1",
        "corrupt": f"1 (5.88%): {photos}/cat/3.png",
        "duplicate": "2 (1 group with equal content)",
        "contradictory": "1 group of duplicates are in several class folders",
    }
    results = tmp_path / "results"
    assert (results / "corrupt_files.txt").read_text().startswith(f"{photos}/cat/3.png\tits content is not an image")
    group = [f"{photos}/{name}" for name in ("cat/0.png", "cat/again.png", "dog/again.png")]
    assert (results / "duplicate_files.txt").read_text() == "\t".join(group) + "\n"
    page = (results / "report.html").read_text()
    assert all(text in page for text in ("Corrupt files", "Duplicates", "dog/again.png", "data:image/png"))
    with Image.open(results / "dataset.png") as image_file:
        assert image_file.width > 1.5 * image_file.height


def test_class_names_that_are_not_utf8_are_escaped_once(photos: Path, tmp_path: Path, capsys: Any) -> None:
    (photos / "cat").rename(photos / os.fsdecode(b"c\xe9"))
    assert main(["dataset", "check", str(photos), "--results_dir", str(tmp_path)]) == 0
    assert "c\\xe9, dog" in " ".join(capsys.readouterr().out.split())


def test_check_of_shards(photos: Path, tmp_path: Path, capsys: Any) -> None:
    packed = pack(index_folder(photos, True), tmp_path / "out", PackOptions(shard_bytes=20_000))
    with tarfile.open(tmp_path / "out" / "out-000005.tar", "w") as tar:
        for name, content in (("x/1.png", (photos / "cat/0.png").read_bytes()), ("x/1.cls", b"emu"), ("x/1.npy", b"")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert main(["dataset", "check", str(tmp_path / "out"), "--results_dir", str(tmp_path / "results")]) == 0
    out = capsys.readouterr().out
    assert len(packed.shards) == 5
    for text in ("6, of 1 to 3 (median", "1, which are not read: 1 .npy", "3, of 1 to 7", "1 (1 group with equal"):
        assert text in out, f"{text} is not in\n{out}"


def test_check_without_readable_images(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "1.png").write_bytes(b"")
    assert main(["dataset", "check", str(tmp_path / "set"), "--results_dir", str(tmp_path / "results")]) == 0
    assert "1 (100.00%)" in capsys.readouterr().out
    assert (tmp_path / "results" / "dataset.png").exists()


@pytest.fixture
def photos(tmp_path: Path, make_images: Any) -> Path:
    return make_images(tmp_path / "photos", [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(7)])
