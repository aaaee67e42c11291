"""Crash-safe files: written completely or not at all, and read up to the last complete line.

``replacing`` writes to a temporary file and renames it. ``disk_errors`` turns disk errors into ``RunError`` with a fix.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from openmae.errors import OpenMAEError, RunError, UserError, causes_of
from openmae.storage.printable import encodable

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_UNWRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_FAULTY = frozenset({errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO})
UNWRITTEN = FULL | _UNWRITABLE | _FAULTY  # errors of a disk, not of a program


def make_folder(folder: Path, key: str = "results_dir") -> Path:
    """Create ``folder`` with its parents and return it; ``key`` is its config key, for messages.

    Raises:
        UserError: it cannot be created, or the user may not write to it.
        RunError: its disk is full or faulty.
    """
    try:
        with disk_errors(folder, UNWRITTEN - _UNWRITABLE):
            folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    if reason:
        raise UserError(
            f"{key}: cannot write to {str(folder)!r} ({reason}).", f"Set {key} to a folder that you may write to."
        )
    return folder


def complete_lines(path: Path) -> list[str]:
    """Return the lines of a file; a last line without a line break is left out."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].split("\n")[:-1]


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one if the text is damaged, incomplete or other JSON."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line, left by a killed process, so that the file can be appended to."""
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


@contextmanager
def disk_errors(path: str | os.PathLike[str], errors: Collection[int] = UNWRITTEN, key: str = "") -> Iterator[None]:
    """Convert disk errors into a ``RunError`` that names the reason, the path and the fix.

    Args:
        path: file or folder that the block writes; if an error names another path, that one is reported.
        errors: error numbers to convert; others are raised unchanged.
        key: config key of the results folder, if the block writes results.

    Raises:
        RunError: the disk is full, read-only or faulty, or the user may not write there.
    """
    try:
        yield
    except OpenMAEError:
        raise
    except Exception as error:
        found = fault_of_disk(error)
        if found is None or found.errno not in errors:
            raise
        raise disk_error(found, path, key) from error


def fault_of_disk(error: Exception) -> OSError | None:
    """Return the disk error that an exception is or was caused by, whichever library raised it; else None."""
    for cause in causes_of(error):
        # without a file name, permission is denied for something else, such as sending a signal
        of_a_file = isinstance(cause, OSError) and (cause.errno not in _UNWRITABLE or cause.filename is not None)
        if isinstance(cause, OSError) and cause.errno in UNWRITTEN and of_a_file:
            return cause
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            if os.strerror(number) in str(cause):
                return OSError(number, os.strerror(number))
        if "No usable temporary directory" in str(cause):  # tempfile has tried all of its folders
            reason = "no temporary folder can be written; TMPDIR names one"
            return OSError(errno.ENOSPC, reason, tempfile.tempdir or "/tmp")
    return None


def disk_error(error: OSError, path: str | os.PathLike[str], key: str = "", verb: str = "written") -> RunError:
    """Return the ``RunError`` for a disk error; see ``disk_errors``."""
    named = next((name for name in (error.filename2, error.filename) if isinstance(name, str | bytes)), path)
    if os.path.dirname(os.fsdecode(named)) == os.path.dirname(os.fsdecode(path)):
        named = path  # instead of the temporary file next to it
    place = os.fsdecode(named).encode(errors="replace").decode()  # a name need not be valid UTF-8
    tail = f" could not be {verb} ({error.strerror or error})"
    problem = f"The results{tail}: {place}." if key else f"{place}{tail}."
    folder = _nearest(os.path.isdir, place)
    disk = _nearest(os.path.ismount, folder)
    elsewhere = f"set {key} to a folder on another disk" if key else "use a folder on another disk"
    if error.errno == errno.ENOSPC and _is_out_of_inodes(folder):
        fix = f"The file system at {disk} has no inodes left: delete files there, large or small, or {elsewhere}."
    elif error.errno == errno.EDQUOT:
        fix = f"Free space in {disk} or have your quota raised, or {elsewhere}."
    elif error.errno == errno.EFBIG:
        fix = "Raise the limit on the size of a file (`ulimit -f`), or use another file system."
    elif error.errno == errno.ENOSPC:
        fix = f"Free space{'' if key else f' in {disk}'}, or {elsewhere}."
    elif error.errno == errno.EROFS:
        fix = f"The file system at {disk} is read-only: mount it with write access, or {elsewhere}."
    elif error.errno in _UNWRITABLE:
        fix = f"Give your user write permission on {folder}, or use another folder."
    else:
        fix = f"Check the disk or the file server of {disk} (`dmesg` shows its errors), or {elsewhere}."
    return RunError(problem, fix)


def _nearest(holds: Callable[[str], bool], path: str) -> str:
    """Return the path or the nearest folder above it for which ``holds`` is true."""
    folder = os.path.abspath(path)
    while not holds(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return folder


def _is_out_of_inodes(folder: str) -> bool:
    try:
        facts = os.statvfs(folder)
    except OSError:
        return False
    return facts.f_files > 0 and facts.f_favail == 0 and facts.f_bavail > 0


@contextmanager
def replacing(
    path: Path, *, durable: bool = False, private: bool = False, single_writer: bool = False
) -> Iterator[Path]:
    """Yield a temporary path next to ``path``, and rename it to ``path`` if the block succeeds.

    Readers see the old file or the new one, never a partial one; if an error occurs, the old one remains. The block
    creates a file or a link at the temporary path.

    Args:
        path: file to create or replace; its folder is created if missing.
        durable: flush the file and its folder to disk, so that the file survives a power failure.
        private: only the user may read the file. Otherwise it gets the permissions of any new file, even if the block
            sets others, as safetensors does.
        single_writer: no other process writes ``path``, so the temporary file of a killed process can be reused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp" if single_writer else f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch(0o600 if private else 0o666)
        mode = temporary.stat().st_mode
        if not private:
            temporary.unlink()  # so that the block may create a link
        yield temporary
        if not temporary.is_symlink():
            temporary.chmod(mode)
            if durable:
                flush_to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            flush_to_disk(path.parent)
    finally:
        with suppress(OSError):  # a file system that has become read-only
            temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Flush the content of a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> Path:
    """Write ``text`` to ``path`` with ``replacing``, and return the path.

    Surrogates from file names that are not valid UTF-8 are escaped; see ``encodable``.
    """
    with replacing(path) as temporary:
        temporary.write_text(encodable(text), encoding="utf-8", newline="")
    return path


def write_durably(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that it survives a power failure and only the user may read it.

    Raises:
        RunError: the disk is full or faulty, or the user may not write there; the old file is unchanged.
    """
    with disk_errors(path), replacing(path, durable=True, private=True) as temporary:
        temporary.write_text(encodable(text), encoding="utf-8", newline="")
