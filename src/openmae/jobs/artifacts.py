"""List the files of a local or remote results folder, and choose the model that a child job uses."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from openmae.errors import CheckpointError, DataError
from openmae.storage import layout
from openmae.storage.printable import listed
from openmae.storage.urls import is_remote, join, redact

Kind = Literal[
    "checkpoint", "onnx", "engine", "weights", "spec", "status", "metrics", "report", "image", "predictions", "events",
    "other",
]  # fmt: skip
_NAMES: dict[str, Kind] = {
    layout.STATUS: "status",
    layout.SPEC: "spec",
    layout.CORRUPT_LIST: "report",
    layout.PREDICTIONS: "predictions",
}
_SUFFIXES: dict[str, Kind] = {
    ".pth": "checkpoint",
    ".onnx": "onnx",
    ".engine": "engine",
    ".safetensors": "weights",
    ".csv": "metrics",
    ".html": "report",
    ".png": "image",
    ".parquet": "predictions",
    ".npy": "predictions",
}
_NUMBERED = re.compile(r".*epoch_(\d+)_step_(\d+)\.\w+")  # also TAO's names
_SHOWN = 12  # files listed in an error


@dataclass(frozen=True)
class Artifact:
    """A file of a results folder.

    Attributes:
        path: Local path or URL.
        kind: Kind of content, inferred from the name.
        size: In bytes.
        modified: In seconds since 1970; 0 if unknown.
        epoch, step: Numbers in the file name, or None.
        link: True for a symbolic link.
    """

    path: str
    kind: Kind
    size: int
    modified: float
    epoch: int | None = None
    step: int | None = None
    link: bool = False

    @property
    def name(self) -> str:
        """File name without the folder."""
        return self.path.rpartition("/")[2]

    @property
    def best(self) -> bool:
        """True for the best checkpoint of a training run."""
        return self.name == layout.BEST

    @property
    def latest(self) -> bool:
        """True for the link to the newest checkpoint, or for its copy in a store without links."""
        return self.kind == "checkpoint" and layout.is_latest(self.name)


def artifact(path: str, size: int = 0, modified: float = 0.0, link: bool = False) -> Artifact:
    """Classify a file by its name."""
    name = path.rpartition("/")[2]
    kind = _NAMES.get(name) or _SUFFIXES.get(os.path.splitext(name)[1].lower(), "other")
    if name.startswith("events.out.tfevents"):
        kind = "events"
    numbers = _NUMBERED.fullmatch(name)
    epoch, step = (int(numbers[1]), int(numbers[2])) if numbers else (None, None)
    return Artifact(path, kind, size, modified, epoch, step, link)


def below(folder: str, name: str) -> str:
    """Return the path or URL of ``name`` in a folder."""
    return join(folder, name) if is_remote(folder) else os.path.join(folder, name)


def list_folder(folder: str) -> list[Artifact]:
    """Return all files below a local or remote folder, sorted by path; none if it does not exist.

    Hidden files are skipped, since they may be incomplete.

    Raises:
        DataError: The store cannot be reached or read.
    """
    found = _list_remote(folder) if is_remote(folder) else _list_local(Path(folder))
    return sorted(found, key=lambda item: item.path)


def list_outputs(folder: str, outputs: Iterable[str]) -> list[Artifact]:
    """Return all files below a job's folder, followed by the existing files of ``outputs`` in other folders.

    Raises:
        DataError: A store cannot be reached or read.
    """
    found = list_folder(folder)
    known = {item.path for item in found}
    for path in outputs:
        if path not in known and (item := find_file(path)) is not None:
            found.append(item)
    return found


def find_file(path: str) -> Artifact | None:
    """Return a local or remote file, or None if it does not exist.

    Raises:
        DataError: The store cannot be reached or read.
    """
    if not is_remote(path):
        return _local_file(Path(path)) if os.path.isfile(path) else None
    facts = _ask(path, "_info")
    return None if facts is None else artifact(path, int(facts.get("size") or 0), _time_of(facts))


def read_text(path: str) -> str | None:
    """Return the text of a small file, or None if it does not exist.

    Raises:
        DataError: The store cannot be reached or read.
    """
    if not is_remote(path):
        file = Path(path)
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    data = _ask(path, "_cat_file")
    return None if data is None else bytes(data).decode("utf-8", errors="replace")


def remove(items: Iterable[Artifact]) -> None:
    """Delete files.

    Raises:
        DataError: A file cannot be deleted; the files before it have been deleted.
    """
    for item in items:
        if is_remote(item.path):
            from openmae.storage.filesystem import ask, open_filesystem

            ask(item.path, open_filesystem(item.path)._rm_file(item.path))
            continue
        try:
            Path(item.path).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{item.path} cannot be deleted: {error.strerror}.", "Check its permissions.") from error


def newest_checkpoint(items: Iterable[Artifact]) -> Artifact | None:
    """Return the checkpoint from which training resumes: the one with the highest epoch and step in its name."""
    numbered = [item for item in items if item.kind == "checkpoint" and item.epoch is not None]
    return max(numbered, key=_order, default=None)


def choose_model(
    items: Sequence[Artifact], kinds: Collection[str], known: Collection[str], where: str
) -> tuple[Artifact, str]:
    """Return the model in a parent's results for a key, and the reason for the choice.

    An output file named in the parent's spec comes first, then the best model, then the newest by epoch and step.

    Args:
        items: The parent's results.
        kinds: Kinds of files that the key accepts.
        known: Output files named in the parent's spec.
        where: Key and parent, for errors.

    Raises:
        CheckpointError: There is no such model; the message lists the files that exist.
    """
    fitting = [item for item in items if item.kind in kinds]
    for item in fitting:
        if item.path in known:
            return item, "the output file of the parent"
    best = [item for item in fitting if item.best]
    if best:  # the best model of a search is in a folder above those of its trials
        return min(best, key=lambda item: (item.path.count("/"), -item.modified)), "the parent's best"
    numbered = [item for item in fitting if item.epoch is not None]
    if numbered:
        newest = max(numbered, key=_order)
        return newest, f"the parent's newest: epoch {newest.epoch}, step {newest.step}; it has no best"
    latest = [item for item in fitting if item.latest or item.kind != "checkpoint"]
    if latest:
        return max(latest, key=lambda item: (item.modified, item.path)), "the parent's newest file of this kind"
    deleted = [
        read_text(item.path) for item in items if item.name == layout.CHECKPOINTS_DELETED and "checkpoint" in kinds
    ]
    if deleted and deleted[0]:
        raise CheckpointError(
            f"parent_job_id: {where} has no checkpoint. {deleted[0].strip()}",
            "Use the search itself as the parent, which has the best model, or another of its trials, or search again "
            "with automl.keep_all=true.",
        )
    names = " or ".join(sorted({"checkpoint": "checkpoint (.pth)"}.get(kind, f".{kind} file") for kind in kinds))
    fix = "Wait for the parent to finish, or look at its log with `mae jobs logs`."
    if fitting:
        fix = f"Set the key in the spec, for example to {redact(fitting[0].path)}."
    raise CheckpointError(f"parent_job_id: {where} has no {names}. {_describe(items)}", fix)


def _describe(items: Sequence[Artifact]) -> str:
    if not items:
        return "It is empty."
    return f"It has {listed([f'{item.name} ({item.kind})' for item in items], _SHOWN)}."


def _order(item: Artifact) -> tuple[int, int, float, str]:
    return item.epoch or 0, item.step or 0, item.modified, item.path


def _list_local(folder: Path) -> Iterable[Artifact]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield _local_file(path)


def _local_file(path: Path) -> Artifact:
    stat = path.stat()
    return artifact(str(path), stat.st_size, stat.st_mtime, path.is_symlink())


def _list_remote(folder: str) -> list[Artifact]:
    from openmae.storage.filesystem import ask, open_filesystem

    found: dict[str, dict[str, Any]] = ask(folder, open_filesystem(folder)._find(folder, detail=True))
    scheme = folder.partition("://")[0]
    return [
        artifact(f"{scheme}://{path.partition('://')[2] or path}", int(facts.get("size") or 0), _time_of(facts))
        for path, facts in found.items()
        if not path.rpartition("/")[2].startswith(".")
    ]


def _ask(path: str, method: str) -> Any:
    """Return what a method of the remote file system answers about a file, or None if the file does not exist."""
    from openmae.storage.filesystem import ask, open_filesystem  # fsspec is slow to import

    try:
        return ask(path, getattr(open_filesystem(path), method)(path))
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _time_of(facts: dict[str, Any]) -> float:
    value = facts.get("LastModified") or facts.get("mtime") or facts.get("created")
    return value.timestamp() if isinstance(value, datetime) else 0.0
