"""The checkpoint files of a training run: names, rotation, the best one, the link to the newest.

The names are public: ``model_epoch_EEE_step_SSSSS.pth``, ``<arch>_latest.pth`` (a link to the newest) and
``model_best.pth``. A file gets such a name only when it is complete; ``format.py`` describes its content.
"""

from __future__ import annotations

import logging
import os
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
from openmae.storage import layout
from openmae.storage.atomic import fault_of_disk, replacing
from openmae.storage.encryption import Key

_STOP_SECONDS = 5.0  # how long a run that must stop at once waits for a write in progress

log = logging.getLogger("openmae")


class CheckpointFolder:
    """The checkpoints of one run, written one at a time by a background thread while training continues.

    A context manager, which waits on exit for the write in progress.

    Args:
        arch: architecture, part of the name of the link to the newest checkpoint.
        keep: number of newest checkpoints to keep, in addition to the best one.
        key: encrypts the checkpoints.
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
            # a write that is not waited for leaves only a temporary file
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
        """Copy a payload and start writing it as the checkpoint of ``epoch`` and ``step``; return its path.

        The payload may change afterwards. When the checkpoint is written, the link is updated. With ``best``,
        ``model_best.pth`` is written first: if the run is killed in between, it is never older than the best metric in
        the newest checkpoint. With ``rotate``, the oldest checkpoints are deleted; not after a skipped step, when the
        weights may be worse than those of older checkpoints.

        Raises:
            RunError: The previous checkpoint could not be written. Existing files are unchanged.
        """
        path = self.folder / layout.checkpoint_name(epoch, step)
        self._start(payload, path, best, rotate)
        return path

    def save_best(self, payload: Mapping[str, Any]) -> None:
        """Copy a payload and start writing it as ``model_best.pth`` only; see :meth:`save`."""
        self._start(payload, self.folder / layout.BEST, best=False, rotate=False)

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            RunError: A checkpoint could not be written. Existing files are unchanged.
        """
        self._writer.wait()

    def resume_from(self, epoch: int, step: int) -> None:
        """Set aside the checkpoints after the one that a run resumes from, so that the next start ignores them."""
        newer = [path for path in list_checkpoints(self.folder) if _position(path) > (epoch, step)]
        for path in newer:
            set_aside(path, layout.SUPERSEDED)
        if newer:
            log.warning(
                "The run resumes from epoch %d, step %d: newer checkpoints in %s are set aside as *%s (%s).",
                epoch, step, self.folder, layout.SUPERSEDED, ", ".join(path.name for path in newer),
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
                set_aside(path, layout.DIVERGED)
        best = self.folder / layout.BEST
        with suppress(CheckpointError):  # missing, or not written by training
            if read_training_state(best, self.key, lazily=True)["progress"]["step"] >= step:
                set_aside(best, layout.DIVERGED)
        self._repair_link()
        left = list_checkpoints(self.folder) or [path for path in (best,) if path.is_file()]
        return left[-1].name if left else ""

    def _repair_link(self) -> None:
        """Point the link at the newest checkpoint if its target was set aside."""
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
        if path.name == layout.BEST:
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
                log.warning("The old checkpoint %s cannot be deleted (%s).", old, error.strerror)

    def _name_best(self, written: Path) -> None:
        with _replacing(self.folder / layout.BEST) as temporary:
            try:
                os.link(written, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(written, temporary)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the numbered checkpoints in a folder, oldest first by (epoch, step)."""
    return [folder / name for name in layout.sort_checkpoints(os.listdir(folder))] if folder.is_dir() else []


def check_not_sharded(folder: Path) -> None:
    """Check that the newest checkpoint is not sharded.

    Raises:
        CheckpointError: It is a folder of shards, which earlier versions wrote.
    """
    found = list_checkpoints(folder)
    newest = _position(found[-1]) if found else (-1, -1)
    for path in folder.glob(layout.SHARDED):
        if _position(path.with_suffix(".pth")) > newest:
            raise sharded(path)


def set_aside(path: Path, ending: str) -> Path:
    """Rename a checkpoint so that no run resumes from it; return its new path."""
    aside = path.with_name(path.name + ending)
    with suppress(FileNotFoundError):  # another process of the run has renamed it already
        path.replace(aside)
    return aside


def _position(path: Path) -> tuple[int, int]:
    position = layout.checkpoint_progress(path.name)
    assert position is not None
    return position


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that then replaces ``path`` atomically.

    Raises:
        RunError: The checkpoint could not be written; the message has the reason, and names one that is intact.
    """
    try:
        with replacing(path, single_writer=True) as temporary:
            yield temporary
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        fault = fault_of_disk(error) or error  # torch wraps the error of the disk
        reason = getattr(fault, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        left = list_checkpoints(path.parent)
        kept = f" {left[-1].name} is intact: the same command resumes from it." if left else ""
        raise RunError(
            f"The checkpoint {path.name} could not be written ({reason}).",
            f"Free space in {path.parent}, or lower train.keep_checkpoints.{kept}",
        ) from error


def _link(link: Path, target: Path) -> None:
    with _replacing(link) as temporary:
        try:
            temporary.symlink_to(target.name)
        except OSError:  # a file system without links
            shutil.copyfile(target, temporary)
