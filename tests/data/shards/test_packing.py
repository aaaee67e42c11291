"""``mae dataset pack`` and ``check`` from the command line: what they write, say and refuse."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openmae.cli.main import main
from openmae.data.index import index_folder
from openmae.data.open import open_index
from openmae.data.shards.packing import PackOptions, pack
from openmae.errors import DataError, UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path, make_images: Any) -> Path:
    return make_images(tmp_path / "photos", [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(7)])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_shards_are_as_webdataset_has_them(photos: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "train"
    assert main(["dataset", "pack", str(photos), str(out)]) == 0
    assert f"14 images (2 classes) in 1 shard, {(out / 'train-000000.tar').stat().st_size / 1e6:.1f} MB" in (
        printed := capsys.readouterr().out
    )
    assert f"dataset.train_data_sources='{out}/train-{{000000..000000}}.tar'" in printed
    with tarfile.open(out / "train-000000.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:4]] == ["cat/0.png", "cat/0.cls", "cat/1.png", "cat/1.cls"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
        assert tar.extractfile("dog/6.cls").read() == b"1"  # type: ignore[union-attr]
        assert tar.extractfile("cat/0.png").read() == (photos / "cat/0.png").read_bytes()  # type: ignore[union-attr]
    assert sorted(path.name for path in out.iterdir()) == [
        ".packing.lock", "train-000000.tar", "train-000000.tar.index.json",
    ]  # fmt: skip


def test_the_same_images_give_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    index = index_folder(photos, True)
    for place in ("a", "b"):
        pack(index, tmp_path / place / "set", PackOptions(size=20, shard_bytes=9_000))
    first = files(tmp_path / "a" / "set")
    assert len(first) > 4
    assert first == files(tmp_path / "b" / "set")
    assert all(len(content) < 20_480 for name, content in first.items() if name.endswith(".tar"))


def test_an_earlier_pack_is_replaced_only_when_asked(photos: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    pack(index_folder(photos, True), out, PackOptions(shard_bytes=20_000))
    before = files(out)
    assert main(["dataset", "pack", str(photos), str(out)]) == 2
    assert "already holds 10 files of packed shards, such as out-000000.tar." in (said := capsys.readouterr().err)
    assert "pass --overwrite" in said
    assert files(out) == before
    assert main(["dataset", "pack", str(photos), str(out), "--overwrite"]) == 0
    assert set(files(out)) == {"out-000000.tar", "out-000000.tar.index.json"}
    assert len(open_index(str(out), True)) == 14


def test_a_pack_that_fails_leaves_what_was_there(photos: Path, tmp_path: Path) -> None:
    index, out = index_folder(photos, True), tmp_path / "out"
    pack(index, out, PackOptions())
    before = files(out)
    count = iter(range(100))

    def stop() -> None:
        if next(count) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(index, out, PackOptions(size=8), overwrite=True, advance=stop)
    assert files(out) == before
    assert not list(out.glob(".packing-*"))


def test_corrupt_files_are_left_out_and_listed(photos: Path, tmp_path: Path, capsys: Any) -> None:
    (photos / "cat" / "3.png").write_bytes((photos / "cat" / "3.png").read_bytes()[:-400])
    (photos / "dog" / "0.png").write_bytes(b"")
    out = tmp_path / "out"
    assert main(["dataset", "pack", str(photos), str(out)]) == 0
    assert f"Left out 2 corrupt files, listed in {out}/corrupt_files.txt" in capsys.readouterr().err
    listed = (out / "corrupt_files.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [f"{photos}/cat/3.png", f"{photos}/dog/0.png"]
    assert len(open_index(str(out), True)) == 12
    for path in photos.rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"All 14 images in .* are corrupt, such as .*cat/0.png"):
        pack(index_folder(photos, True), tmp_path / "none", PackOptions())
    assert not files(tmp_path / "none")


@pytest.mark.parametrize(
    ("mode", "kept"),
    [("RGB", "JPEG RGB"), ("L", "JPEG L"), ("CMYK", "JPEG RGB"), ("RGBA", "PNG RGBA"), ("I;16", "PNG I;16")],
)
def test_scaled_images_keep_what_they_are(tmp_path: Path, mode: str, kept: str) -> None:
    (tmp_path / "set").mkdir()
    if mode == "I;16":
        image = Image.fromarray(np.linspace(0, 65535, 60 * 90).reshape(60, 90).astype(np.uint16))
    else:
        image = Image.linear_gradient("L").resize((90, 60)).convert("RGB").convert(mode)
    image.save(tmp_path / "set" / f"1.{'tif' if mode == 'CMYK' else 'png'}")
    pack(index_folder(tmp_path / "set", None), tmp_path / "out", PackOptions(size=20))
    found = open_index(str(tmp_path / "out"), None)
    with found.open(0) as picture:
        assert (f"{picture.format} {picture.mode}", picture.size) == (kept, (20, 30))
        small = picture.pixels(1)[..., 0].astype(float)
    with index_folder(tmp_path / "set", None).open(0) as picture:
        whole = picture.pixels(1)[..., 0].astype(float).reshape(20, 3, 30, 3).mean((1, 3))
    np.testing.assert_allclose(small, whole, atol=6)


def test_small_images_are_kept_and_turned_ones_stand_upright(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    image = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "set" / "1.jpg", exif=exif)
    image.resize((30, 18)).save(tmp_path / "set" / "2.jpg")
    index = index_folder(tmp_path / "set", None)
    pack(index, tmp_path / "out", PackOptions(size=20))
    found = open_index(str(tmp_path / "out"), None)
    with found.open(0) as picture:
        assert picture.size == (30, 20)
    assert found.read(1) == index.read(1), "an image that is small enough was written anew"


def test_where_shards_cannot_be_written(photos: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["dataset", "pack", str(photos), "s3://bucket/out"]) == 2
    assert "OUT must be a local folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        pack(index_folder(photos, True), tmp_path / "file" / "out", PackOptions())
    assert main(["dataset", "pack", str(photos), "x", "--quality", "101"]) == 2
    assert "must be between 1 and 100, not 101" in capsys.readouterr().err


def test_braces_that_the_shell_expanded_are_noticed(capsys: Any) -> None:
    assert main(["train", *(f"dataset.train_data_sources=train-{number}.tar" for number in range(3))]) == 2
    assert "is given 3 times, such as train-0.tar: the shell has expanded the braces. Quote" in capsys.readouterr().err
    assert main(["spec", "check", "dataset.train_data_sources=a", "dataset.train_data_sources=b"]) == 0


# ---------------------------------------------------------------------------------------------- check


def test_check_tells_what_a_source_holds(
    photos: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
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
        "corrupt": "1 (5.88%)",
        "duplicate": "2 (1 group with equal content)",
        "contradictory": "1 group of duplicates are in several class folders",
    }
    results = tmp_path / "results"
    assert (results / "corrupt_files.txt").read_text().startswith(f"{photos}/cat/3.png\tits content is not an image")
    group = [f"{photos}/{name}" for name in ("cat/0.png", "cat/again.png", "dog/again.png")]
    assert (results / "duplicate_files.txt").read_text() == "\t".join(group) + "\n"
    page = (results / "report.html").read_text()
    assert all(text in page for text in ("Corrupt files", "Duplicates", "dog/again.png", "data:image/png"))
    with Image.open(results / "dataset.png") as picture:
        assert picture.width > 1.5 * picture.height


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


def test_check_where_nothing_can_be_read(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "1.png").write_bytes(b"")
    assert main(["dataset", "check", str(tmp_path / "set"), "--results_dir", str(tmp_path / "results")]) == 0
    assert "1 (100.00%)" in capsys.readouterr().out
    assert (tmp_path / "results" / "dataset.png").exists()
