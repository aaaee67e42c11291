"""Shards in an object store: indexed without being read, fetched one at a time, in an order determined by the seed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openmae.data.index import index_folder
from openmae.data.loaders import LoaderSettings, TrainingLoader
from openmae.data.open import open_index
from openmae.data.shards.packing import PackOptions, pack
from openmae.data.shards.reading import ShardedIndex
from openmae.data.shards.tar_index import _open_remote
from openmae.data.transforms import PretrainTransform
from openmae.errors import DataError
from openmae.storage import cache

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing stays open from one test to the next."""
    _open_remote.cache_clear()
    yield
    _open_remote.cache_clear()


@pytest.fixture
def packed(tmp_path: Path) -> list[Path]:
    """Twelve shards of one to three images each."""
    for number in range(30):
        noise = np.random.default_rng(number).integers(0, 255, (24, 24, 3), dtype=np.uint8)
        path = tmp_path / "photos" / ("cat" if number % 3 else "dog") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise[: 8 + number % 17]).save(path)
    return pack(index_folder(tmp_path / "photos", True), tmp_path / "set", PackOptions(shard_bytes=8_500)).shards


def upload(store: Any, bucket: str, shards: list[Path], *, indexed: bool = True) -> str:
    files = [*shards, *(Path(f"{path}.index.json") for path in shards if indexed)]
    store.put(bucket, {f"data/{path.name}": path.read_bytes() for path in files})
    return f"s3://{bucket}/data/set-{{000000..{len(shards) - 1:06d}}}.tar"


def batches(index: Any, folder: Path, workers: int = 0, done: int = 0) -> list[tuple[Any, ...]]:
    settings = LoaderSettings(4, folder, 1.0, num_workers=workers)
    with closing(TrainingLoader(index, PretrainTransform((16, 16)), settings, seed=5)) as loader:
        found = loader.from_position(2, done)
        return [(b.images.numpy().tobytes(), b.labels.tolist(), b.indices.tolist()) for b in found]


def remote_files() -> list[str]:
    return sorted(path.name for path in (cache.root() / cache.REMOTE).glob("*/*.tar"))


@pytest.mark.parametrize("indexed", [True, False])
def test_remote_shards_equal_local_ones(store, bucket, packed, tmp_path, indexed) -> None:
    pattern = upload(store, bucket, packed, indexed=indexed)
    local = open_index(str(tmp_path / "set"), True)
    found = open_index(pattern, True)
    assert (found.paths, found.labels) == (local.paths, local.labels)
    assert remote_files() == ([] if indexed else [path.name for path in packed]), "an index is all that is needed"
    assert [found.read(i) for i in range(len(found))] == [local.read(i) for i in range(len(local))]
    assert found.full_name(0) == f"s3://{bucket}/data/set-000000.tar!cat/01.png"


def test_batches_from_a_store_do_not_depend_on_workers_or_resuming(store, bucket, packed, tmp_path) -> None:
    found = open_index(upload(store, bucket, packed), True)
    assert isinstance(found, ShardedIndex)
    assert len(found.shards) > 8, "this test needs more shards than are shuffled together"
    whole = batches(found, tmp_path)
    assert batches(found, tmp_path, workers=2) == whole, "0 workers differ from 2"
    assert batches(found, tmp_path, done=3) == whole[3:], "a resumed epoch differs"
    seen = [i for batch in whole for i in batch[2]]
    assert len(set(seen)) == len(seen) == 28
    assert not any(entry.in_use for entry in cache.entries()), "a shard is held that nobody reads"


def test_a_cache_smaller_than_the_set_is_enough(store, bucket, packed, tmp_path, monkeypatch) -> None:
    found = open_index(upload(store, bucket, packed), True)
    whole = batches(found, tmp_path)
    cache.clear()
    _open_remote.cache_clear()
    monkeypatch.setenv("OPENMAE_CACHE_GB", str(5 * 24e3 / 1e9))
    assert batches(found, tmp_path) == whole
    assert 0 < len(remote_files()) < len(packed), "the cache keeps its bound"


def test_opening_again_requests_only_the_listing(store, bucket, packed, caplog) -> None:
    pattern = upload(store, bucket, packed, indexed=False)
    with caplog.at_level(logging.INFO, logger="openmae"):
        open_index(pattern, True)
        assert caplog.text.count("this is done once") == 1
        caplog.clear()
        open_index(pattern, True)
    assert caplog.text == ""


def test_shards_fetched_during_a_run_show_no_progress_bar(
    store, bucket, packed, tmp_path, monkeypatch, capfd, caplog
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich, a terminal
    pattern = upload(store, bucket, packed, indexed=False)
    with caplog.at_level(logging.INFO, logger="openmae"):
        found = open_index(pattern, True)
        assert "set-000011.tar" in capfd.readouterr().err, "the bar of a download that is waited for"
        assert "Downloading" in caplog.text
        cache.clear()
        caplog.clear()
        for workers in (0, 2):
            _open_remote.cache_clear()
            cache.clear()
            batches(found, tmp_path, workers=workers)
            assert len(remote_files()) == len(packed), "the run has fetched nothing"
            assert capfd.readouterr().err == "", "shards that are fetched meanwhile write across the run's bar"
    assert "Downloading" not in caplog.text


def test_a_missing_shard_is_named(store, bucket, packed) -> None:
    pattern = upload(store, bucket, packed[:3]).replace("000002", "000003")
    with pytest.raises(DataError, match=rf"names 4 shards, but 1 of them do not exist: s3://{bucket}/data/set-000003"):
        open_index(pattern, None)


def test_a_shard_that_disappears_is_reported(store, bucket, packed, tmp_path) -> None:
    found = open_index(upload(store, bucket, packed), True)
    store.client.delete_object(Bucket=bucket, Key="data/set-000004.tar")
    with pytest.raises(DataError, match=rf"There is nothing at s3://{bucket}/data/set-000004.tar") as caught:
        batches(found, tmp_path, workers=2)
    assert "Traceback" not in str(caught.value)
