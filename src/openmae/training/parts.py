"""A checkpoint in parts, one a process, in a folder that has its name only when all of it is written.

``index.pth`` is the payload of a whole checkpoint with ``{"shape": [...]}`` under a mark of its own in place of each
tensor that the processes share out; ``part_0000_of_0002.pth`` has one process's rows of these, each with the number of
its first. Both are plain dicts that ``torch.load(weights_only=True)`` reads, as whole checkpoints are.
"""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from openmae.errors import RunError
from openmae.storage.encryption import Key, created, unlocked

SHARDS = ".shards"
INDEX = "index.pth"
_MARK = "openmae.shared"  # no key of a payload
_LOOK_SECONDS = 0.05

Place = tuple[str | int, ...]


class Shared:
    """A tensor whose rows lie in several parts, none of which is read before it is asked for.

    Args:
        shape: of the whole.
        pieces: (first row, rows), in any order.

    Raises:
        ValueError: the pieces are not the whole.
    """

    def __init__(self, shape: Sequence[int], pieces: Sequence[tuple[int, Tensor]]) -> None:
        self.shape = torch.Size(shape)
        self.pieces = sorted(pieces, key=lambda piece: (piece[0], len(piece[1])))
        self.dtype = self.pieces[0][1].dtype
        end = 0
        for first, rows in self.pieces:
            whole_rows = rows.shape[1:] == self.shape[1:] and rows.dtype == self.dtype
            if not whole_rows or (len(rows) and first != end):
                raise ValueError(f"rows of {tuple(self.shape)} are missing or twice")
            end += len(rows)
        if end != self.shape[0]:
            raise ValueError(f"{self.shape[0] - end} rows of {tuple(self.shape)} are missing")

    def rows(self, first: int, count: int) -> Tensor:
        """A copy of ``count`` rows."""
        taken = torch.empty((count, *self.shape[1:]), dtype=self.dtype)
        for start, piece in self.pieces:
            low, high = max(first, start), min(first + count, start + len(piece))
            if low < high:
                taken[low - first : high - first] = piece[low - start : high - start]
        return taken

    def whole(self) -> Tensor:
        """A copy of all rows."""
        return self.rows(0, self.shape[0])


def first_row(tensor: DTensor) -> int:
    """Number of this process's first row in the whole."""
    (placement,), mesh = tensor.placements, tensor.device_mesh
    assert placement == Shard(0), f"fully_shard deals rows, not {placement}"
    rows, share = tensor.shape[0], -(-tensor.shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * share, rows)
    assert len(tensor.to_local()) == min(share, rows - first), "fully_shard deals rows as torch.chunk does"
    return first


def own_part(payload: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Place, tuple[int, Tensor]]]:
    """What the index says, and this process's rows by their place in it; nothing is copied or gathered."""
    rows: dict[Place, tuple[int, Tensor]] = {}

    def told(value: Any, place: Place) -> Any:
        if isinstance(value, DTensor):
            rows[place] = first_row(value), value.to_local().detach()
            return {_MARK: list(value.shape)}
        if isinstance(value, Mapping):
            return {key: told(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [told(item, (*place, number)) for number, item in enumerate(value)]
        return value

    return told(payload, ()), rows


def joined(tree: Any) -> Any:
    """``tree`` with whole tensors in place of shared ones."""
    if isinstance(tree, Shared):
        return tree.whole()
    if isinstance(tree, Mapping):
        return {key: joined(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [joined(value) for value in tree]
    return tree


def write_part(rows: Mapping[Place, tuple[int, Tensor]], folder: Path, rank: int, ranks: int, key: Key | None) -> None:
    """Write a process's part; it has its name when it is on the disk. Where that fails nothing is left of it."""
    path = _part(folder, rank, ranks)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with created(temporary, key) as file:
            torch.save({"rows": dict(rows)}, file)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # a file system that has turned read-only
            temporary.unlink(missing_ok=True)
        raise


def complete(folder: Path, final: Path, index: Mapping[str, Any], ranks: int, key: Key | None, patience: float) -> None:
    """Wait for the parts of all processes, write the index, and give the folder its name.

    Args:
        folder: with the parts.
        patience: seconds.

    Raises:
        RunError: a part does not come.
    """
    deadline = time.monotonic() + patience
    for rank in range(ranks):
        while not _part(folder, rank, ranks).exists():
            if time.monotonic() > deadline:
                raise RunError(
                    f"{final.name} is not complete: process {rank} has not written its part within {patience:g} s.",
                    "Look at that process's messages and at its disk; OPENMAE_ANSWER_SECONDS sets the time.",
                )
            time.sleep(_LOOK_SECONDS)
    with created(folder / INDEX, key) as file:
        torch.save({"parts": ranks, "payload": dict(index)}, file)
    if final.exists():  # of a run that was cut twice at one place; a folder does not take the place of another
        shutil.rmtree(final)
    os.replace(folder, final)


def read_parts(folder: Path, key: Key | None, *, check: bool) -> dict[str, Any]:
    """The payload of a folder, with ``Shared`` tensors, which stay in plain files until they are asked for.

    Raises:
        CheckpointError: it is encrypted, and not to be opened with this key.
        Exception: many kinds of them, where something is missing or damaged.
    """
    index = load_file(folder / INDEX, key, mmap=True, check=check)
    ranks = index["parts"]
    found = [load_file(_part(folder, rank, ranks), key, mmap=True, check=check)["rows"] for rank in range(ranks)]

    def read(value: Any, place: Place) -> Any:
        if isinstance(value, Mapping):
            if value.keys() == {_MARK}:
                return Shared(value[_MARK], [part[place] for part in found])
            return {name: read(item, (*place, name)) for name, item in value.items()}
        if isinstance(value, list):
            return [read(item, (*place, number)) for number, item in enumerate(value)]
        return value

    return dict(read(index["payload"], ()))


def load_file(path: Path, key: Key | None, *, mmap: bool, check: bool) -> Any:
    """What ``torch.load`` reads, decrypted where it is encrypted.

    Args:
        mmap: leave the tensors of a plain file where they are.
        check: compare a plain file's checksums, which torch does not; encrypted ones are always authenticated.
    """
    file = unlocked(path, key)
    content = torch.load(file or path, map_location="cpu", weights_only=True, mmap=mmap and not file)
    if check and not file:
        with zipfile.ZipFile(path) as bundle:
            if damaged := bundle.testzip():
                raise zipfile.BadZipFile(f"{damaged} has another checksum")
    return content


def _part(folder: Path, rank: int, ranks: int) -> Path:
    return folder / f"part_{rank:04d}_of_{ranks:04d}.pth"
