"""Actions work on local files: what a spec names in a store is brought here, what goes there is written here first."""

from __future__ import annotations

import _thread
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from openmae.errors import CheckpointError, RunError, SpecError, blaming
from openmae.spec.describe import fields
from openmae.spec.option import EXPAND_USER
from openmae.spec.rules import READS, value_of
from openmae.spec.schema import ExperimentSpec
from openmae.storage import cache, layout
from openmae.storage.atomic import make_folder
from openmae.storage.encryption import Key, resolve_key
from openmae.storage.lock import GRACE, StoreLock, locked_folder
from openmae.storage.urls import is_remote, name_of, parent_of, redact

if TYPE_CHECKING:
    from openmae.storage.mirror import Mirror  # with it comes fsspec, which most runs do not need

EXCLUDES_VARIABLE = "OPENMAE_UPLOAD_EXCLUDES"

_WRITES = {"export": "export.onnx_file", "gen_trt_engine": "gen_trt_engine.trt_engine"}
_AT_THE_END = (layout.BACKBONE, layout.REPORT)  # of a training

_Bring = Callable[[str, Path, Callable[[Collection[str]], list[str]]], None]

log = logging.getLogger("openmae")


class Loss:
    """Another run may take a folder in a store over: the action ends then, and uploads nothing more.

    Attributes:
        error: that says so; None while this run holds the folder.
        mirrors: those that upload.
    """

    def __init__(self) -> None:
        self.error: RunError | None = None
        self.mirrors: list[Mirror] = []

    def note(self, error: RunError) -> None:
        """Stop the uploads, and interrupt the main thread; called by another one."""
        self.error = error
        for mirror in self.mirrors:
            mirror.abandon()
        log.error("%s", error)
        _thread.interrupt_main()


class Place:
    """Where an action reads and writes.

    Attributes:
        spec: with local paths in place of the URLs of files; written down, it says what was typed.
        folder: of the results.
        shown: the results' URL, or their folder.
        loss: of the folder in a store, to another run.
    """

    def __init__(
        self,
        spec: ExperimentSpec,
        folder: Path,
        shown: str,
        uploads: ExitStack,
        stays: tuple[str, ...] = (),
        loss: Loss | None = None,
    ) -> None:
        self.spec = spec
        self.folder = folder
        self.shown = shown
        self._uploads = uploads
        self._stays = stays
        self._copies: list[tuple[str, str, Path]] = []
        self.loss = loss or Loss()

    @property
    def uploaded(self) -> list[str]:
        """The URLs of other folders than the results'."""
        return [redact(url) for _, url, folder in self._copies if folder != self.folder]

    def add_copy(self, key: str, url: str, folder: Path) -> None:
        """Have a folder uploaded, because ``key`` says so."""
        self._copies.append((key, url, folder))

    def begin_uploads(self) -> None:
        """Upload from now on; the folder has a status by then, which shows whether the destination can be written.

        Raises:
            DataError: it cannot.
        """
        if not self._copies:
            return
        from openmae.storage.mirror import Mirror

        excludes = list(self._stays)
        excludes += [item.strip() for item in os.environ.get(EXCLUDES_VARIABLE, "").split(",") if item.strip()]
        for key, url, folder in self._copies:
            cache.mark_pending(folder.parent, redact(url))
            with blaming(key):
                self.loss.mirrors.append(self._uploads.enter_context(Mirror(folder, url, excludes)))

    def finish_uploads(self) -> None:
        """Upload all but the status, which is to say how that went.

        Raises:
            RunError: something could not be uploaded.
        """
        for mirror in self.loss.mirrors:
            mirror.finish()

    def end(self) -> None:
        """What is uploaded need not be kept."""
        for mirror in self.loss.mirrors:
            if mirror.complete:
                cache.mark_complete(mirror.local.parent, redact(mirror.url))


@contextmanager
def local_place(spec: ExperimentSpec, action: str, *, leads: bool = True) -> Iterator[Place]:
    """Fetch the files that ``action`` reads, and give a local folder for its results, with what a resumed run needs.

    Args:
        leads: False: another process of the run writes the results. This one gets a folder that is nobody else's where
            they go to a store, with the checkpoint to resume from, and uploads nothing.

    Raises:
        UserError: a file cannot be had, or the results cannot be written.
    """
    with ExitStack() as stack:
        stack.enter_context(cache.holding())
        target = spec.results_folder(action)
        key_of = f"{action}.results_dir" if getattr(spec, action).results_dir else "results_dir"
        paths = {key: str(value_of(spec, key)) for key, field in fields().items() if EXPAND_USER in field.metadata}
        remote = {key: value for key, value in paths.items() if is_remote(value)}
        uploads = ExitStack()
        secret = resolve_key(spec.encryption_key) if is_remote(target) and action == "train" else None
        bring = partial(_bring_readable, key=secret, one=bool(spec.train.resume_training_checkpoint_path))
        if is_remote(target) and not leads:
            place = Place(spec, Path(stack.enter_context(TemporaryDirectory())), redact(target), uploads)
            with blaming("results_dir"):
                _bring_newest(target, place.folder, action, bring)
        elif is_remote(target):
            # job records of a search are of this machine, and hold URLs with their signatures
            stays = ("jobs/*", "probe/*") if action == "automl" else ()
            loss = Loss()
            if action != "automl":  # whose workers share a folder
                stack.enter_context(StoreLock(target, key_of, loss.note))
            place = Place(spec, _staged(target, stack, GRACE), redact(target), uploads, stays, loss)
            place.add_copy("results_dir", target, place.folder)
            with blaming("results_dir"):
                _bring_back(target, place.folder, action, bring)
        else:
            place = Place(spec, make_folder(Path(target)), target, uploads)
            if leads and action != "automl":
                stack.enter_context(locked_folder(place.folder, key_of))
        local = {key: _fetched(key, remote[key]) for key in READS[action] if key in remote}
        if (key := _WRITES.get(action, "")) in remote:
            local[key] = _to_write(spec, key, remote[key], target, place, stack)
        if remote:
            shown = {key: redact(value) for key, value in remote.items()}
            place.spec = spec.replaced(local).standing_for(shown)
        try:
            with uploads:
                yield place
        finally:
            place.end()


def _staged(url: str, stack: ExitStack, patience: float = 0.0) -> Path:
    entry = cache.root() / cache.RESULTS / f"{name_of(url)}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    make_folder(entry.parent)
    return make_folder(stack.enter_context(cache.workspace(entry, redact(url), patience)) / name_of(url))


def _bring_back(url: str, folder: Path, action: str, bring: _Bring) -> None:
    from openmae.storage.mirror import pull

    if action == "train":
        bring(url, folder, lambda names: [name for name in names if not layout.holds_weights(name)])
    elif action == "automl":  # the study, and the checkpoints that its trainings go on from
        pull(url, folder, lambda names: names)
    else:
        pull(url, folder, lambda names: [layout.STATUS] if layout.STATUS in names else [])


def _bring_newest(url: str, folder: Path, action: str, bring: _Bring) -> None:
    """The checkpoint that a training resumes from, and what says that there is nothing left to train."""
    if action == "train":
        bring(
            url,
            folder,
            lambda names: [name for name in _AT_THE_END if name in names and layout.sort_checkpoints(names)],
        )


def _bring_readable(
    url: str, folder: Path, besides: Callable[[Collection[str]], list[str]], *, key: Key | None, one: bool
) -> None:
    """Bring the newest checkpoint and, while none can be read, an older one: resuming takes the newest that can be.

    Args:
        besides: names that are needed as well.
        key: opens checkpoints.
        one: the newest alone, as the user has named what to resume from.
    """
    from openmae.checkpoints.folder import list_checkpoints
    from openmae.storage.encryption import is_encrypted
    from openmae.storage.mirror import pull
    from openmae.training.resume import NotFiniteError, look_for_checkpoint

    there: list[str] = []

    def wanted(names: Collection[str], count: int) -> Collection[str]:
        best = [layout.BEST] if layout.BEST in names else []  # the last resort, where no numbered one can be used
        there[:] = best + layout.sort_checkpoints(names) if layout.sort_checkpoints(names) else []
        return [*besides(names), *there[-count:]]

    for count in itertools.count(1):
        pull(url, folder, partial(wanted, count=count))
        if one or count >= len(there):
            return
        try:
            found, refused = look_for_checkpoint(folder, key)
        except CheckpointError:  # encrypted, and there is no key
            return
        # a wrong key looks like damage: it is not to fetch all of them
        damaged = any(not isinstance(error, NotFiniteError) for error in refused.values())
        if found or (count > 1 and damaged and is_encrypted(list_checkpoints(folder)[-1])):
            return


def _fetched(key: str, url: str) -> str:
    from openmae.storage.download import fetch

    suffix = os.path.splitext(name_of(url))[1].lower()
    with blaming(key):
        path = fetch(url, layout.COMPANIONS.get(suffix, ()))
    log.info("%s: using %s, a copy of %s.", key, path, redact(url))
    return str(path)


def _to_write(spec: ExperimentSpec, key: str, url: str, results: str, place: Place, stack: ExitStack) -> str:
    """Where a file of a store is written first: among the results if it belongs to them."""
    from openmae.storage.listing import exists

    with blaming(key):
        there = exists(url)
    if there and key == "export.onnx_file" and not spec.export.overwrite:
        raise SpecError(
            f"{key}: {redact(url)} exists, and is not replaced unasked.",
            "Give another name, or set export.overwrite=true.",
        )
    base = results.rstrip("/") + "/"
    if is_remote(results) and url.startswith(base):
        return str(place.folder / url.removeprefix(base))
    folder = _staged(parent_of(url), stack)
    place.add_copy(key, parent_of(url), folder)
    return str(folder / name_of(url))
