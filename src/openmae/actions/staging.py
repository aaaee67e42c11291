"""Local copies of remote inputs, and the upload of results to an object store: actions only work on local files."""

from __future__ import annotations

import _thread
import hashlib
import itertools
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from openmae.errors import CheckpointError, RunError, SpecError, blaming
from openmae.spec.actions import ROWS
from openmae.spec.describe import fields, file_use
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of
from openmae.storage import cache, layout
from openmae.storage.atomic import make_folder
from openmae.storage.download import fetch
from openmae.storage.encryption import is_encrypted, resolve_key
from openmae.storage.listing import exists
from openmae.storage.lock import GRACE, FolderLock, StoreLock
from openmae.storage.mirror import Mirror, pull
from openmae.storage.urls import is_remote, name_of, parent_of, redact

EXCLUDES_VARIABLE = "OPENMAE_UPLOAD_EXCLUDES"

log = logging.getLogger("openmae")


@dataclass
class Place:
    """The local files of an action.

    Attributes:
        spec: the spec with local paths instead of URLs; ``experiment.yaml`` has the URLs.
        folder: the folder for results.
        shown: the URL of the results, or their folder.
        lock: the lock on a local folder that this process writes to; the workers of a search hold none.
        lost: set if another run has taken over the folder in the store; the action then ends with this error.
    """

    spec: ExperimentSpec
    folder: Path
    shown: str
    lock: FolderLock | None = None
    lost: RunError | None = None
    _copies: list[tuple[str, str, Path]] = field(default_factory=list)
    _excludes: list[str] = field(default_factory=list)
    _mirrors: list[Mirror] = field(default_factory=list)
    _uploads: ExitStack = field(default_factory=ExitStack)

    @property
    def uploaded(self) -> list[str]:
        """The URLs of uploaded folders, except that of the results."""
        return [redact(url) for _, url, folder in self._copies if folder != self.folder]

    def add_copy(self, key: str, url: str, folder: Path, excludes: Collection[str] = ()) -> None:
        """Register a folder to upload; ``key`` is the option that names its URL, for errors."""
        self._copies.append((key, url, folder))
        self._excludes += excludes

    def begin_uploads(self) -> None:
        """Start the uploads. ``status.json`` must exist: its upload shows that the store can be written.

        Raises:
            DataError: the store cannot be written.
        """
        variable = os.environ.get(EXCLUDES_VARIABLE, "").split(",")
        excludes = [*self._excludes, *(item.strip() for item in variable if item.strip())]
        for key, url, folder in self._copies:
            cache.mark_pending(folder.parent, redact(url))
            with blaming(key):
                self._mirrors.append(self._uploads.enter_context(Mirror(folder, url, excludes)))

    def finish_uploads(self) -> None:
        """Upload everything except the final status, which depends on the outcome of this upload.

        Raises:
            RunError: a file could not be uploaded.
        """
        for mirror in self._mirrors:
            mirror.finish()

    def lose(self, error: RunError) -> None:
        """Stop the uploads and interrupt the main thread. Called from another thread."""
        self.lost = error
        for mirror in self._mirrors:
            mirror.abandon()
        log.error("%s", error)
        _thread.interrupt_main()

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """Finish the uploads at exit, and allow the cache to delete what was uploaded."""
        try:
            with self._uploads:
                yield
        finally:
            for mirror in self._mirrors:
                if mirror.complete:
                    cache.mark_complete(mirror.local.parent, redact(mirror.url))


@contextmanager
def local_place(spec: ExperimentSpec, action: str, *, leads: bool = True) -> Iterator[Place]:
    """Download the files that an action reads, and open a local folder for results, with what a resumed run needs.

    If not ``leads``, another process of the run writes the results. If they go to a store, this process then gets a
    temporary folder with the checkpoint to resume from, and uploads nothing.

    Raises:
        UserError: a file cannot be downloaded, or the results cannot be written.
    """
    with ExitStack() as stack:
        stack.enter_context(cache.holding())
        paths = {key: str(value_of(spec, key)) for key in fields() if file_use(key)}
        remote = {key: value for key, value in paths.items() if is_remote(value)}
        place = _open_results(spec, action, stack, leads=leads)
        row = ROWS[action]
        local = {file.key: _downloaded(file.key, remote[file.key]) for file in row.inputs if file.key in remote}
        if row.output and (key := row.output.key) in remote:
            local[key] = _path_to_write(spec, key, remote[key], action, place, stack)
        if remote:
            shown = {key: redact(value) for key, value in remote.items()}
            place.spec = spec.replaced(local).standing_for(shown)
        with place.uploading():
            yield place


def _open_results(spec: ExperimentSpec, action: str, stack: ExitStack, *, leads: bool) -> Place:
    target = spec.results_folder(action)
    key_of = f"{action}.results_dir" if value_of(spec, f"{action}.results_dir") else "results_dir"
    if not is_remote(target):
        place = Place(spec, make_folder(Path(target)), target)
        if leads and action != "automl":  # the workers of a search share its folder
            place.lock = stack.enter_context(FolderLock(place.folder, key_of))
        return place
    if leads:
        place = Place(spec, Path(), redact(target))
        if action != "automl":
            stack.enter_context(StoreLock(target, key_of, place.lose))
        place.folder = _staging_folder(target, stack, GRACE)
        # the job records of a search are valid on this machine only, and contain signed URLs
        place.add_copy("results_dir", target, place.folder, ("jobs/*", "probe/*") if action == "automl" else ())
    else:
        place = Place(spec, Path(stack.enter_context(TemporaryDirectory())), redact(target))
    if action == "train":
        _download_run(spec, place.folder, leads=leads)
    elif leads:
        with blaming("results_dir"):  # all of a search: the study, and the checkpoints that its trials resume
            pull(target, place.folder, lambda names: [n for n in names if action == "automl" or n == layout.STATUS])
    return place


def _staging_folder(url: str, stack: ExitStack, patience: float = 0.0) -> Path:
    entry = cache.root() / cache.RESULTS / f"{name_of(url)}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    make_folder(entry.parent)
    return make_folder(stack.enter_context(cache.workspace(entry, redact(url), patience)) / name_of(url))


def _download_run(spec: ExperimentSpec, folder: Path, *, leads: bool) -> None:
    """Download the newest checkpoint of a training run, then older ones until one is readable, and other files.

    If not ``leads``, the other files are only those that show that nothing is left to train.
    """
    from openmae.checkpoints.folder import list_checkpoints
    from openmae.checkpoints.resume import NotFiniteError, look_for_checkpoint

    key = resolve_key(spec.encryption_key)
    available: list[str] = []
    for count in itertools.count(1):

        def wanted(names: Collection[str], count: int = count) -> Collection[str]:
            numbered = layout.sort_checkpoints(names)
            best = [layout.BEST] if layout.BEST in names and numbered else []  # tried last
            available[:] = best + numbered
            final = (layout.BACKBONE, layout.REPORT)
            others = [name for name in names if (not layout.holds_weights(name) if leads else name in final)]
            return [*others, *available[-count:]]

        with blaming("results_dir"):
            pull(spec.results_folder("train"), folder, wanted)
        if spec.train.resume_training_checkpoint_path or count >= len(available):  # no older one is needed, or left
            return
        try:
            found, refused = look_for_checkpoint(folder, key)
        except CheckpointError:  # encrypted, but there is no key
            return
        # a wrong key looks like damage: do not download every checkpoint because of it
        damaged = any(not isinstance(error, NotFiniteError) for error in refused.values())
        if found or (count > 1 and damaged and is_encrypted(list_checkpoints(folder)[-1])):
            return


def _downloaded(key: str, url: str) -> str:
    suffix = os.path.splitext(name_of(url))[1].lower()
    with blaming(key):
        path = fetch(url, layout.COMPANIONS.get(suffix, ()))
    log.info("%s: using %s, a copy of %s.", key, path, redact(url))
    return str(path)


def _path_to_write(spec: ExperimentSpec, key: str, url: str, action: str, place: Place, stack: ExitStack) -> str:
    """Return the local path of a file for a store: in the results folder if its URL is below that of the results."""
    with blaming(key):
        there = exists(url)
    if there and not value_of(spec, f"{action}.overwrite"):
        raise SpecError(f"{key}: {redact(url)} already exists.", f"Pass {action}.overwrite=true to replace it.")
    results = spec.results_folder(action)
    base = results.rstrip("/") + "/"
    if is_remote(results) and url.startswith(base):
        return str(place.folder / url.removeprefix(base))
    folder = _staging_folder(parent_of(url), stack)
    place.add_copy(key, parent_of(url), folder)
    return str(folder / name_of(url))
