"""From the keys of a spec to indexed images."""

from __future__ import annotations

import logging
from pathlib import Path

from openmae.actions.run import blaming
from openmae.data.images import ImageIndex, index_images
from openmae.data.sources import resolve_source
from openmae.errors import DataError, SpecError
from openmae.spec.schema import ExperimentSpec

log = logging.getLogger("openmae")


def open_images(source: str, key: str, *, labelled: bool | None) -> ImageIndex:
    """Index a folder or an archive.

    Args:
        source: the key's value.
        key: dotted, put in front of an error's text.
        labelled: classes are needed (True), unwanted (False), or taken where there are any (None).

    Raises:
        DataError: the source cannot be used.
    """
    with blaming(key):
        return index_images(Path(resolve_source(source)), labelled)


def class_count(spec: ExperimentSpec, index: ImageIndex) -> int:
    """Classes of the training set.

    Raises:
        DataError: there is only one.
        SpecError: ``model.num_classes`` was typed and differs.
    """
    found = len(index.class_names)
    if found < 2:
        raise DataError(
            f"dataset.train_data_sources: fine-tuning needs two classes or more, but {index.root} holds one: "
            f"{shorten(index.class_names)}.",
            "Name the folder above the class folders, or add images of another class.",
        )
    typed = spec.model.num_classes
    if typed is None or not spec.typed("model.num_classes"):
        log.info("model.num_classes=%d, from the data: %s", found, shorten(index.class_names))
    elif typed != found:
        raise SpecError(
            f"model.num_classes is {typed}, but the data has {found} classes: {shorten(index.class_names)}.",
            f"Remove model.num_classes (it is taken from the data), or set it to {found}.",
        )
    return found


def shorten(names: tuple[str, ...], most: int = 6) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
