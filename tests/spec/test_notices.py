"""Notices about data from which a model is likely to learn little."""

from __future__ import annotations

import pytest

from openmae.spec.choices import Facts
from openmae.spec.load import load_spec
from openmae.spec.notices import find_data_notices
from openmae.spec.recipe import choose

ENOUGH = Facts(images=1300, val_images=500, side=32, on_gpu=False)


@pytest.mark.parametrize(
    ("facts", "overrides", "expected"),
    [
        (
            Facts(images=100),
            ["dataset.batch_size=10", "train.num_epochs=4"],
            "The run makes only 40 optimizer steps (training images: 100, train.num_epochs: 4), too few to learn much. "
            "Set train.num_epochs to 30 or more, or use a smaller dataset.batch_size.",
        ),
        (
            Facts(),
            ["model.arch=convnextv2_atto", "dataset.augmentation.input_size=64"],
            "An image of 64x64 px has only 4 mask units of 32 px, too few to learn from. Use a larger "
            "dataset.augmentation.input_size, or a ViT, whose patches can be smaller.",
        ),
        (
            Facts(images=10_000, val_images=7, classes=10),
            [],
            "dataset.val_data_sources has 7 images for 10 classes, too few to measure an accuracy.",
        ),
    ],
)
def test_data_from_which_a_model_learns_little(facts, overrides, expected):
    assert list(find_data_notices(choose(load_spec(None, overrides), facts), facts)) == [expected]
    assert not list(find_data_notices(choose(load_spec(None), ENOUGH), ENOUGH))
