"""Find the checkpoint to resume from: the newest one that is readable and has finite values."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from openmae.checkpoints.folder import check_not_sharded, list_checkpoints, set_aside
from openmae.checkpoints.format import is_finite, read_training_state
from openmae.errors import CheckpointError
from openmae.storage import layout
from openmae.storage.encryption import Key, is_encrypted

log = logging.getLogger("openmae")


class Resumable(NamedTuple):
    """A checkpoint to resume from, and its payload."""

    path: Path
    payload: dict[str, Any]


class NotFiniteError(CheckpointError):
    """A checkpoint is readable, but has NaN or infinite values."""


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest numbered checkpoint, or None if there is none."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


def newest_readable(folder: Path, key: Key | None = None) -> Resumable | None:
    """Return the checkpoint to resume from and its payload, read lazily, or None if there is none.

    This is the newest usable numbered checkpoint, or ``model_best.pth`` if no numbered one is usable. Newer ones that
    are damaged or have non-finite values are set aside with a warning. If no checkpoint is usable and one of them is
    damaged, nothing is renamed, since the key may be wrong; if all are only non-finite, training starts from the
    beginning.

    Raises:
        CheckpointError: No checkpoint is usable and one of them cannot be read; or a checkpoint is encrypted and there
            is no key; or the folder has a sharded checkpoint of an earlier version.
    """
    check_not_sharded(folder)
    found, refused = look_for_checkpoint(folder, key)
    unreadable = [error for error in refused.values() if not isinstance(error, NotFiniteError)]
    if found is None and unreadable:
        raise unreadable[0]
    for path, error in refused.items():
        _set_aside(path, error, f"{found.path.name} is used" if found else "training starts from the beginning")
    if len(unreadable) < len(refused) and found and found.path.name != layout.BEST and (folder / layout.BEST).is_file():
        try:
            read_finite(folder / layout.BEST, key)
        except CheckpointError as error:
            _set_aside(folder / layout.BEST, error, "the next epoch replaces it")
    return found


def look_for_checkpoint(folder: Path, key: Key | None) -> tuple[Resumable | None, dict[Path, CheckpointError]]:
    """Return the checkpoint to resume from, or None, and the errors of the newer ones. Nothing is renamed.

    Raises:
        CheckpointError: A checkpoint is encrypted but encryption_key is not set.
    """
    refused: dict[Path, CheckpointError] = {}
    for path in _candidates(folder):
        try:
            return Resumable(path, read_finite(path, key)), refused
        except CheckpointError as error:
            if key is None and path.exists() and is_encrypted(path):
                raise
            refused[path] = error
    return None, refused


def read_finite(path: Path, key: Key | None) -> dict[str, Any]:
    """Return the payload of a checkpoint, read lazily, after checking that all its tensors are finite.

    Raises:
        CheckpointError: See ``read_training_state``.
        NotFiniteError: A tensor holds NaN or infinity.
    """
    payload = read_training_state(path, key, lazily=True)
    parts = {name: payload.get(name) for name in ("state_dict", "ema_state_dict", "optimizer")}
    for name, tensor in _tensors(parts):
        if not is_finite(tensor):
            raise NotFiniteError(
                f"{path} has non-finite values ({name}): the run that wrote it had diverged.",
                "Resume from an older checkpoint, or set another results_dir to start a new run.",
            )
    return payload


def best_was_set_aside(folder: Path) -> bool:
    """Return True if ``model_best.pth`` was set aside, so that the next epoch counts as the best so far."""
    return not (folder / layout.BEST).exists() and any(folder.glob(f"{layout.BEST}.*"))


def _candidates(folder: Path) -> Iterator[Path]:
    yield from reversed(list_checkpoints(folder))
    # without a numbered checkpoint, even one that was set aside, model_best.pth does not come from an unfinished run
    if any(layout.is_numbered(path.name) for path in folder.glob("*")) and (folder / layout.BEST).is_file():
        yield folder / layout.BEST


def _set_aside(path: Path, error: CheckpointError, instead: str) -> None:
    diverged = isinstance(error, NotFiniteError)
    aside = set_aside(path, layout.DIVERGED if diverged else layout.UNREADABLE)
    fault = "holds weights that are not finite" if diverged else "cannot be read"
    log.warning("%s %s: it is now %s, and %s.", path, fault, aside.name, instead)


def _tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping | list):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
