"""Reconstructions of masked images."""

from __future__ import annotations

import numpy as np
import torch

from openmae.data.image_dataset import Batch
from openmae.distributed.launch import build_fabric
from openmae.evaluation.reconstructions import reconstruct
from openmae.models.build import ModelConfig, build_autoencoder
from openmae.models.masking import Mask, random_mask
from openmae.models.normalise import Normaliser


def test_visible_units_are_shown_as_they_are():
    torch.manual_seed(0)
    model = build_autoencoder(ModelConfig("vit_tiny_patch16", (32, 32), decoder_depth=1, decoder_embed_dim=32)).eval()
    batch = Batch(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.zeros(2), torch.arange(2), 0, [])

    def mask_of(indices: torch.Tensor) -> Mask:
        return random_mask(indices, seed=1, epoch=-1, num_units=model.num_units, mask_ratio=0.5)

    fabric, normalise = build_fabric("evaluate", 1, [0], 1), Normaliser((0.5,) * 3, (0.25,) * 3)
    original, pasted, visible = reconstruct(fabric, model, normalise, mask_of, batch)
    for images in (original, pasted):
        assert images.shape == (2, 32, 32, 3)
        assert images.dtype == np.uint8
    np.testing.assert_array_equal(original, batch.images.permute(0, 2, 3, 1))
    row, column = (int(n) * 16 for n in divmod(int(mask_of(batch.indices).visible_BV[0, 0]), 2))
    here = (0, slice(row, row + 16), slice(column, column + 16))
    assert visible.mean() == 0.5
    assert visible[here].all()
    np.testing.assert_array_equal(pasted[visible], original[visible])
    assert (pasted[~visible] != original[~visible]).any()
