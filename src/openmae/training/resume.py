"""Find the checkpoint that a run resumes from: the newest that can be read and whose weights are finite."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from openmae.checkpoints.folder import (
    list_checkpoints,
    read_training_state,
    set_aside,
)
from openmae.checkpoints.parts import INDEX, Shared, put_back
from openmae.errors import CheckpointError
from openmae.storage import layout
from openmae.storage.encryption import Key, is_encrypted

log = logging.getLogger("openmae")


class NotFiniteError(CheckpointError):
    """A checkpoint can be read, but training cannot resume from its weights."""


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest numbered checkpoint, or None where there is none."""
    put_back(folder)
    found = list_checkpoints(folder)
    return found[-1] if found else None


def newest_readable(folder: Path, key: Key | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint to resume from and its payload, read lazily; None where there is none.

    The newest numbered checkpoint is taken, and ``model_best.pth`` where none of them can be used. Checkpoints that are
    damaged, or whose weights are not finite, are set aside with a warning. Where none can be read nothing is touched,
    since the key may be wrong; where all can be read and none is finite, training starts from the beginning.

    Raises:
        CheckpointError: there are some, and none can be read; or the newest is encrypted, and there is no key.
    """
    found, refused = look_for_checkpoint(folder, key)
    unreadable = [error for error in refused.values() if not isinstance(error, NotFiniteError)]
    if found is None and unreadable:
        raise unreadable[0]
    for path, error in refused.items():
        _set_aside(path, error, f"{found[0].name} is used" if found else "training starts from the beginning")
    if len(unreadable) < len(refused) and found and found[0].name != layout.BEST and (folder / layout.BEST).is_file():
        try:
            read_finite(folder / layout.BEST, key)
        except CheckpointError as error:
            _set_aside(folder / layout.BEST, error, "the next epoch's takes its place")
    return found


def look_for_checkpoint(
    folder: Path, key: Key | None
) -> tuple[tuple[Path, dict[str, Any]] | None, dict[Path, CheckpointError]]:
    """Return the checkpoint to resume from with its payload, or None, and the newer ones with what is wrong with them.

    Raises:
        CheckpointError: one is encrypted, and there is no key.
    """
    put_back(folder)
    refused: dict[Path, CheckpointError] = {}
    for path in _candidates(folder):
        try:
            return (path, read_finite(path, key)), refused
        except CheckpointError as error:
            file = path / INDEX if path.is_dir() else path
            if key is None and file.exists() and is_encrypted(file):
                raise
            refused[path] = error
    return None, refused


def read_finite(path: Path, key: Key | None) -> dict[str, Any]:
    """Return the payload of a checkpoint, read lazily, after checking that all its tensors are finite.

    Raises:
        CheckpointError: as ``read_training_state``.
        NotFiniteError: a tensor holds NaN or infinity.
    """
    payload = read_training_state(path, key, lazily=True)
    parts = {name: payload.get(name) for name in ("state_dict", "ema_state_dict", "optimizer")}
    for name, tensor in _tensors(parts):
        if tensor.is_floating_point() and not (tensor.norm().isfinite() or tensor.isfinite().all()):
            raise NotFiniteError(
                f"{path} holds values that are not finite ({name}): the training that wrote it had diverged.",
                "Resume from an older checkpoint, or set another results_dir to start a new run.",
            )
    return payload


def best_was_set_aside(folder: Path) -> bool:
    """Return whether a folder has lost its ``model_best.pth``, so that the next epoch is the best so far."""
    return not (folder / layout.BEST).exists() and any(folder.glob(f"{layout.BEST}.*"))


def _candidates(folder: Path) -> Iterator[Path]:
    yield from reversed(list_checkpoints(folder))
    # without a numbered checkpoint, even one set aside, model_best.pth is no remainder of a run
    if any(layout.is_numbered(path.name) for path in folder.glob("*")) and (folder / layout.BEST).is_file():
        yield folder / layout.BEST


def _set_aside(path: Path, error: CheckpointError, instead: str) -> None:
    broken = isinstance(error, NotFiniteError)
    aside = set_aside(path, layout.DIVERGED if broken else layout.UNREADABLE)
    fault = "holds weights that are not finite" if broken else "cannot be read"
    log.warning("%s %s: it is now %s, and %s.", path, fault, aside.name, instead)


def _tensors(tree: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield place, tree
    elif isinstance(tree, Shared):
        for _, rows in tree.pieces:
            yield place, rows
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _tensors(value, f"{place}.{name}" if place else str(name))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from _tensors(value, f"{place}.{number}")
