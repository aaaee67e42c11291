"""Calibration images for int8, preprocessed for the model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from openmae.actions.sources import open_images
from openmae.data.loaders import EvaluationLoader, LoaderSettings
from openmae.engines.batching import as_input, eval_transform, pad_batch
from openmae.engines.metadata import ModelCard
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of

_MAX_CORRUPT = 0.5  # share of a calibration set, which is only a sample


def calibration_batches(spec: ExperimentSpec, key: str, card: ModelCard, folder: Path) -> Iterator[np.ndarray]:
    """Return batches of images spread evenly over a set, in the input format of the exported model.

    ``key`` is the section of the spec that describes the set; ``folder`` gets the list of corrupt files. A model with a
    fixed batch size gets batches of that size.

    Raises:
        DataError: the source cannot be used; raised by the call, not by the first batch.
    """
    settings = value_of(spec, key)
    sources = settings.sources
    name = "images" if sources == (settings.images,) else "cal_image_dir"
    size = settings.batch if card.batch_size == -1 else card.batch_size
    loaders = []
    for number, source in enumerate(sources):
        index = open_images(spec, f"{key}.{name}", labelled=False, source=source)
        count = min(-(-(settings.count - number) // len(sources)), len(index))  # as many of each source
        if count > 0:
            index = index.subset(np.linspace(0, len(index) - 1, count).round().astype(int))
            loaders.append(EvaluationLoader(index, eval_transform(card), LoaderSettings(size, folder, _MAX_CORRUPT)))
    return chain.from_iterable(_inputs(loader, card) for loader in loaders)


def _inputs(loader: EvaluationLoader, card: ModelCard) -> Iterator[np.ndarray]:
    for batch in loader:
        # the last batch is padded for a model with a fixed batch size
        yield as_input(pad_batch(batch.images, card.batch_size), card).numpy()
