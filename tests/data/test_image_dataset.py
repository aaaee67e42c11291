from __future__ import annotations

import pickle
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openmae.data.image_dataset import AddressedSampler, EvalSampler, ImageDataset
from openmae.data.index import ImageIndex
from openmae.data.transforms import EvalTransform, FinetuneTransform, PretrainTransform
from openmae.errors import DataError

CROP = PretrainTransform((32, 32))
AUGMENT = FinetuneTransform(CROP, (0.5,) * 3, (0.2,) * 3, auto_aug="rand-m9-mstd0.5-inc1", re_prob=0.5)


# ------------------------------------------------------------------------------------------- samplers


def of_length(length: int) -> ImageIndex:
    return ImageIndex(Path(), tuple(map(str, range(length))))


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 4), st.integers(0, 3))
def test_training_order(length: int, batch_size: int, world: int, epoch: int) -> None:
    if length < batch_size * world:
        return
    ranks = [AddressedSampler(of_length(length), batch_size, 7, rank, world) for rank in range(world)]
    for sampler in ranks:
        sampler.position = (epoch, 0)
    alone = AddressedSampler(of_length(length), batch_size * world, 7)
    alone.position = (epoch, 0)
    together = [list(chain(*batches)) for batches in zip(*ranks, strict=True)]
    assert together == list(alone)
    seen = [index for batch in together for e, index in batch]
    assert len(set(seen)) == len(seen) == len(alone) * batch_size * world
    assert {e for batch in together for e, _ in batch} == {epoch}


def test_position() -> None:
    whole = AddressedSampler(of_length(20), 4, seed=1)
    epochs = [list(whole) for _ in range(3)]
    assert epochs[0] != [[(0, i) for _, i in batch] for batch in epochs[1]]
    resumed = AddressedSampler(of_length(20), 4, seed=1)
    resumed.position = (1, 3)
    assert len(resumed) == 5
    assert list(resumed) == epochs[1][3:]
    assert list(resumed) == epochs[2]
    resumed.position = (0, 0)
    iter(resumed)  # asks for nothing, moves nothing
    next(iter(resumed))  # an epoch cut short still counts
    assert list(resumed) == epochs[1]


@pytest.mark.parametrize(
    ("world", "text", "fix"),
    [
        (
            1,
            "The training set has 5 images, fewer than one batch of 8.",
            "Set dataset.batch_size to 5 or less",
        ),
        (2, "fewer than one batch of 8 on each of 2 processes.", "Set dataset.batch_size to 2 or less"),
        (6, "fewer than one batch of 8 on each of 6 processes.", "Use fewer GPUs"),
    ],
)
def test_training_set_smaller_than_a_batch(world: int, text: str, fix: str) -> None:
    with pytest.raises(DataError) as caught:
        AddressedSampler(of_length(5), 8, 0, 0, world)
    assert text in str(caught.value)
    assert caught.value.fix.startswith(fix)


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 4))
def test_evaluation_sees_each_image_once(length: int, batch_size: int, world: int) -> None:
    ranks = [EvalSampler(of_length(length), batch_size, rank, world) for rank in range(world)]
    batches = [list(sampler) for sampler in ranks]
    assert {len(b) for b in batches} == {len(ranks[0])}
    seen = [index for mine in batches for batch in mine for _, index in batch]
    assert sorted(seen) == list(range(length))
    if world == 1:
        assert seen == list(range(length))


# ------------------------------------------------------------------------------------------- samples


def test_unlabelled(index: ImageIndex) -> None:
    dataset = ImageDataset(ImageIndex(index.root, index.paths), CROP)
    assert dataset.collate([dataset[0, 1], dataset[0, 2]]).labels.tolist() == [-1, -1]


def test_empty_batch(index: ImageIndex) -> None:
    batch = ImageDataset(index, CROP).collate([])
    assert (batch.images.shape, batch.labels.tolist(), batch.corrupt) == ((0, 3, 32, 32), [], [])


def test_eight_and_sixteen_bits_in_one_batch(index: ImageIndex) -> None:
    from PIL import Image

    Image.new("I;16", (40, 40), 257 * 9).save(index.file(0))
    dataset = ImageDataset(index, EvalTransform((32, 32)))
    batch = dataset.collate([dataset[0, 0], dataset[0, 1]])
    assert batch.images.dtype == torch.float32
    torch.testing.assert_close(batch.images[0], torch.full((3, 32, 32), 9.0))


def test_pickles(index: ImageIndex) -> None:
    dataset = ImageDataset(index, AUGMENT)
    image = pickle.loads(pickle.dumps(dataset))[1, 2].images
    assert torch.equal(image, dataset[1, 2].images)
