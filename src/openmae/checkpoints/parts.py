"""A checkpoint in parts, one a process, in a folder that has its name only when all of it is written.

``index.pth`` is the payload of a whole checkpoint with ``{"shape": [...]}`` under a mark of its own in place of each
tensor that the processes share out; ``part_0000_of_0002.pth`` has one process's rows of these, each with the number of
its first. Both are plain dicts that ``torch.load(weights_only=True)`` reads, as whole checkpoints are.
"""

from __future__ import annotations

import logging
import os
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
from openmae.storage.atomic import delete_folder
from openmae.storage.encryption import Key, created, unlocked

SHARDS = ".shards"
INDEX = "index.pth"
_FAILED = ".failed"  # in place of a part, with the reason
_REPLACED = ".replaced"
_MARK = "openmae.shared"  # no key of a payload
_LOOK_SECONDS = 0.05

Place = tuple[str | int, ...]

log = logging.getLogger("openmae")


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
    """Write a process's part; it has its name when it is on the disk. Where that fails, the reason takes its place."""
    path = _part(folder, rank, ranks)
    temporary = _begun(path)
    try:
        with created(temporary, key) as file:
            torch.save({"rows": dict(rows)}, file)
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # a file system that has turned read-only
            temporary.unlink(missing_ok=True)
            temporary.write_text(reason(error), encoding="utf-8")
            temporary.replace(path.with_suffix(_FAILED))
        raise


def complete(folder: Path, final: Path, index: Mapping[str, Any], ranks: int, key: Key | None, patience: float) -> None:
    """Wait for the parts of all processes, write the index, and give the folder its name.

    Args:
        folder: with the parts.
        patience: seconds that a part may stay as long as it is.

    Raises:
        RunError: a part does not come.
        RuntimeError: a process could not write its part.
    """
    for rank in range(ranks):
        _await_part(folder, final, rank, ranks, patience)
    with created(folder / INDEX, key) as file:
        torch.save({"parts": ranks, "payload": dict(index)}, file)
    if not final.exists():
        os.replace(folder, final)
        return
    # Of a run that was cut twice at one place. A folder does not take the place of another; whenever this is killed,
    # one of the two is whole, and found: `put_back`.
    replaced = final.with_name(f".{final.name}{_REPLACED}")
    delete_folder(replaced)
    os.replace(final, replaced)
    try:
        os.replace(folder, final)
    except OSError:
        os.replace(replaced, final)
        raise
    discard(replaced)


def put_back(folder: Path) -> None:
    """Give the checkpoints of a folder their names again that a killed run was about to replace."""
    for replaced in folder.glob(f".*{SHARDS}{_REPLACED}"):
        final = replaced.with_name(replaced.name[1 : -len(_REPLACED)])
        if not final.exists():
            with suppress(FileNotFoundError):  # another process of the run was quicker
                os.replace(replaced, final)


def clear_begun(folder: Path) -> None:
    """Delete the folders of parts that killed runs have left; call `put_back` before."""
    for ending in (".tmp", _REPLACED):
        for left in folder.glob(f".model_epoch_*{SHARDS}{ending}"):
            discard(left)


def discard(path: Path) -> None:
    """Delete a file or a folder that nobody needs; where it cannot be, that is told, and ends no training."""
    try:
        if path.is_dir():
            delete_folder(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be deleted (%s): it only takes room.", path, reason(error))


def reason(error: BaseException) -> str:
    """What the system says of a failure, which torch reports in words of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).partition("\n")[0] or type(error).__name__


def read_parts(folder: Path, key: Key | None, *, check: bool) -> dict[str, Any]:
    """The payload of a folder, with ``Shared`` tensors, which stay in plain files until they are asked for.

    Raises:
        CheckpointError: it is encrypted, and not to be opened with this key.
        Exception: many kinds of them, where something is missing or damaged.
    """
    index = load_file(folder / INDEX, key, mmap=False, check=check)  # a run keeps the plain values of it
    ranks = index["parts"]
    found = [load_file(_part(folder, rank, ranks), key, mmap=True, check=check)["rows"] for rank in range(ranks)]
    return dict(_with_shared(index["payload"], (), found))


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


def _with_shared(value: Any, place: Place, found: Sequence[Mapping[Place, tuple[int, Tensor]]]) -> Any:
    # No closure: one that calls itself is a cycle, which would keep the parts open until the garbage is collected.
    if isinstance(value, Mapping):
        if value.keys() == {_MARK}:
            return Shared(value[_MARK], [part[place] for part in found])
        return {name: _with_shared(item, (*place, name), found) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_shared(item, (*place, number), found) for number, item in enumerate(value)]
    return value


def _await_part(folder: Path, final: Path, rank: int, ranks: int, patience: float) -> None:
    path, size, grown = _part(folder, rank, ranks), -1, time.monotonic()
    while not path.exists():
        for failed in folder.glob(f"part_*{_FAILED}"):
            number = int(failed.name.split("_")[1])
            raise RuntimeError(f"process {number}: {failed.read_text(encoding='utf-8')}")
        with suppress(FileNotFoundError):  # not begun, or finished in between
            if (now := _begun(path).stat().st_size) != size:
                size, grown = now, time.monotonic()
        if time.monotonic() - grown > patience:
            raise RunError(
                f"{final.name} is not complete: process {rank} has written nothing of its part for {patience:g} s.",
                "Look at that process's messages and at its disk; OPENMAE_ANSWER_SECONDS sets the time.",
            )
        time.sleep(_LOOK_SECONDS)


def _part(folder: Path, rank: int, ranks: int) -> Path:
    return folder / f"part_{rank:04d}_of_{ranks:04d}.pth"


def _begun(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
