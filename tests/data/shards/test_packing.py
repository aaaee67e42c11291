"""Packing of images into shards."""

from __future__ import annotations

import errno
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openmae.cli.main import main
from openmae.data.index import index_folder
from openmae.data.open import open_index
from openmae.data.shards import packing
from openmae.data.shards.packing import PackOptions, pack
from openmae.errors import DataError, RunError, UserError


@pytest.fixture
def photos(tmp_path: Path, make_images: Any) -> Path:
    return make_images(tmp_path / "photos", [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(7)])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_shards_follow_webdataset(photos: Path, tmp_path: Path, capsys: Any) -> None:
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


def test_existing_shards_are_replaced_only_with_overwrite(photos: Path, tmp_path: Path, capsys: Any) -> None:
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


def test_failed_packing_keeps_existing_shards(photos: Path, tmp_path: Path) -> None:
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
def test_scaled_images_keep_their_kind(tmp_path: Path, mode: str, kept: str) -> None:
    (tmp_path / "set").mkdir()
    if mode == "I;16":
        image = Image.fromarray(np.linspace(0, 65535, 60 * 90).reshape(60, 90).astype(np.uint16))
    else:
        image = Image.linear_gradient("L").resize((90, 60)).convert("RGB").convert(mode)
    image.save(tmp_path / "set" / f"1.{'tif' if mode == 'CMYK' else 'png'}")
    pack(index_folder(tmp_path / "set", None), tmp_path / "out", PackOptions(size=20))
    found = open_index(str(tmp_path / "out"), None)
    with found.open(0) as image_file:
        assert (f"{image_file.format} {image_file.mode}", image_file.size) == (kept, (20, 30))
        small = image_file.pixels(1)[..., 0].astype(float)
    with index_folder(tmp_path / "set", None).open(0) as image_file:
        whole = image_file.pixels(1)[..., 0].astype(float).reshape(20, 3, 30, 3).mean((1, 3))
    np.testing.assert_allclose(small, whole, atol=6)


def test_small_images_are_unchanged_and_rotated_ones_upright(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    image = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "set" / "1.jpg", exif=exif)
    image.resize((30, 18)).save(tmp_path / "set" / "2.jpg")
    index = index_folder(tmp_path / "set", None)
    pack(index, tmp_path / "out", PackOptions(size=20))
    found = open_index(str(tmp_path / "out"), None)
    with found.open(0) as image_file:
        assert image_file.size == (30, 20)
    assert found.read(1) == index.read(1), "an image that is small enough was written anew"


def test_full_disk(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packing, "flush_to_disk", fail)
    with pytest.raises(RunError, match=rf"{tmp_path}/out could not be written \(No space left on device\)"):
        pack(index_folder(photos, True), tmp_path / "out", PackOptions())
    assert not files(tmp_path / "out")


def test_unwritable_output(photos: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["dataset", "pack", str(photos), "s3://bucket/out"]) == 2
    assert "OUT must be a local folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        pack(index_folder(photos, True), tmp_path / "file" / "out", PackOptions())
    assert main(["dataset", "pack", str(photos), "x", "--quality", "101"]) == 2
    assert "must be between 1 and 100, not 101" in capsys.readouterr().err


def test_braces_expanded_by_the_shell_are_noticed(capsys: Any) -> None:
    assert main(["train", *(f"dataset.train_data_sources=train-{number}.tar" for number in range(3))]) == 2
    assert "is given 3 times, such as train-0.tar: the shell has expanded the braces. Quote" in capsys.readouterr().err
    assert main(["spec", "check", "dataset.train_data_sources=a", "dataset.train_data_sources=b"]) == 0
