"""The checkpoints of a training run on disk: names, rotation, the best one, the link to the newest.

The names are part of the contract: ``model_epoch_EEE_step_SSSSS.pth``, ``<arch>_latest.pth`` (a link to the newest) and
``model_best.pth``. A file has such a name only when it is complete; the content is described in ``format.py``.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from openmae.checkpoints.damage import sharded
from openmae.checkpoints.format import read_training_state, write_checkpoint
from openmae.checkpoints.writer import BackgroundWorker, HostCopy
from openmae.errors import CheckpointError, RunError, StoppedAtOnce
from openmae.storage.encryption import Key

BEST = "model_best.pth"
UNREADABLE = ".unreadable"
SUPERSEDED = ".superseded"
DIVERGED = ".diverged"
_STOP_SECONDS = 5.0  # to wait for a write in progress when the run is to stop at once
_NAME = re.compile(r"model_epoch_(\d+)_step_(\d+)\.pth")
_SHARDED = "model_epoch_*.shards"  # folders that earlier versions wrote under fsdp

log = logging.getLogger("openmae")


class CheckpointFolder:
    """The checkpoints of one run, written one at a time by a background thread while training continues.

    A context manager: leaving it waits for the write in progress.

    Args:
        folder: where the checkpoints are.
        arch: architecture, which names the link to the newest checkpoint.
        keep: number of newest checkpoints to keep; the best one is kept in addition.
        key: encrypts the checkpoints.
    """

    def __init__(self, folder: Path, arch: str, keep: int, key: Key | None = None) -> None:
        self.folder = folder
        self.latest = folder / f"{arch}_latest.pth"
        self.keep = keep
        self.key = key
        self._host, self._writer = HostCopy(), BackgroundWorker()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # an abandoned write leaves nothing under a checkpoint's name
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
        """Copy a payload and start to write it as the checkpoint of ``epoch`` and ``step``; return its path.

        Once it is written, the link points at it and the oldest checkpoints are deleted.

        Args:
            payload: content of the checkpoint; may change afterwards.
            epoch: finished epochs.
            step: finished steps.
            best: also write ``model_best.pth``, and do so first: if the run is killed in between, the best checkpoint
                is never older than the newest one claims.
            rotate: delete the oldest checkpoints; False after a skipped step, when the weights may be worse than older
                ones.

        Raises:
            RunError: The previous checkpoint could not be written. Files that existed before are unchanged.
        """
        path = self.folder / f"model_epoch_{epoch:03d}_step_{step:05d}.pth"
        self._start(payload, path, best, rotate)
        return path

    def save_best(self, payload: Mapping[str, Any]) -> None:
        """Copy a payload and start to write it as ``model_best.pth`` only; see :meth:`save`."""
        self._start(payload, self.folder / BEST, best=False, rotate=False)

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            RunError: A checkpoint could not be written. Files that existed before are unchanged.
        """
        self._writer.wait()

    def resume_from(self, epoch: int, step: int) -> None:
        """Set aside the checkpoints after the one that a run resumes from, or the next start would take the newest."""
        newer = [path for path in list_checkpoints(self.folder) if _position(path) > (epoch, step)]
        for path in newer:
            set_aside(path, SUPERSEDED)
        if newer:
            log.warning(
                "The run resumes from epoch %d, step %d: newer checkpoints in %s are set aside as *%s (%s).",
                epoch, step, self.folder, SUPERSEDED, ", ".join(path.name for path in newer),
            )  # fmt: skip
        self._repair_link()

    def drop_diverged(self, step: int) -> str:
        """Set aside the checkpoints of ``step`` and later; return the name of the newest one left, or "".

        Raises:
            RunError: The previous checkpoint could not be written.
        """
        self.wait()
        for path in list_checkpoints(self.folder):
            if _position(path)[1] >= step:
                set_aside(path, DIVERGED)
        best = self.folder / BEST
        with suppress(CheckpointError):  # missing, or not written by training
            if read_training_state(best, self.key, lazily=True)["progress"]["step"] >= step:
                set_aside(best, DIVERGED)
        self._repair_link()
        left = list_checkpoints(self.folder) or [path for path in (best,) if path.is_file()]
        return left[-1].name if left else ""

    def _repair_link(self) -> None:
        """Point the link at the newest checkpoint where its target was set aside."""
        if self.latest.is_symlink() and not self.latest.exists():
            left = list_checkpoints(self.folder)
            if left:
                _link(self.latest, left[-1])
            else:
                self.latest.unlink()

    def _start(self, payload: Mapping[str, Any], path: Path, best: bool, rotate: bool) -> None:
        self.wait()
        self._writer.start(partial(self._write, self._host.copy(payload), path, best, rotate))

    def _write(self, payload: Mapping[str, Any], path: Path, best: bool, rotate: bool) -> None:
        with _replacing(path) as temporary:
            write_checkpoint(payload, temporary, self.key)
            if best:
                self._name_best(temporary)
        if path.name == BEST:
            return
        _link(self.latest, path)
        if rotate:
            self._delete_oldest(path)

    def _delete_oldest(self, written: Path) -> None:
        for old in list_checkpoints(self.folder)[: -self.keep]:
            if old == written:
                continue
            try:
                old.unlink(missing_ok=True)
            except OSError as error:
                log.warning("The old checkpoint %s cannot be deleted (%s).", old, _reason(error))

    def _name_best(self, written: Path) -> None:
        with _replacing(self.folder / BEST) as temporary:
            try:
                os.link(written, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(written, temporary)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the numbered checkpoints in a folder, oldest first by (epoch, step)."""
    return sorted((path for path in folder.glob("model_epoch_*") if _NAME.fullmatch(path.name)), key=_position)


def check_not_sharded(folder: Path) -> None:
    """Raise an error if the newest checkpoint is a folder of shards, as earlier versions wrote them.

    Raises:
        CheckpointError: It is.
    """
    found = list_checkpoints(folder)
    newest = _position(found[-1]) if found else (-1, -1)
    for path in folder.glob(_SHARDED):
        if _position(path.with_suffix(".pth")) > newest:
            raise sharded(path)


def set_aside(path: Path, ending: str) -> Path:
    """Rename a checkpoint so that no run resumes from it; return its new path."""
    aside = path.with_name(path.name + ending)
    with suppress(FileNotFoundError):  # another process of the run has renamed it already
        path.replace(aside)
    return aside


def _position(path: Path) -> tuple[int, int]:
    """Return the epoch and the step in a checkpoint's name."""
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1]), int(found[2])


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write, which then takes the place of ``path`` in one move."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _explaining(path):
            temporary.unlink(missing_ok=True)  # a killed run left it
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # a file system that has turned read-only
            temporary.unlink(missing_ok=True)


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Report why a checkpoint could not be written, and what is left."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        left = list_checkpoints(path.parent)
        kept = f" {left[-1].name} is intact: the same command resumes from it." if left else ""
        raise RunError(
            f"The checkpoint {path.name} could not be written ({_reason(error)}).",
            f"Free space in {path.parent}, or lower train.keep_checkpoints.{kept}",
        ) from error


def _reason(error: BaseException) -> str:
    """Return the operating system's text for a failure, which torch hides in another text."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).partition("\n")[0] or type(error).__name__


def _link(link: Path, target: Path) -> None:
    with _replacing(link) as temporary:
        try:
            temporary.symlink_to(target.name)
        except OSError:  # a file system without links
            shutil.copyfile(target, temporary)
