"""Encrypted files: plain content is never written to disk, and truncated or modified files are rejected.

The format, all numbers big-endian. A header of 52 bytes:

    magic          16 bytes   89 "OpenMAE-crypt" 0D 0A
    version         1         1
    log2 n, r, p    1, 1, 1   of scrypt: written as 15, 8, 1; a reader accepts log2 n up to 18, r = 8 and p = 1
    salt           16         of scrypt, random
    file salt      16         random, different for every file

then the content in one or more chunks of 1 MiB (the last may be shorter), each encrypted with AES-256-GCM, which adds
16 bytes, with the complete header as associated data. Keys and nonces:

    master            = scrypt(key, salt, n, r, p), 32 bytes
    file key, prefix  = HKDF-SHA256(master, salt=file salt, info="OpenMAE file"), 32 and 7 bytes
    nonce of chunk i  = prefix, i (4 bytes), 1 for the last chunk and 0 for the others

This is the STREAM construction (Hoang, Reyhanitabar, Rogaway and Vizar 2015): decryption fails if chunks were changed,
removed, duplicated, reordered, appended or taken from another file. scrypt takes 0.1 s and 32 MiB, so a process derives
a master once and uses it for all files that it writes. That is safe, since the random file salt gives every file its
own AES key: no two files share a key and a nonce. scrypt slows down guessing, but does not make a weak key strong.

The name, size and date of a file are not hidden.
"""

from __future__ import annotations

import io
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from openmae.errors import CheckpointError, SpecError
from openmae.inputs import open_regular, read_file_or_pipe
from openmae.spec.option import KEY_IN_ENVIRONMENT, KEY_IN_FILE
from openmae.storage import memory_folder

_MAGIC = b"\x89OpenMAE-crypt\r\n"
_VERSION = 1
_LOG_N, _R, _P = 15, 8, 1
_LARGEST_LOG_N = 18  # limits the memory that a header can make a reader use to 256 MiB
_SALT = 16
_HEADER = len(_MAGIC) + 4 + 2 * _SALT
_CHUNK, _TAG = 2**20, 16
_DAMAGED_BITS = 8  # of the magic; a file with more damage is not recognised as encrypted
_LARGEST_KEY = 2**16  # bytes of a file that holds a key

log = logging.getLogger("openmae")


class Key:
    """A secret key, never shown in messages or by ``repr``; it can be pickled.

    Args:
        secret: one or more bytes.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._salt = os.urandom(_SALT)  # for files that are written
        self._masters: dict[bytes, bytes] = {}
        self._plain: set[Path] = set()

    def __repr__(self) -> str:
        return "Key(***)"

    def new_header(self) -> bytes:
        """Return the header of a new file."""
        return _MAGIC + bytes((_VERSION, _LOG_N, _R, _P)) + self._salt + os.urandom(_SALT)

    def open_header(self, header: bytes) -> tuple[AESGCM, bytes]:
        """Return the cipher of a file and the prefix of its nonces.

        Raises:
            ValueError: the header has another version, or parameters that a reader does not accept.
        """
        version, log_n, r, p = header[len(_MAGIC) : -2 * _SALT]
        if version != _VERSION or not 0 < log_n <= _LARGEST_LOG_N or (r, p) != (_R, _P):
            raise ValueError("its header is of another version")
        derived_from, file_salt = header[len(_MAGIC) : -_SALT], header[-_SALT:]
        if derived_from not in self._masters:
            scrypt = Scrypt(salt=derived_from[-_SALT:], length=32, n=2**log_n, r=r, p=p)
            self._masters[derived_from] = scrypt.derive(self._secret)
        output = HKDF(SHA256(), 32 + 7, file_salt, b"OpenMAE file").derive(self._masters[derived_from])
        return AESGCM(output[:32]), output[32:]

    def note_plain(self, path: Path) -> None:
        """Warn, once per file, that it is not encrypted."""
        if path not in self._plain:
            self._plain.add(path)
            log.warning("%s is not encrypted: encryption_key is not used to read it.", path)


def resolve_key(text: str | Key | None) -> Key | None:
    """Return the key that ``encryption_key`` stands for; None if it is empty.

    Args:
        text: ``env:NAME`` for an environment variable, ``file:PATH`` for a file (line breaks at its end are ignored),
            or the key itself.

    Raises:
        SpecError: the variable or the file is missing or empty.
    """
    if not text or isinstance(text, Key):
        return text or None
    if text.startswith(KEY_IN_ENVIRONMENT):
        name = text.removeprefix(KEY_IN_ENVIRONMENT)
        secret = os.fsencode(os.environ.get(name, ""))
        if not secret:
            state = "is empty" if name in os.environ else "is not set"
            raise SpecError(f"encryption_key: the environment variable {name!r} {state}.", "Put the key into it.")
        return Key(secret)
    if text.startswith(KEY_IN_FILE):
        return Key(_read_secret(Path(os.path.expanduser(text.removeprefix(KEY_IN_FILE)))))
    return Key(os.fsencode(text))


def _read_secret(path: Path) -> bytes:
    try:
        secret = read_file_or_pipe(path, _LARGEST_KEY + 1)
    except OSError as error:
        raise SpecError(
            f"encryption_key: the file {str(path)!r} cannot be read ({error.strerror}).", "Put the key into it."
        ) from error
    if len(secret) > _LARGEST_KEY:
        raise SpecError(
            f"encryption_key: the file {str(path)!r} is not a key: it is larger than 64 KiB.",
            "Name the file of the key.",
        )
    secret = secret.rstrip(b"\r\n")
    if not secret:
        raise SpecError(f"encryption_key: the file {str(path)!r} is empty.", "Put the key into it.")
    return secret


def is_encrypted(path: Path) -> bool:
    """Return whether a file begins like an encrypted one, even with up to 8 damaged bits."""
    with open_regular(path) as file:
        start = file.read(len(_MAGIC))
    if len(start) < len(_MAGIC):
        return bool(start) and _MAGIC.startswith(start)
    return (int.from_bytes(start) ^ int.from_bytes(_MAGIC)).bit_count() <= _DAMAGED_BITS


@contextmanager
def created(path: Path, key: Key | None) -> Iterator[BinaryIO]:
    """Yield a new file to write sequentially, encrypted if there is a key; it is flushed to disk at the end.

    If the block raises, an encrypted file is left without its last chunk and cannot be decrypted.
    """
    with path.open("wb") as file:
        if key is None:
            yield file
        else:
            sealing = _Sealing(file, key)
            yield sealing  # type: ignore[misc]  # torch, numpy and json need no more of a BinaryIO than RawIOBase has
            sealing.finish()
        file.flush()
        os.fsync(file.fileno())


def unlocked(path: Path, key: Key | None) -> BinaryIO | None:
    """Open an encrypted file as a seekable stream that decrypts as it is read; return None for a plain file.

    The complete file is authenticated before this returns, and each chunk again when it is read; one chunk at a time is
    in memory. If there is a key and the file is plain, a warning is logged.

    Raises:
        CheckpointError: the file is encrypted and the key is missing or wrong, or the file is damaged.
    """
    if not is_encrypted(path):
        if key is not None:
            key.note_plain(path)
        return None
    if key is None:
        raise CheckpointError(
            f"{path} is encrypted, but encryption_key is not set.",
            "Set encryption_key to the key that it was written with: env:NAME, file:PATH, or the key itself.",
        )
    return io.BufferedReader(_Opening(path, key))


def read_bytes(path: str | Path, key: Key | None) -> bytes:
    """Return the content of a file, decrypted if it is encrypted.

    Raises:
        CheckpointError: see ``unlocked``.
    """
    path = Path(path)
    file = unlocked(path, key)
    if file is None:
        return path.read_bytes()
    with file:
        return file.read()


@contextmanager
def temporaries_in_memory(key: Key | None) -> Iterator[None]:
    """If there is a key, make ``tempfile`` use a folder in memory, for libraries that need temporary files.

    Raises:
        SpecError: this system has no file system in memory.
    """
    if key is None:
        yield
        return
    if not os.access(memory_folder.MEMORY, os.W_OK):
        raise SpecError(
            f"encryption_key: int8 needs temporary files in memory, and there is no {memory_folder.MEMORY}.",
            "Use fp16, leave encryption_key out, or run on Linux.",
        )
    with memory_folder.memory_folder() as folder:
        before, tempfile.tempdir = tempfile.tempdir, str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


class _Sealing(io.RawIOBase):
    """A writer that encrypts; it buffers a chunk until it knows whether the chunk is the last."""

    def __init__(self, file: BinaryIO, key: Key) -> None:
        self._file, self._header = file, key.new_header()
        self._cipher, self._prefix = key.open_header(self._header)
        self._number, self._pending = 0, bytearray()
        file.write(self._header)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            self._pending += view[start : start + _CHUNK]
            if len(self._pending) > _CHUNK:
                self._seal(last=False)
        return len(view)

    def finish(self) -> None:
        self._seal(last=True)

    def _seal(self, *, last: bool) -> None:
        chunk = bytes(self._pending[:_CHUNK])
        self._file.write(self._cipher.encrypt(_nonce(self._prefix, self._number, last), chunk, self._header))
        del self._pending[:_CHUNK]
        self._number += 1


class _Opening(io.RawIOBase):
    def __init__(self, path: Path, key: Key) -> None:
        self._path, self._place, self._held = path, 0, (-1, b"")
        self._file = open_regular(path)
        try:
            sealed = os.fstat(self._file.fileno()).st_size - _HEADER
            self._chunks = math.ceil(sealed / (_CHUNK + _TAG))
            self._size = sealed - self._chunks * _TAG
            self._header = self._file.read(_HEADER)
            if self._chunks < 1:
                raise self._refusal()
            try:
                self._cipher, self._prefix = key.open_header(self._header)
            except ValueError as error:
                raise self._refusal() from error
            for number in range(self._chunks):
                self._open(number)
        except BaseException:
            self._file.close()
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence])
        return self._place

    def readinto(self, buffer: Any) -> int:
        number, start = divmod(self._place, _CHUNK)
        if number >= self._chunks:
            return 0
        part = self._open(number)[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._place += len(part)
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _open(self, number: int) -> bytes:
        if self._held[0] != number:
            self._file.seek(_HEADER + number * (_CHUNK + _TAG))
            sealed = self._file.read(_CHUNK + _TAG)
            nonce = _nonce(self._prefix, number, number == self._chunks - 1)
            try:
                self._held = (number, self._cipher.decrypt(nonce, sealed, self._header))
            except (InvalidTag, ValueError) as error:  # ValueError: shorter than a tag
                raise self._refusal() from error
        return self._held[1]

    def _refusal(self) -> CheckpointError:
        return CheckpointError(
            f"{self._path} cannot be decrypted: encryption_key is not the key that it was written with, or the file is "
            "damaged or truncated (these cannot be distinguished).",
            "Check the key (spaces and line breaks in it count), or copy the file again.",
        )


def _nonce(prefix: bytes, number: int, last: bool) -> bytes:
    return prefix + number.to_bytes(4) + bytes((last,))
