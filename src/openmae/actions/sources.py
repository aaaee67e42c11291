"""From the keys of a spec to indexed images."""

from __future__ import annotations

import logging
from dataclasses import replace
from unicodedata import normalize

from openmae.data.decode import MAX_MEGAPIXELS
from openmae.data.image_index import ImageIndex
from openmae.data.open import open_index
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
    if typed is None or not spec.is_set("model.num_classes"):
        log.info("model.num_classes=%d, from the data: %s", found, shorten(index.class_names))
    elif typed != found:
        raise SpecError(
            f"model.num_classes is {typed}, but the data has {found} classes: {shorten(index.class_names)}.",
            f"Remove model.num_classes (it is taken from the data), or set it to {found}.",
        )
    return found


def match_classes(index: ImageIndex, class_names: tuple[str, ...], trained_on: str = "the checkpoint") -> ImageIndex:
    """Number the images' classes as in training; log which of those classes have no image.

    Args:
        index: the validation set.
        class_names: of training, in order.
        trained_on: what they are the classes of.

    Raises:
        DataError: a class that training does not know.
    """
    number_of = {normalize("NFC", name): number for number, name in enumerate(class_names)}
    if unknown := [name for name in index.class_names if normalize("NFC", name) not in number_of]:
        raise DataError(
            f"dataset.val_data_sources has {len(unknown)} class(es) that {trained_on} does not have: "
            f"{shorten(tuple(unknown))}.",
            f"Rename or remove them; the classes of {trained_on} are: {shorten(class_names)}.",
        )
    number = [number_of[normalize("NFC", name)] for name in index.class_names]
    if missing := tuple(name for place, name in enumerate(class_names) if place not in number):
        log.warning(
            "dataset.val_data_sources has no images of %d of the %d classes of %s: %s. Accuracy is that of the others.",
            *(len(missing), len(class_names), trained_on, shorten(missing)),
        )
    labels = tuple(number[label] if label >= 0 else -1 for label in index.labels or ())
    return replace(index, labels=labels, class_names=class_names)


def shorten(names: tuple[str, ...], most: int = 6) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
