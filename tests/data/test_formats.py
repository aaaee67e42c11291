"""The table of formats is the same for folders, archives, shards, packing, checking and uploads."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from openmae.data.check import check_images
from openmae.data.decode import CorruptImage, ImageFile, NotAnImage
from openmae.data.formats import (
    FORMAT_TITLES,
    IMAGE_SUFFIXES,
    KNOWN_UNREAD_SUFFIXES,
    READ_FORMATS,
    recognise,
    why_not_read,
)
from openmae.data.index import ImageIndex, index_folder
from openmae.data.open import open_index
from openmae.data.shards.packing import PackOptions, pack
from openmae.data.transforms import EvalTransform
from openmae.serving.uploads import Refused, Upload, decode_upload

ALWAYS = ("JPEG", "PNG", "BMP", "TIFF", "GIF")
UNREAD = ("EPS", "PPM", "TGA", "ICO", "PCX", "SGI", "PDF", "DDS")


def encoded(kind: str, seed: int = 0, size: tuple[int, int] = (24, 20)) -> bytes:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


def test_format_table() -> None:
    assert set(ALWAYS) <= set(READ_FORMATS)
    assert len(FORMAT_TITLES) == len(READ_FORMATS)
    assert {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"} <= IMAGE_SUFFIXES
    assert {".avif", ".jp2", ".j2k"} <= IMAGE_SUFFIXES | KNOWN_UNREAD_SUFFIXES.keys()
    assert {".heic", ".heif"} <= IMAGE_SUFFIXES | KNOWN_UNREAD_SUFFIXES.keys()
    assert {".cr2", ".tga", ".svg", ".eps", ".psd"} <= KNOWN_UNREAD_SUFFIXES.keys()
    assert not IMAGE_SUFFIXES & KNOWN_UNREAD_SUFFIXES.keys()
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in (*IMAGE_SUFFIXES, *KNOWN_UNREAD_SUFFIXES))
    assert "EPS" not in READ_FORMATS, "its decoder runs a program"


@pytest.mark.integration
def test_without_pillow_heif_the_command_is_named() -> None:
    program = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from openmae.data.formats import *\n"
        "assert '.heic' not in IMAGE_SUFFIXES and 'HEIF' not in READ_FORMATS\n"
        "print(KNOWN_UNREAD_SUFFIXES['.heic'])\n"
        "print(why_not_read(b'\\0\\0\\0\\x18ftypheic\\0\\0\\0\\0mif1heic'))\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    command, reason = said.splitlines()
    assert command == "pip install 'openmae[heif]'"
    assert reason == "its content is HEIC; to read it: pip install 'openmae[heif]'"


@pytest.mark.parametrize("kind", READ_FORMATS)
def test_content_is_recognised(kind: str) -> None:
    assert recognise(encoded(kind)[:256]) == kind
    assert recognise(encoded(kind)[:3]) in (None, kind)


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (b"", "the file is empty (0 bytes)"),
        (bytes(256), "the file contains only zeros"),
        (b"%!PS-Adobe-3.0 EPSF", "its content is a PostScript (EPS) file, not an image that can be read (JPEG, "),
        (b"\n<!DOCTYPE html><html>", "its content is a web page, not an image"),
        (b"version https://git-lfs.github.com/spec/v1", "its content is a Git LFS pointer (git lfs pull fetches"),
        (b"hello", "its content is not an image that can be read (JPEG, PNG, "),
    ],
)
def test_why_content_is_not_read(start: bytes, reason: str) -> None:
    assert recognise(start) is None
    assert why_not_read(start).startswith(reason)


Reader = Callable[[Path], torch.Tensor]
_TRANSFORM = EvalTransform((16, 16))


def from_file(path: Path) -> torch.Tensor:
    with ImageFile(path) as image_file:
        return _TRANSFORM(image_file)


def from_memory(path: Path) -> torch.Tensor:
    with ImageFile(path, io.BytesIO(path.read_bytes())) as image_file:
        return _TRANSFORM(image_file)


def from_index(path: Path) -> torch.Tensor:
    with ImageIndex(path.parent, (path.name,)).open(0) as image_file:
        return _TRANSFORM(image_file)


def from_upload(path: Path) -> torch.Tensor:
    found = decode_upload(Upload(path.name, io.BytesIO(path.read_bytes())), _TRANSFORM, 10_000_000)
    if isinstance(found, Refused):
        raise found
    return found


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from((*READ_FORMATS, *UNREAD)), suffix=st.sampled_from(sorted(IMAGE_SUFFIXES)))
def test_all_readers_agree_for_every_format_and_name(
    tmp_path_factory: pytest.TempPathFactory, kind: str, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("any") / f"image{suffix}"
    path.write_bytes(encoded(kind))
    if kind in READ_FORMATS:
        expected = from_file(path)
        for reader in (from_memory, from_index, from_upload):
            torch.testing.assert_close(reader(path), expected, rtol=0, atol=0)
        return
    for reader in (from_file, from_memory, from_index):
        with pytest.raises(NotAnImage, match="not an image that can be read"):
            reader(path)
    with pytest.raises(Exception, match="not an image that can be read"):
        from_upload(path)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with each format under its own name and under that of a JPEG."""
    folder = tmp_path / "set"
    own = {"JPEG": ".jfif", "TIFF": ".tif", "JPEG2000": ".jp2", "HEIF": ".heic"}
    for number, kind in enumerate(READ_FORMATS):
        for place, suffix in (("own", own.get(kind, f".{kind.lower()}")), ("as_jpeg", ".JPG")):
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / f"{kind}{suffix}").write_bytes(encoded(kind, number))
    return folder


def test_folder_archive_and_shards_agree(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))
    folder = index_folder(mixed, True)
    assert len(folder) == 2 * len(READ_FORMATS)
    assert check_images(folder).corrupt == []
    archive = open_index(shutil.make_archive(str(tmp_path / "set"), "zip", mixed), True)
    packed = pack(folder, tmp_path / "packed", PackOptions())
    assert packed.corrupt == []
    shards = open_index(packed.pattern, True)
    assert check_images(shards).corrupt == []
    for index in (archive, shards):
        assert len(index) == len(folder)
        assert index.class_names == folder.class_names
        for number in range(len(folder)):
            with folder.open(number) as wanted, index.open(number) as found:
                np.testing.assert_array_equal(found.pixels(), wanted.pixels())


@pytest.mark.integration
def test_no_reader_runs_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object, **kwargs: object) -> None:
        raise AssertionError("a program was run")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    monkeypatch.setattr(subprocess, "Popen", run)
    for suffix in (".jpg", ".tif", ".gif"):
        (tmp_path / f"a{suffix}").write_bytes(encoded("EPS"))
    index = index_folder(tmp_path, False)
    for number in range(len(index)):
        with pytest.raises(CorruptImage, match=r"PostScript \(EPS\)"), index.open(number) as image_file:
            image_file.pixels()
    assert len(check_images(index).corrupt) == 3
