"""The data sources of a spec, opened as indexes of images."""

from __future__ import annotations

import logging
from dataclasses import replace
from unicodedata import normalize

from openmae.data.decode import MAX_MEGAPIXELS
from openmae.data.index import ImageIndex
from openmae.data.open import open_index
from openmae.errors import DataError, SpecError, blaming
from openmae.spec.schema import ExperimentSpec
from openmae.storage.printable import shorten

_SHOWN = 6  # classes named in a message

log = logging.getLogger("openmae")


def open_images(source: str, key: str, *, labelled: bool | None, largest: int = MAX_MEGAPIXELS) -> ImageIndex:
    """Index a folder, an archive or shards; errors name the option ``key``.

    With ``labelled=True`` classes are required, with False ignored, with None used if there are any. ``largest`` is
    ``dataset.max_megapixels``.

    Raises:
        DataError: the source cannot be used.
    """
    with blaming(key):
        return replace(open_index(source, labelled), max_pixels=largest * 1_000_000)


def class_count(spec: ExperimentSpec, index: ImageIndex) -> int:
    """Return the number of classes of the training images.

    Raises:
        DataError: there is only one class.
        SpecError: ``model.num_classes`` is set to another number.
    """
    found = len(index.class_names)
    if found < 2:
        raise DataError(
            f"dataset.train_data_sources: fine-tuning needs two classes or more, but {index.place} has one: "
            f"{shorten(index.class_names, _SHOWN)}.",
            "Give the folder above the class folders, or add images of another class.",
        )
    if not spec.is_set("model.num_classes"):
        log.info("model.num_classes=%d, from the data: %s", found, shorten(index.class_names, _SHOWN))
    elif spec.model.num_classes != found:
        raise SpecError(
            f"model.num_classes is {spec.model.num_classes}, but the data has {found} classes: "
            f"{shorten(index.class_names, _SHOWN)}.",
            f"Remove model.num_classes (it is taken from the data), or set it to {found}.",
        )
    return found


def match_classes(index: ImageIndex, class_names: tuple[str, ...], trained_on: str = "the checkpoint") -> ImageIndex:
    """Return the validation images with classes numbered as in ``class_names``; warn about classes without an image.

    ``class_names`` are the classes of training, in order; ``trained_on`` names their source in messages.

    Raises:
        DataError: the images have a class that training does not have.
    """
    number_of = {normalize("NFC", name): number for number, name in enumerate(class_names)}
    if unknown := [name for name in index.class_names if normalize("NFC", name) not in number_of]:
        raise DataError(
            f"dataset.val_data_sources has {len(unknown)} class(es) that {trained_on} does not have: "
            f"{shorten(unknown, _SHOWN)}.",
            f"Rename or remove them; the classes of {trained_on} are: {shorten(class_names, _SHOWN)}.",
        )
    number = [number_of[normalize("NFC", name)] for name in index.class_names]
    if missing := tuple(name for place, name in enumerate(class_names) if place not in number):
        log.warning(
            "dataset.val_data_sources has no images of %d of the %d classes of %s: %s. The accuracy ignores them.",
            *(len(missing), len(class_names), trained_on, shorten(missing, _SHOWN)),
        )
    labels = tuple(number[label] if label >= 0 else -1 for label in index.labels or ())
    return replace(index, labels=labels, class_names=class_names)
