from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import closing
from multiprocessing import reduction, resource_sharer
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import pytest
import torch

from openmae.data import loaders
from openmae.data.image_dataset import Batch
from openmae.data.index import ImageIndex
from openmae.data.loaders import EvaluationLoader, LoaderSettings, TrainingLoader
from openmae.data.transforms import EvalTransform, FinetuneTransform, PretrainTransform

AUGMENT = FinetuneTransform(
    PretrainTransform((32, 32)), (0.5,) * 3, (0.2,) * 3, auto_aug="rand-m9-mstd0.5-inc1", re_prob=0.5
)


def train_of(index: ImageIndex, folder: Path, **options: Any) -> TrainingLoader:
    settings = {"batch_size": 4, "results": folder, "max_corrupt_fraction": 1.0, **options}
    return TrainingLoader(index, AUGMENT, LoaderSettings(**settings), seed=3)


def val_of(index: ImageIndex, folder: Path, **options: Any) -> EvaluationLoader:
    settings = {"batch_size": 4, "results": folder, "max_corrupt_fraction": 1.0, **options}
    return EvaluationLoader(index, EvalTransform((32, 32)), LoaderSettings(**settings))


def same(a: Iterable[Batch], b: Iterable[Batch]) -> bool:
    def plain(batch: Batch) -> tuple[Any, ...]:
        return batch.images.numpy().tobytes(), batch.labels.tolist(), batch.indices.tolist(), *batch[3:]

    return [plain(batch) for batch in a] == [plain(batch) for batch in b]


def test_workers_change_nothing(index: ImageIndex, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    with closing(train_of(index, tmp_path, num_workers=2)) as helped:
        alone = train_of(index, tmp_path)
        for epoch in range(2):
            assert same(alone.from_position(epoch, 0), helped.from_position(epoch, 0))
    with closing(val_of(index, tmp_path, num_workers=2)) as helped_val:
        assert same(val_of(index, tmp_path), helped_val)
    assert torch.equal(state, torch.get_rng_state())


def test_batches(index: ImageIndex, tmp_path: Path) -> None:
    train, val = list(train_of(index, tmp_path).from_position(0, 0)), list(val_of(index, tmp_path))
    assert [len(batch.images) for batch in train] == [4, 4, 4]
    assert [len(batch.images) for batch in val] == [4, 4, 4, 2]
    assert train[0].images.shape == (4, 3, 32, 32)
    assert train[0].images.dtype == torch.uint8
    assert torch.cat([batch.indices for batch in val]).tolist() == list(range(14))
    assert torch.cat([batch.labels for batch in val]).tolist() == [0] * 7 + [1] * 7
    assert all(batch.labels.tolist() == [index.labels[i] for i in batch.indices] for batch in train)  # type: ignore[index]


def test_epochs_differ(index: ImageIndex, tmp_path: Path) -> None:
    loader = train_of(index, tmp_path)
    first, second = list(loader.from_position(0, 0)), list(loader.from_position(1, 0))
    assert (first[0].epoch, second[0].epoch) == (0, 1)
    assert not same(first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_starts_at_any_position(index: ImageIndex, tmp_path: Path, workers: int) -> None:
    whole = train_of(index, tmp_path)
    epoch = list(whole.from_position(1, 0))
    with closing(train_of(index, tmp_path, num_workers=workers)) as resumed:
        for done in range(len(whole) + 1):
            assert same(resumed.from_position(1, done), epoch[done:])
        cut_short = resumed.from_position(0, 0)
        next(cut_short)
        assert same(resumed.from_position(1, 0), epoch)


def test_ranks_share_the_validation_set(index: ImageIndex, tmp_path: Path) -> None:
    seen = []
    for rank in range(2):
        loader = val_of(index, tmp_path, batch_size=3, rank=rank, world_size=2)
        seen.append([i for batch in loader for i in batch.indices.tolist()])
    assert seen == [list(range(0, 14, 2)), list(range(1, 14, 2))]


def test_first_images_are_spread_over_the_set(index: ImageIndex, tmp_path: Path) -> None:
    assert val_of(index, tmp_path).first(3).indices.tolist() == [0, 4, 8]
    assert val_of(index, tmp_path).first(99).indices.tolist() == list(range(14))
    for number in (0, 4):
        index.file(number).write_bytes(b"broken")
    assert val_of(index, tmp_path).first(3).indices.tolist() == [8, 12, 1], "readable ones step in"


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_is_replaced_in_training(index: ImageIndex, tmp_path: Path, workers: int) -> None:
    index.file(3).write_bytes(b"broken")
    index.file(4).write_bytes(b"")
    with closing(train_of(index, tmp_path, batch_size=14, num_workers=workers)) as loader:
        batches = list(loader.from_position(0, 0))
    assert [len(batch.images) for batch in batches] == [14]
    assert sorted(batches[0].indices.tolist()) == sorted([*range(3), 5, 5, *range(5, 14)])
    assert {number for number, _ in batches[0].corrupt} == {3, 4}
    assert (tmp_path / "corrupt_files.txt").read_text().count("\n") == 2


def test_corrupt_image_is_left_out_in_evaluation(index: ImageIndex, tmp_path: Path) -> None:
    for number in (3, 8, 9, 10, 11):
        index.file(number).write_bytes(b"broken")
    batches = list(val_of(index, tmp_path))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2], [4, 5, 6, 7], [12, 13]]
    assert (tmp_path / "corrupt_files.txt").read_text().count("\n") == 5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows shares handles, not descriptors")
def test_lost_connection_prints_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", loaders._ignore_lost_connections)
    here, there = os.pipe()
    shared = reduction.DupFd(there)
    address = resource_sharer._resource_sharer._address  # type: ignore[attr-defined]
    Client(address).close()  # goes away before it has proved that it knows the key
    os.close(shared.detach())  # the thread answers one request after the other: the first has been dealt with
    os.close(here)
    os.close(there)
    sys.excepthook(ValueError, ValueError("another error"), None)
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    assert "Error: [Errno" not in printed
    assert "another error" in printed
