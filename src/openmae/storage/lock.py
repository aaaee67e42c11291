"""One run at a time in a results folder: a file lock on a disk, an object with a heartbeat in a store.

The system releases a file lock when its holder dies. A store does not, so the holder of an object rewrites it every
``BEAT`` seconds, and another run takes it over once it has not changed for ``STALE`` seconds, or at once where its
process ran on this machine and is dead. Stores with conditional writes (S3, Google Cloud Storage) let one of two runs
win that start together; in others both may begin, and the one whose object was replaced ends at its next heartbeat.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from openmae.errors import DataError, RunError, UserError, blaming
from openmae.storage import layout
from openmae.storage.atomic import disk_error
from openmae.storage.urls import join, redact, scheme_of

BEAT = 15.0  # seconds between two heartbeats
STALE = 60.0  # seconds without one
GRACE = 15.0  # seconds in which the children of a killed process end, which have inherited its file lock
_LOOK = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system that has none
_REFUSED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")

log = logging.getLogger("openmae")


@contextmanager
def locked_folder(folder: Path, key: str) -> Iterator[None]:
    """Hold a local results folder.

    Args:
        folder: exists.
        key: names it in the spec, for messages.

    Raises:
        UserError: another process holds it.
        RunError: the lock cannot be written.
    """
    lock = None
    try:
        lock = _acquire(folder, key)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise disk_error(error, folder / layout.LOCK, key) from error
        log.warning("%s is on a file system without locks: do not start two runs in it.", folder)
    try:
        with suppress(OSError):  # a full disk: the lock holds, and does not tell whose it is
            (folder / layout.LOCK_HOLDER).write_text(json.dumps(_myself()), encoding="utf-8")
        yield
    finally:
        for name in (layout.LOCK_HOLDER, layout.LOCK):
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)
        if lock is not None:
            lock.release()


def _acquire(folder: Path, key: str) -> BaseFileLock:
    deadline = time.monotonic() + GRACE
    while True:
        lock = FileLock(folder / layout.LOCK, timeout=0)
        try:
            lock.acquire()
            if isinstance(lock, SoftFileLock):
                lock.release()
                raise NotImplementedError
        except Timeout:
            if isinstance(lock, SoftFileLock):  # no flock here: the marker of a killed run would block for ever
                raise NotImplementedError from None
            holder = _read_holder(folder / layout.LOCK_HOLDER)
            if (holder and not _is_dead(holder)) or time.monotonic() > deadline:
                with blaming(key):
                    raise _taken(holder, str(folder), key) from None
        else:
            if _is_current(folder):
                return lock
            lock.release()
        time.sleep(_LOOK)


def _is_current(folder: Path) -> bool:
    """Whether the file that this process has locked is still the one of that name: its last holder deletes it."""
    try:
        FileLock(folder / layout.LOCK, timeout=0).acquire().lock.release()
    except Timeout:
        return True
    return False


def _read_holder(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return {}


class StoreLock:
    """Holds a results folder in a store while entered.

    Args:
        url: of the folder.
        key: names it in the spec, for messages.
        on_lost: called by a thread, with an error, when another run has taken the folder over.
    """

    def __init__(self, url: str, key: str, on_lost: Callable[[RunError], None]) -> None:
        from openmae.storage.filesystem import open_filesystem  # with it comes fsspec, which most runs do not need

        self.url = url
        self.key = key
        self._on_lost = on_lost
        with blaming(key):
            self._filesystem: Any = open_filesystem(url)
        self._path = self._filesystem._strip_protocol(join(url, layout.LOCK_HOLDER))
        self._conditional = scheme_of(url) == "s3"
        self._me = {**_myself(), "token": uuid.uuid4().hex, "beat": 0}
        self._version = ""
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
            holder = _parsed(content)
            here = holder.get("machine") == self._me["machine"]
            quiet = content == seen and time.monotonic() - since > STALE
            if (here and _is_dead(holder)) or quiet:
                if self._write(version):
                    log.warning("%s was left locked by %s, which has ended.", redact(self.url), _described(holder))
                    break
            elif here or (seen and content != seen):
                raise _taken(holder, redact(self.url), self.key)
            if not seen:
                log.info("%s is locked by %s: waiting for up to %g s to see whether it is alive.",
                         redact(self.url), _described(holder), STALE)  # fmt: skip
            if content != seen:
                seen, since = content, time.monotonic()
            time.sleep(1.0)

    def __exit__(self, *_: object) -> None:
        """Release the lock; where that fails, the next run takes it over."""
        from openmae.storage.filesystem import ask

        self._end.set()
        self._thread.join(timeout=BEAT)
        try:
            if self._holds():
                ask(self.url, self._filesystem._rm_file(self._path))
        except DataError as error:
            log.warning("The lock in the store could not be removed: %s", error.problem)

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            with suppress(DataError):  # a store that does not answer: the next beat tries again
                self._me["beat"] += 1
                if (self._conditional or self._holds()) and self._write(self._version):
                    continue
                found = self._read()
                if found is not None:
                    taken = _taken(_parsed(found[0]), redact(self.url), self.key)
                    problem = f"{self.key}: {taken.problem} It has taken the folder over from this run."
                    self._on_lost(RunError(problem, taken.fix))
                    return
                self._version = ""  # somebody has deleted it

    def _holds(self) -> bool:
        found = self._read()
        return found is not None and _parsed(found[0]).get("token") == self._me["token"]

    def _read(self) -> tuple[bytes, str] | None:
        from openmae.storage.filesystem import ask, error_code

        try:
            return ask(self.url, self._get())
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError) or error_code(error) in ("NoSuchKey", "404"):
                return None
            raise

    def _write(self, version: str) -> bool:
        """Put the lock in the place of ``version``, or where there is none; False: there is another one."""
        from openmae.storage.filesystem import ask, error_code

        if not version and not self._conditional and self._read() is not None:
            return self._holds()
        try:
            self._version = ask(self.url, self._put(version))
            return self._conditional or self._holds()
        except DataError as error:
            code = error_code(error)
            if code == "NotImplemented" and self._conditional:
                self._conditional = False  # a store that copies S3, but not this
                return (bool(version) or self._read() is None) and self._write(version)
            if code in _REFUSED or code == "NoSuchKey" or isinstance(error.__cause__, FileExistsError):
                found = self._read()  # a request that was sent twice meets its own result
                if found is None or _parsed(found[0]).get("token") != self._me["token"]:
                    return False
                self._version = found[1]
                return True
            raise

    async def _get(self) -> tuple[bytes, str]:
        if scheme_of(self.url) != "s3":
            return await self._filesystem._cat_file(self._path), "there"
        bucket, key, _ = self._filesystem.split_path(self._path)
        reply = await self._filesystem._call_s3("get_object", Bucket=bucket, Key=key)
        return await reply["Body"].read(), reply["ETag"]

    async def _put(self, version: str) -> str:
        body = json.dumps(self._me).encode()
        if scheme_of(self.url) != "s3":
            await self._filesystem._pipe_file(self._path, body, mode="overwrite" if version else "create")
            return "there"
        bucket, key, _ = self._filesystem.split_path(self._path)
        condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
        put = self._filesystem._call_s3
        reply = await put("put_object", Bucket=bucket, Key=key, Body=body, **(condition if self._conditional else {}))
        return str(reply["ETag"])


def _taken(holder: dict[str, Any], where: str, key: str) -> UserError:
    return UserError(
        f"another run is writing to {where}: {_described(holder)}.",
        f"Wait until it ends, or set another {key}. Two runs in one folder would overwrite each other's files.",
    )


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    return f"process {holder.get('pid')} on {holder.get('host')}, started at {holder.get('since')}"


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _myself() -> dict[str, Any]:
    """What a lock says of its holder."""
    pid = os.getpid()
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "start": _start_of(pid), "since": since}


def _machine() -> str:
    """Where a process number means the same process: a machine between two boots, and a container in it."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # not Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether a holder on this machine has ended; False for one on another machine, which cannot be known."""
    pid = holder.get("pid")
    if holder.get("machine") != _machine() or not isinstance(pid, int):
        return False
    return _start_of(pid) != holder.get("start")


def _start_of(pid: int) -> str:
    """What tells a living process from others of its number; empty: there is none."""
    try:
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        return "" if state in "ZX" else fields[18]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        process = psutil.Process(pid)  # not Linux
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(round(1e6 * process.create_time()))
    except psutil.NoSuchProcess:
        return ""
    except psutil.Error:
        return "alive"
