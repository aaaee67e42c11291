"""Files that survive a crash: whole lines in, whole files out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from openmae.errors import UserError
from openmae.results.names import encodable

_TRIES = 20  # to delete what another process deletes too


def make_folder(folder: Path, key: str = "results_dir") -> Path:
    """Create ``folder`` with its parents and return it; where nothing can be written is a ``UserError``.

    Args:
        folder: to be written to.
        key: that named it, for the message.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
        reason = "permission denied"
    except OSError as error:
        writable, reason = False, (error.strerror or str(error)).lower()
    if not writable:
        raise UserError(
            f"{key}: cannot write to {str(folder)!r} ({reason}).",
            f"Set {key} to a place that you may write to.",
        )
    return folder


def delete_folder(folder: Path) -> None:
    """Delete a folder and what is in it; one that is gone, or that another process deletes too, is no error.

    Raises:
        OSError: it cannot be deleted.
    """
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
        if not folder.exists():
            return
    shutil.rmtree(folder)


def complete_lines(path: Path) -> list[str]:
    """Return the lines of ``path`` that were written to their end; a torn last line is left out."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].split("\n")[:-1]


def drop_torn_line(path: Path) -> None:
    """Cut a last line that a killed process left half-written, so that the next one starts clean."""
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its place when the block ends without an error.

    A reader sees the old file or the new one, never a part; a full disk leaves the old one. The file gets the
    permissions of any new file, whatever wrote it (safetensors would let nobody else read it).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        yield temporary
        temporary.chmod(permissions)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> Path:
    """Write ``text`` to ``path``, whole or not at all, and return the path; a name in it need not be UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(encodable(text), encoding="utf-8", newline="")
    return path
