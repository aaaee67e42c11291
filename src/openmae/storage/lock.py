"""One run at a time in a results folder: a file lock on a disk, an object with a heartbeat in a store.

The operating system releases a file lock when its holder dies. A store does not, so the holder of a lock object
rewrites it every ``BEAT`` seconds. Another run takes the object over once it has not changed for ``STALE`` seconds, or
at once if its holder ran on this machine and is dead. In stores with conditional writes (S3, Google Cloud Storage), one
of two runs that start together wins. In others both may start, and the one whose object was replaced ends at its next
heartbeat.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from openmae.errors import DataError, RunError, UserError, blaming
from openmae.machine import boot_id, identify, is_running
from openmae.storage import flock, layout
from openmae.storage.atomic import disk_error, make_folder, parse_object
from openmae.storage.filesystem import ask, error_code, is_missing, open_filesystem
from openmae.storage.urls import join, redact, scheme_of

BEAT = 15.0  # seconds between two heartbeats
STALE = 60.0  # seconds without a heartbeat after which a lock may be taken over
GRACE = 15.0  # seconds to wait for the children of a killed process to end: they inherit its file lock
_LOOK = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of a file system without locks
_REFUSED = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409", "404")

log = logging.getLogger("openmae")


class FolderLock:
    """A lock on an existing local results folder, held while entered; ``key`` is its config key, for messages."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.key = key
        self._held = False
        self._descriptor: int | None = None  # None also on a file system without locks

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            UserError: another process holds it.
            RunError: it cannot be written.
        """
        self._descriptor, self._held = _acquire(self.folder, self.key), True
        with suppress(OSError):  # on a full disk the folder is locked all the same, but the holder is not recorded
            (self.folder / layout.LOCK_HOLDER).write_text(json.dumps(_this_process()), encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        if self._held:
            self._release(self.folder)

    def move_aside(self, aside: Path) -> None:
        """Rename the folder (of a link, its target) to ``aside``, and lock a new, empty folder in its place.

        The lock is held until the folder has its new name, so no other run can begin in it meanwhile.

        Raises:
            UserError: the folder cannot be renamed; nothing was changed. Or another run has just begun in its place.
        """
        folder = self.folder.resolve()
        try:
            os.rename(folder, aside)
        except OSError as error:
            raise UserError(
                f"{self.key}: {folder} cannot be renamed to {aside.name} ({error.strerror}).",
                "Move it elsewhere, or set another results_dir.",
            ) from error
        self._release(aside)
        make_folder(folder, self.key)
        self.__enter__()

    def _release(self, folder: Path) -> None:
        for name in (layout.LOCK_HOLDER, layout.LOCK):
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor, self._held = None, False


def _acquire(folder: Path, key: str) -> int | None:
    """Return the descriptor that holds the lock; None, with a warning, on a file system without locks."""
    deadline = time.monotonic() + GRACE
    while True:
        try:
            descriptor = flock.acquire(folder / layout.LOCK, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise disk_error(error, folder / layout.LOCK, key) from error
            log.warning("%s is on a file system without locks: do not start two runs in it.", folder)
            return None
        if descriptor is not None:
            return descriptor
        holder: dict[str, Any] = {}
        with suppress(OSError):
            holder = parse_object((folder / layout.LOCK_HOLDER).read_bytes())
        if (holder and not _is_dead(holder)) or time.monotonic() > deadline:
            with blaming(key):
                raise _taken(holder, str(folder), key)
        time.sleep(_LOOK)


class StoreLock:
    """A lock on a results folder in a store, held while entered.

    Args:
        url: URL of the folder.
        key: its config key, for messages.
        on_lost: called with an error, from the heartbeat thread, when another run has taken the folder over.
    """

    def __init__(self, url: str, key: str, on_lost: Callable[[RunError], None]) -> None:
        self.url = url
        self.key = key
        self._on_lost = on_lost
        with blaming(key):
            self._filesystem: Any = open_filesystem(url)
        self._path = self._filesystem._strip_protocol(join(url, layout.LOCK_HOLDER))
        self._is_s3 = self._conditional = scheme_of(url) == "s3"
        self._me = {**_this_process(), "token": uuid.uuid4().hex, "beat": 0}
        self._version = ""  # of the object; empty if there is none
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="openmae-lock", daemon=True)

    def __enter__(self) -> None:
        """Take the lock.

        Raises:
            UserError: another run holds it.
            DataError: the store fails.
        """
        with blaming(self.key):
            self._take()
        self._thread.start()

    def _take(self) -> None:
        seen, since = b"", time.monotonic()
        while not self._write(""):
            found = self._read()
            if found is None:
                continue
            content, version = found
            holder = parse_object(content)
            here = holder.get("machine") == self._me["machine"]
            stale = content == seen and time.monotonic() - since > STALE
            if (here and _is_dead(holder)) or stale:
                if self._write(version):
                    log.warning(
                        "%s was locked by %s, which has ended or stopped responding; the lock was taken over.",
                        redact(self.url),
                        _describe(holder),
                    )
                    return
            elif here or (seen and content != seen):
                raise _taken(holder, redact(self.url), self.key)
            if not seen:
                log.info(
                    "%s is locked by %s: waiting up to %g s for a heartbeat.",
                    *(redact(self.url), _describe(holder), STALE),
                )
            if content != seen:
                seen, since = content, time.monotonic()
            time.sleep(1.0)

    def __exit__(self, *_: object) -> None:
        """Release the lock; if that fails, the next run takes it over."""
        self._end.set()
        self._thread.join(timeout=BEAT)
        try:
            if self._holds():
                ask(self.url, self._filesystem._rm_file(self._path))
        except DataError as error:
            log.warning("The lock in the store could not be removed: %s", error.problem)

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            with suppress(DataError):  # the store does not respond: try again at the next heartbeat
                self._me["beat"] += 1
                if (self._conditional or self._holds()) and self._write(self._version):
                    continue
                found = self._read()
                if found is not None:
                    taken = _taken(parse_object(found[0]), redact(self.url), self.key)
                    problem = f"{self.key}: {taken.problem} It has taken the folder over from this run."
                    self._on_lost(RunError(problem, taken.fix))
                    return
                self._version = ""  # the object was deleted

    def _holds(self) -> bool:
        """Return whether the object is this run's; if so, store its version."""
        found = self._read()
        if found is None or parse_object(found[0]).get("token") != self._me["token"]:
            return False
        self._version = found[1]
        return True

    def _read(self) -> tuple[bytes, str] | None:
        try:
            return ask(self.url, self._get())
        except DataError as error:
            if is_missing(error):
                return None
            raise

    def _write(self, version: str) -> bool:
        """Replace the object of this version (empty: create it), and return whether this run holds the lock.

        The object is read back: a retried request is refused although its first attempt succeeded.
        """
        if not self._conditional and not version and self._read() is not None:
            return self._holds()
        try:
            ask(self.url, self._put(version))
        except DataError as error:
            code = error_code(error)
            if code == "NotImplemented" and self._conditional:
                self._conditional = False  # a store with S3's interface but without conditional writes
                return self._write(version)
            if code not in _REFUSED and not isinstance(error.__cause__, FileExistsError):
                raise
        return self._holds()

    async def _get(self) -> tuple[bytes, str]:
        if not self._is_s3:
            return await self._filesystem._cat_file(self._path), "exists"
        bucket, key, _ = self._filesystem.split_path(self._path)
        reply = await self._filesystem._call_s3("get_object", Bucket=bucket, Key=key)
        return await reply["Body"].read(), reply["ETag"]

    async def _put(self, version: str) -> None:
        body = json.dumps(self._me).encode()
        if not self._is_s3:
            await self._filesystem._pipe_file(self._path, body, mode="overwrite" if version else "create")
            return
        bucket, key, _ = self._filesystem.split_path(self._path)
        condition = ({"IfMatch": version} if version else {"IfNoneMatch": "*"}) if self._conditional else {}
        await self._filesystem._call_s3("put_object", Bucket=bucket, Key=key, Body=body, **condition)


def _taken(holder: dict[str, Any], where: str, key: str) -> UserError:
    return UserError(
        f"another run is writing to {where}: {_describe(holder)}.",
        f"Wait until it ends, or set another {key}. Two runs in one folder would overwrite each other's files.",
    )


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    return f"process {holder.get('pid')} on {holder.get('host')}, started at {holder.get('since')}"


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        **(identify(os.getpid()) or {}),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _machine() -> str:
    """Return an identifier of the scope in which a pid is unique: a machine until it reboots, or a container on it."""
    parts = [socket.gethostname(), boot_id()]
    with suppress(OSError):  # macOS
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _is_dead(holder: dict[str, Any]) -> bool:
    """Return whether the holder is known to have ended; False for a holder on another machine."""
    pid = holder.get("pid")
    if holder.get("machine") != _machine() or not isinstance(pid, int):
        return False
    return not is_running(holder) if isinstance(holder.get("start"), int) else identify(pid) is None
