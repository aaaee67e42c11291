"""Explain why a file is not a checkpoint: often a download failed, or it is another kind of file."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from openmae.checkpoints.unpickling import is_pickled_model
from openmae.errors import CheckpointError
from openmae.inputs import irregular, open_regular
from openmae.spec.actions import ROWS
from openmae.storage import layout

SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors")
_COPY_AGAIN = "Copy or download it again, or use another checkpoint."


def check_path(path: Path) -> None:
    """Raise an error if a path cannot be a checkpoint, without reading the file.

    Raises:
        CheckpointError: The path is missing, empty, a folder, not a regular file, or an ONNX file by its name.
    """
    if path.suffix.lower() == ".onnx":
        raise CheckpointError(f"{path} is an ONNX file, not a checkpoint.", "Give the .pth file it was exported from.")
    if not path.exists():
        raise CheckpointError(
            f"No checkpoint at {path}.", "Check the path; relative paths start at the working directory."
        )
    if path.is_dir():
        if path.suffix == ".shards":
            raise sharded(path)
        raise CheckpointError(f"{path} is a folder, not a checkpoint.", advice_for_folder(path))
    if kind := irregular(path):
        raise CheckpointError(f"{path} is {kind}, not a checkpoint.", "Name a regular file.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes).", "Copy it again, or use an earlier checkpoint.")


def advice_for_folder(path: Path) -> str:
    """Return which file to name instead of a folder: one in it, or one that an action has written below it."""
    for folder in (path, *(path / name for name, action in ROWS.items() if action.produces == "checkpoint")):
        if folder.is_dir() and (names := {file.name for file in folder.iterdir() if file.suffix in SUFFIXES}):
            inside = sorted(names, key=lambda name: (name != layout.BEST, name))
            return f"Name one of its files: {', '.join(str(folder / name) for name in inside[:3])}."
    return "Name a file; it holds no checkpoint."


def sharded(path: Path) -> CheckpointError:
    """Return the error for a sharded checkpoint: a folder that an earlier version wrote with fsdp."""
    return CheckpointError(
        f"{path} is a sharded checkpoint of an earlier version; only complete checkpoints are read now.",
        f"Convert it with that version (mae checkpoint consolidate {path}), or move it elsewhere to resume from an "
        "older checkpoint.",
    )


def holds_objects(path: Path, name: str) -> CheckpointError:
    """Return the error for a pickle with objects of the class ``name``."""
    if is_pickled_model(path):
        return CheckpointError(
            f"{path} holds a pickled model ({name}), not its state dict; it was not loaded, since such objects can run "
            "code.",
            "In the program that wrote it, use torch.save(model.state_dict(), path).",
        )
    return CheckpointError(
        f"{path} holds {name} in addition to weights; it was not loaded, since such objects can run code.",
        "If you trust its source, save only its state dict: torch.save({'state_dict': ...}, path).",
    )


def damaged(path: Path, kind: str, error: Exception) -> CheckpointError:
    """Return the error for a file that could not be read as a ``kind``; its first bytes show what it is instead."""
    start = first_bytes(path)
    if start.startswith(b"version https://git-lfs"):
        return CheckpointError(f"{path} is a Git LFS pointer, not the weights.", "Fetch them: git lfs pull.")
    text = start.decode("utf-8", errors="ignore").strip()
    if re.match(r"<(!doctype|html|\?xml|head|body)", text.lower()):
        return CheckpointError(
            f"{path} is a web page, not a checkpoint; it begins with the text {text.splitlines()[0][:24]!r}.",
            "Download the file itself: a login or error page was saved instead.",
        )
    if start.startswith(b"PK\x03\x04"):
        return _damaged_archive(path, error)
    if start.isascii() and (line := text.split("\n")[0][:24]).isprintable() and line:
        reason = f"is not a {kind}; it begins with the text {line!r}"
    else:
        # torch's own message recommends an unsafe read: "weights_only=False will likely succeed"
        said = type(error).__name__ if "weights_only" in str(error) else (str(error) or type(error).__name__)
        reason = f"is not a {kind}, or damaged ({said.splitlines()[0]})"
    return CheckpointError(f"{path} {reason}.", _COPY_AGAIN)


def _damaged_archive(path: Path, error: Exception) -> CheckpointError:
    try:
        with zipfile.ZipFile(path) as bundle:
            inside = {name.split("/", 1)[-1] for name in bundle.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        inside = {"data.pkl"}
    if "constants.pkl" in inside:
        return CheckpointError(
            f"{path} is a TorchScript archive, which holds a program, not a state dict.",
            "In the program that wrote it, use torch.save(torch.jit.load(path).state_dict(), other_path).",
        )
    if "data.pkl" not in inside:
        return CheckpointError(
            f"{path} is a ZIP archive that torch.save did not write.", "Unpack it, and name the checkpoint in it."
        )
    if isinstance(error, ValueError) and "records" in str(error):
        return CheckpointError(f"{path}: {error}, unlike any file of torch.save.", _COPY_AGAIN)
    return CheckpointError(f"{path} is truncated or damaged ({path.stat().st_size} bytes).", _COPY_AGAIN)


def first_bytes(path: Path) -> bytes:
    """Return the first 64 bytes of a file."""
    with open_regular(path) as file:
        return file.read(64)
