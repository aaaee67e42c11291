"""Scaled copies: they save decoding, and change no result by being there or not."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tempfile
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from openmae.data import scaled_copies
from openmae.data.decode import ImageFile, Size
from openmae.data.image_dataset import ImageDataset
from openmae.data.index import ImageIndex, index_folder
from openmae.data.loaders import LoaderSettings, TrainingLoader
from openmae.data.scaled_copies import ScaledCopies, bytes_of_copies, entry_of, kept_in_cache, least_size, scaled_size
from openmae.data.shards.indexing import index_shards
from openmae.data.shards.packing import PackOptions, pack
from openmae.data.shards.reading import ShardPrefetcher
from openmae.data.transforms import EvalTransform, PretrainTransform
from openmae.storage import cache

CROP = PretrainTransform((16, 16))
SIZE = (16, 16)
_LARGE = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of several kinds, larger than their copies; the cache is empty."""
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "images"
    images.mkdir()
    noise = np.random.default_rng(0)
    smooth = Image.fromarray(noise.integers(0, 255, (9, 12, 3), np.uint8)).resize((240, 180), Image.Resampling.BICUBIC)
    smooth.save(images / "photo.jpg", quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth.save(images / "rotated.jpg", exif=exif)
    smooth.convert("RGBA").save(images / "transparent.png")
    Image.fromarray(noise.integers(0, 2**16, (90, 70), np.uint16)).save(images / "deep.png")
    Image.fromarray(noise.integers(0, 255, (20, 20), np.uint8)).save(images / "small.png")
    smooth.save(images / "pages.tiff", save_all=True, append_images=[smooth])
    return images


def samples(index: ImageIndex, copies: ScaledCopies | None, epoch: int = 0) -> list[torch.Tensor]:
    dataset = ImageDataset(index, CROP, seed=1, copies=copies)
    return [dataset[epoch, number].images for number in range(len(index))]


def copies_of(index: ImageIndex) -> ScaledCopies:
    return kept_in_cache(ScaledCopies(least_size(SIZE, 0.2), 3), index)


def stored() -> list[Path]:
    return sorted(path for path in (cache.root() / cache.COPIES).glob("*/*/*") if path.is_file())


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))


@given(_LARGE, _LARGE)
def test_a_copy_is_no_larger_than_needed(size: Size, needed: Size) -> None:
    height, width = scaled_size(size, needed)
    if height < size[0]:
        assert height >= needed[0]
        assert width >= needed[1]
        assert height == needed[0] or width == needed[1]
        assert abs(height / size[0] - width / size[1]) <= 1 / min(size)
    else:
        assert (height, width) == size


def test_a_crop_of_the_smallest_share_keeps_the_size_of_the_input() -> None:
    assert least_size((224, 224), 0.5) == (504, 504)
    assert least_size((224, 224), 0.08) == (792, 792)
    assert least_size((64, 128), 0.2) == (144, 288)


def test_stored_copies_change_nothing(folder: Path) -> None:
    index = index_folder(folder, None)
    copies, without = copies_of(index), ScaledCopies(least_size(SIZE, 0.2), 3)
    for epoch in range(3):
        assert equal(samples(index, copies, epoch), samples(index, without, epoch)), f"epoch {epoch}"
    assert len(stored()) == len(index)


def test_a_stored_copy_is_not_decoded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_folder(folder, None)
    samples(index, copies_of(index))
    monkeypatch.setattr(ImageFile, "pixels", lambda *_, **__: pytest.fail("decoded again"))
    later = ImageDataset(index, CROP, seed=1, copies=copies_of(index))
    assert [later[1, number].further for number in range(len(index))].count([(1, "several pages")]) == 1


def test_a_changed_image_gets_a_new_copy(folder: Path) -> None:
    index = index_folder(folder, None)
    before = samples(index, copies_of(index))
    status = (folder / "photo.jpg").stat()
    content = (folder / "rotated.jpg").read_bytes()[: status.st_size].ljust(status.st_size, b"\0")
    (folder / "photo.jpg").write_bytes(content)  # of the same size
    os.utime(folder / "photo.jpg", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    (folder / "small.png").chmod(0o600)  # as a copy by rsync or a backup with hard links changes the inode
    now = samples(index, copies_of(index))
    changed = [not torch.equal(a, b) for a, b in zip(before, now, strict=True)]
    assert changed == [path == "photo.jpg" for path in index.paths]


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\n123", b'{"shape": [9], "dtype": "uint8"}'])
def test_a_damaged_copy_is_made_again(folder: Path, damage: bytes) -> None:
    index = index_folder(folder, None)
    before = samples(index, copies_of(index))
    whole = stored()[0].read_bytes()
    stored()[0].write_bytes(damage or whole[:-1])
    assert equal(samples(index, copies_of(index)), before)
    assert stored()[0].read_bytes() == whole


def test_copies_without_room_are_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index = index_folder(folder, None)
    with cache.holding():
        unlimited = samples(index, copies_of(index))
    cache.clear()
    monkeypatch.setenv("OPENMAE_CACHE_GB", "0.00002")
    limited = copies_of(index)
    assert "and the cache has room for 0.0 MB: the other images are decoded in every epoch." in caplog.text
    assert equal(samples(index, limited), unlimited)
    assert 0 < sum(path.stat().st_size for path in stored()) < 20_000
    monkeypatch.setattr(scaled_copies, "_RESERVE", 2**60)
    monkeypatch.setenv("OPENMAE_CACHE_GB", "1")
    kept = stored()
    assert equal(samples(index, copies_of(index)), unlimited)
    assert stored() == kept, "the reserve of the disk was used"


def test_an_unwritable_cache_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("OPENMAE_CACHE", str(folder / "file"))
    index = index_folder(folder, None)
    copies = copies_of(index)
    assert copies.folder is None
    assert "No scaled copies are added: the cache " in caplog.text
    assert equal(samples(index, copies), samples(index, ScaledCopies(copies.least, 3)))


def test_workers_and_a_cleared_cache_change_nothing(folder: Path, tmp_path: Path) -> None:
    index = index_folder(folder, None)
    copies = copies_of(index)

    def batches(workers: int) -> list[torch.Tensor]:
        settings = LoaderSettings(2, tmp_path, 0.0, workers)
        with closing(TrainingLoader(index, CROP, settings, 1, copies)) as loader:
            return [batch.images for epoch in range(2) for batch in loader.from_position(epoch, 0)]

    alone = batches(0)
    for path in stored():
        path.unlink()
    assert equal(batches(2), alone)
    assert len(stored()) == len(index)


def test_shards(folder: Path, tmp_path: Path) -> None:
    files = index_folder(folder, None)
    packed = index_shards([str(path) for path in pack(files, tmp_path / "shards", PackOptions()).shards], None, "x")
    assert equal(samples(packed, copies_of(packed)), samples(files, copies_of(files)))
    assert len(stored()) == 2 * len(files)


def test_a_copy_looks_like_the_image(folder: Path) -> None:
    index, centre = index_folder(folder, None), EvalTransform((64, 64))
    photo = index.paths.index("photo.jpg")
    with index.open(photo) as image:
        direct = centre(image).float()
    copied = centre(ScaledCopies(least_size((64, 64), 0.2), 3).open(index, photo)).float()
    assert (copied - direct).abs().mean() < 2


def test_the_estimate_of_their_size(folder: Path) -> None:
    index = index_folder(folder, None).subset([1])
    assert index.paths == ("pages.tiff",)
    assert bytes_of_copies(index, ScaledCopies((36, 36), 3)) == round(1.1 * 36 * 48 * 3)


def test_other_entries_make_room(folder: Path) -> None:
    index = index_folder(folder, None)
    with cache.holding():
        samples(index, copies_of(index))
    (entry,) = cache.entries()
    assert (entry.kind, entry.origin, entry.in_use) == ("copies", str(folder), False)
    assert entry.size >= sum(path.stat().st_size for path in stored())
    assert cache.room(entry.path) == cache.room(folder) > 0
    assert cache.clear()[0] == entry.size


def test_a_resumed_run_removes_nothing_for_copies_that_exist(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_folder(folder, None)
    with cache.holding():
        samples(index, copies_of(index))
        other = cache.root() / cache.REMOTE / "other"
        cache.obtain(other, "s3://b/other", lambda part: (part / "data").write_bytes(b"x" * 10**5) and None)
    used = sum(entry.size for entry in cache.entries())
    monkeypatch.setenv("OPENMAE_CACHE_GB", str((used + 40_000) / 1e9))
    assert copies_of(index).room > 0
    assert other.exists()


def test_a_second_run_can_use_the_copies_of_one_that_is_running(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_folder(folder, None)
    copies = copies_of(index)
    samples(index, copies)
    monkeypatch.setenv("OPENMAE_CACHE_GB", "0.0003")
    assert cache.room(entry_of(index, copies)) == 300_000, "its own copies count as taken"


def test_copies_of_changed_images_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_folder(folder, None)
    with cache.holding():
        samples(index, copies_of(index))
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    monkeypatch.setenv("OPENMAE_CACHE_GB", "0.0001")
    samples(index, copies_of(index))
    assert len(stored()) == len(index), "old copies remain"


@pytest.mark.parametrize("fault", ["lost", "cut"])
def test_a_copy_that_cannot_be_read_is_made_again(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, centre = index_folder(folder, None), EvalTransform(SIZE)
    copies = copies_of(index)
    expected = samples(index, copies)
    opened = [copies.open(index, number) for number in range(len(index))]
    for image, path in zip(opened, stored(), strict=True):
        if fault == "cut":
            os.truncate(path, 300)
        else:
            monkeypatch.setattr(image, "_file", _LostFile())
    again = [centre(image) for image in opened]
    direct = [centre(ScaledCopies(copies.least, 3).open(index, number)) for number in range(len(index))]
    assert equal(again, direct)
    assert equal(samples(index, copies), expected)


class _LostFile(io.RawIOBase):
    """A file on a server that has forgotten it."""

    def seek(self, *_: int) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")


def test_remote_shards_have_no_copies(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = index_folder(folder, None)
    packed = index_shards([str(path) for path in pack(files, tmp_path / "shards", PackOptions()).shards], None, "x")
    remote = replace(packed, prefetcher=ShardPrefetcher())
    assert copies_of(remote).folder is None
    assert "dataset.cache has no effect" in caplog.text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_another_user_of_the_cache_is_not_disturbed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_folder(folder, None)
    shared = Path(tempfile.mkdtemp())  # pytest's folders are private
    shared.chmod(0o755)
    monkeypatch.setenv("OPENMAE_CACHE", str(shared))
    with cache.holding():
        samples(index, copies_of(index))
    pid = os.fork()
    if not pid:
        code = 1
        with suppress(BaseException):
            os.setuid(65534)
            code = len(cache.entries())
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    shutil.rmtree(shared)
    assert code == 0
