"""From the keys of a spec to indexed images."""

from __future__ import annotations

import logging
from dataclasses import replace

from openmae.data.decode import MAX_MEGAPIXELS
from openmae.data.images import ImageIndex
from openmae.data.opening import open_index
from openmae.errors import DataError, SpecError, blaming
from openmae.spec.schema import ExperimentSpec

log = logging.getLogger("openmae")


def open_images(source: str, key: str, *, labelled: bool | None, largest: int = MAX_MEGAPIXELS) -> ImageIndex:
    """Index a folder, an archive or shards.

    Args:
        source: the key's value.
        key: dotted, put in front of an error's text.
        labelled: classes are needed (True), unwanted (False), or taken where there are any (None).
        largest: ``dataset.max_megapixels``.

    Raises:
        DataError: the source cannot be used.
    """
    with blaming(key):
        return replace(open_index(source, labelled), max_pixels=largest * 1_000_000)


def class_count(spec: ExperimentSpec, index: ImageIndex) -> int:
    """Classes of the training set.

    Raises:
        DataError: there is only one.
        SpecError: ``model.num_classes`` was typed and differs.
    """
    found = len(index.class_names)
    if found < 2:
        raise DataError(
            f"dataset.train_data_sources: fine-tuning needs two classes or more, but {index.place} holds one: "
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


def match_classes(index: ImageIndex, class_names: tuple[str, ...]) -> ImageIndex:
    """Number the images' classes as the checkpoint does.

    Raises:
        DataError: a class that the checkpoint does not know.
    """
    if unknown := [name for name in index.class_names if name not in class_names]:
        raise DataError(
            f"dataset.val_data_sources has {len(unknown)} class(es) that the checkpoint was not trained on: "
            f"{shorten(tuple(unknown))}.",
            f"Rename or remove them; the checkpoint's classes are: {shorten(class_names)}.",
        )
    number = [class_names.index(name) for name in index.class_names]
    labels = tuple(number[label] for label in index.labels or ())
    return replace(index, labels=labels, class_names=class_names)


def shorten(names: tuple[str, ...], most: int = 6) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
