"""Embeddings of a data set."""

from __future__ import annotations

import numpy as np
import torch

from openmae.data.image_dataset import Batch
from openmae.distributed.launch import build_fabric
from openmae.evaluation.embeddings import embed


def test_embeddings_come_in_order_and_do_not_depend_on_batches():
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    order = torch.arange(5)
    parts = [Batch(images[part], part % 2, part, 0, []) for part in (order[4:], order[2:4], order[:2])]
    fabric = build_fabric("inference", 1, [0], 1)
    indices, vectors, labels = embed(fabric, lambda images: images.flatten(1) / 255, parts)
    assert indices.tolist() == [0, 1, 2, 3, 4]
    assert labels.tolist() == [0, 1, 0, 1, 0]
    np.testing.assert_array_equal(vectors, images.flatten(1) / 255)
    assert vectors.dtype == np.float32
