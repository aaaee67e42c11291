"""From the keys of a spec to indexed images."""

from __future__ import annotations

import logging
from pathlib import Path

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
    """
    try:
        return index_images(Path(resolve_source(source)), labelled)
    except DataError as error:
        raise DataError(f"{key}: {error.problem}", error.fix) from error


def class_count(spec: ExperimentSpec, index: ImageIndex) -> int:
    """Classes of the training set.

    Raises:
        SpecError: ``model.num_classes`` was typed and differs.
    """
    found = len(index.class_names)
    typed = spec.model.num_classes
    if typed is None or not spec.typed("model.num_classes"):
        log.info("model.num_classes=%d, from the data: %s", found, _shorten(index.class_names))
    elif typed != found:
        raise SpecError(
            f"model.num_classes is {typed}, but the data has {found} classes: {_shorten(index.class_names)}.",
            f"Remove model.num_classes (it is taken from the data), or set it to {found}.",
        )
    return found


def _shorten(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
