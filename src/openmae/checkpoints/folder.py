"""Checkpoints on disk: named, written whole or not at all, rotated, and found again.

A checkpoint is a plain dict of tensors and plain values that ``torch.load(weights_only=True)`` reads. Its names are
the contract's: ``model_epoch_EEE_step_SSSSS.pth``, ``<arch>_latest.pth`` (a link to the newest), ``model_best.pth``.
Under fsdp it may be a folder of parts (``parts.py``), ``model_epoch_EEE_step_SSSSS.shards``, to which no link points.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from lightning_fabric.utilities import move_data_to_device

from openmae.checkpoints.parts import (
    SHARDS,
    clear_begun,
    complete,
    discard,
    load_file,
    own_part,
    put_back,
    read_parts,
    reason,
    write_part,
)
from openmae.checkpoints.writer import BackgroundWorker, HostCopy
from openmae.distributed.watchdog import answer_seconds
from openmae.errors import CheckpointError, RunError, StoppedAtOnce
from openmae.storage import layout
from openmae.storage.atomic import replacing
from openmae.storage.encryption import Key, created

_PASSING = (errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT)  # of a disk, a network, a machine
_STOP_SECONDS = 5.0  # for what is being written, when a run is to stop at once

log = logging.getLogger("openmae")


class CheckpointFolder:
    """The checkpoints of one run, written by a thread while the training goes on, one at a time.

    A context: its end waits for what is being written.

    Args:
        folder: where they lie.
        arch: names the link to the newest.
        keep: how many of the newest are kept; the best is kept besides.
        key: encrypts them.
    """

    def __init__(self, folder: Path, arch: str, keep: int, key: Key | None = None) -> None:
        self.folder = folder
        self.latest = folder / layout.latest_name(arch)
        self.keep = keep
        self.key = key
        self._host, self._writer = HostCopy(), BackgroundWorker()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # a write that is given up leaves nothing under a checkpoint's name
            self._writer.wait(_STOP_SECONDS if isinstance(error, StoppedAtOnce) else None)
        except RunError as failure:
            if error is None:
                raise
            log.error("%s", failure)
        finally:
            self._host = HostCopy()

    def save(
        self, payload: Mapping[str, Any], epoch: int, step: int, *, best: bool = False, rotate: bool = True
    ) -> Path:
        """Copy a payload, and begin to write it as the checkpoint of ``epoch`` and ``step``; returns its path.

        When it is written, the link points at it, and the oldest are dropped.

        Args:
            payload: may change afterwards.
            epoch, step: finished ones.
            best: make it ``model_best.pth`` too, first: of a run that is killed in between, the best is never older
                than what its checkpoint says of it.
            rotate: drop the oldest; False after a skipped step, whose weights may be worse than older ones.

        Raises:
            RunError: the one before could not be written; what was there is untouched.
        """
        path = self.folder / layout.checkpoint_name(epoch, step)
        self._begin(payload, path, best, rotate)
        return path

    def make_room(self, epoch: int, step: int) -> None:
        """Make the folder that the parts of a checkpoint are written into; by process 0, before all of them begin.

        Raises:
            RunError: it cannot be made, or the checkpoint before could not be written.
        """
        self.wait()
        path = self.folder / layout.checkpoint_name(epoch, step, SHARDS)
        with _explaining(path):
            put_back(self.folder)
            clear_begun(self.folder)
            _hidden(path).mkdir(exist_ok=True)
        if left := [file.name for file in _hidden(path).iterdir() if not file.name.startswith(".")]:
            raise RunError(
                f"{_hidden(path)} of a run that was killed cannot be deleted ({', '.join(sorted(left))}).",
                "Delete that folder: the parts of two runs must not mix.",
            )

    def save_part(
        self,
        payload: Mapping[str, Any],
        best: Mapping[str, Any],
        epoch: int,
        step: int,
        ranks: tuple[int, int],
        *,
        rotate: bool = True,
    ) -> None:
        """As :meth:`save`, by all processes: each writes its part, and process 0 waits for them and counts them.

        Args:
            payload: as the processes share it out.
            best: of process 0, a whole payload for ``model_best.pth``; empty: this is not the best.
            ranks: number of this process, and of all.
            rotate: as for :meth:`save`.

        Raises:
            RunError: the one before could not be written, or this process does not see the folder of process 0.
        """
        self.wait()
        path = self.folder / layout.checkpoint_name(epoch, step, SHARDS)
        if not _hidden(path).is_dir():
            raise RunError(
                f"Process {ranks[0]} does not see the folder in {self.folder} that process 0 has made for {path.name}.",
                "Put results_dir on a file system that all nodes share, or set train.sharded_checkpoints=false.",
            )
        index, rows = own_part(payload)
        mine = {"index": {}, "best": {}} if ranks[0] else {"index": index, "best": best}
        copy = self._host.take({**mine, "rows": rows})
        self._writer.start(partial(self._write_part, copy, path, *ranks, rotate))

    def save_best(self, payload: Mapping[str, Any]) -> None:
        """As :meth:`save`, of a ``model_best.pth`` that is no checkpoint besides."""
        self._begin(payload, self.folder / layout.BEST, best=False, rotate=False)

    def wait(self) -> None:
        """Return when everything is written.

        Raises:
            RunError: something could not be written; what was there is untouched.
        """
        self._writer.wait()

    def go_on_from(self, epoch: int, step: int) -> None:
        """Set aside what is newer than the place that a run goes on from: the next start would take the newest."""
        put_back(self.folder)
        clear_begun(self.folder)
        newer = [path for path in list_checkpoints(self.folder) if _place(path) > (epoch, step)]
        for path in newer:
            set_aside(path, layout.SUPERSEDED)
        if newer:
            log.warning(
                "The run goes on from epoch %d, step %d: what is newer in %s is set aside as *%s (%s).",
                epoch, step, self.folder, layout.SUPERSEDED, ", ".join(path.name for path in newer),
            )  # fmt: skip
        self._repair_link()

    def drop_diverged(self, step: int) -> str:
        """Set aside what was written at ``step`` or later; return the name of what a run then resumes from, or "".

        Raises:
            RunError: the checkpoint before could not be written.
        """
        self.wait()
        for path in list_checkpoints(self.folder):
            if _place(path)[1] >= step:
                set_aside(path, layout.DIVERGED)
        best = self.folder / layout.BEST
        with suppress(CheckpointError):  # missing, or of no training
            if read_training_state(best, self.key, lazily=True)["progress"]["step"] >= step:
                set_aside(best, layout.DIVERGED)
        self._repair_link()
        left = list_checkpoints(self.folder) or [path for path in (best,) if path.is_file()]
        return left[-1].name if left else ""

    def _repair_link(self) -> None:
        """Point the link at the newest checkpoint, where the one that it pointed at was set aside."""
        if self.latest.is_symlink() and not self.latest.exists():
            left = [path for path in list_checkpoints(self.folder) if path.is_file()]
            if left:
                _point(self.latest, left[-1])
            else:
                self.latest.unlink()

    def _begin(self, payload: Mapping[str, Any], path: Path, best: bool, rotate: bool) -> None:
        self.wait()
        self._writer.start(partial(self._write, self._host.take(payload), path, best, rotate))

    def _write(self, payload: Mapping[str, Any], path: Path, best: bool, rotate: bool) -> None:
        with _replacing(path) as temporary:
            _dump(payload, temporary, self.key)
            if best:
                self._name_best(temporary)
        if path.name == layout.BEST:
            return
        _point(self.latest, path)
        if rotate:
            self._drop_oldest(path)

    def _write_part(self, copy: Mapping[str, Any], path: Path, rank: int, ranks: int, rotate: bool) -> None:
        hidden = _hidden(path)
        try:
            with _explaining(path):
                if copy["best"]:
                    with _replacing(self.folder / layout.BEST) as temporary:
                        _dump(copy["best"], temporary, self.key)
                write_part(copy["rows"], hidden, rank, ranks, self.key)
                if rank:
                    return
                complete(hidden, path, copy["index"], ranks, self.key, answer_seconds())
                self.latest.unlink(missing_ok=True)  # it would point at an older one
        except Exception as error:
            if rank == 0:
                discard(hidden)
            elif isinstance(error.__cause__, FileNotFoundError) and not hidden.exists():  # process 0 tells why
                log.warning("Process %d: %s was given up before its part was written.", rank, path.name)
                return
            raise
        if rotate:
            self._drop_oldest(path)

    def _drop_oldest(self, written: Path) -> None:
        for old in list_checkpoints(self.folder)[: -self.keep]:
            if old == written:
                continue
            try:  # half of a folder is not to be found under its name
                discard(old.replace(_hidden(old)) if old.is_dir() else old)
            except OSError as error:
                log.warning("%s cannot be dropped (%s): it only takes room.", old, reason(error))

    def _name_best(self, written: Path) -> None:
        with _replacing(self.folder / layout.BEST) as temporary:
            try:
                os.link(written, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(written, temporary)


def list_checkpoints(folder: Path) -> list[Path]:
    """The numbered checkpoints of a folder, oldest first by (epoch, step); a whole one stands after its parts."""
    return [folder / name for name in layout.sort_checkpoints(os.listdir(folder))] if folder.is_dir() else []


def set_aside(path: Path, ending: str) -> Path:
    """Rename a checkpoint, so that no run takes it up; returns where it is."""
    aside = path.with_name(path.name + ending)
    for number in count(2):
        try:
            return path.replace(aside)
        except FileNotFoundError:  # another process of the run was quicker
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise  # a file takes the place of another, a folder does not
        aside = path.with_name(f"{path.name}{ending}.{number}")
    return aside


def _place(path: Path) -> tuple[int, int]:
    """The epoch and the step in a checkpoint's name."""
    place = layout.checkpoint_progress(path.name)
    assert place is not None
    return place


def write_checkpoint(payload: Mapping[str, Any], path: Path, key: Key | None = None) -> None:
    """Write to a temporary name, flush to the disk, rename; a GPU's tensors as a CPU's, so that any machine reads them.

    Raises:
        RunError: the disk is full or not writable; nothing is left of the attempt.
    """
    on_cpu = move_data_to_device(dict(payload), torch.device("cpu"))
    with _replacing(path) as temporary:
        _dump(on_cpu, temporary, key)


def _dump(payload: Mapping[str, Any], path: Path, key: Key | None) -> None:
    with created(path, key) as file:
        torch.save(payload, file)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write, which then takes the place of ``path`` in one move."""
    with _explaining(path), replacing(path, single_writer=True) as temporary:
        yield temporary


def _hidden(path: Path) -> Path:
    """What it is called while it is written."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Tell why a checkpoint could not be written, and what is left."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        left = list_checkpoints(path.parent)
        kept = f" {left[-1].name} is intact: the same command resumes from it." if left else ""
        raise RunError(
            f"The checkpoint {path.name} could not be written ({reason(error)}).",
            f"Free space in {path.parent}, or lower train.keep_checkpoints.{kept}",
        ) from error


def read_training_state(path: Path, key: Key | None = None, *, lazily: bool = False) -> dict[str, Any]:
    """The whole payload of a checkpoint that this package wrote.

    Args:
        path: the file, or the folder of parts, whose shared tensors are ``Shared``.
        key: opens it where it is encrypted.
        lazily: for a look at the plain values: tensors stay in a plain file, which must stay where it is. As torch
            compares no checksums, this does.

    Raises:
        CheckpointError: missing, truncated, not written by a training run of this package, or encrypted and not
            to be opened with this key.
    """
    in_parts = path.suffix == SHARDS and path.is_dir()
    if not in_parts and not path.is_file():
        raise CheckpointError(
            f"there is no file {str(path)!r}.",
            "Name a model_epoch_*.pth, or leave the key empty to resume from the newest in results_dir.",
        )
    payload: Any
    try:
        payload = read_parts(path, key, check=lazily) if in_parts else load_file(path, key, mmap=lazily, check=lazily)
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _PASSING:  # it says nothing of the file
            raise
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is truncated, damaged or foreign.",
            "Resume from an older model_epoch_*.pth, or use train.pretrained_model_path for foreign weights.",
        ) from error
    if not isinstance(payload, dict) or not {"openmae", "progress", "optimizer"} <= payload.keys():
        raise CheckpointError(
            f"{path} holds no training state, so training cannot resume from it.",
            "Give it as train.pretrained_model_path to start from its weights.",
        )
    return payload


def _point(link: Path, target: Path) -> None:
    with _replacing(link) as temporary:
        try:
            temporary.symlink_to(target.name)
        except OSError:  # a file system without links
            shutil.copyfile(target, temporary)
