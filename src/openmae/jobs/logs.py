"""Read and follow a job's log in blocks, so that a log of any size takes only a few megabytes of memory."""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from openmae.errors import SpecError
from openmae.storage.atomic import disk_error

_BLOCK = 1 << 20  # bytes to read at once; a longer line is split
_POLL = 0.1


def read_log(path: Path, tail: int | None = None) -> Iterator[str]:
    """Yield the last ``tail`` lines of a log (None: all) in blocks; nothing if there is no log.

    Raises:
        SpecError: ``tail`` is negative.
        RunError: The log cannot be read.
    """
    _check(tail)
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    try:
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(_find_tail(file, tail))
            while data := file.read(_BLOCK):
                yield decode(data)
            yield decode(b"", True)
    except OSError as error:
        raise disk_error(error, path, verb="read") from error


def follow_log(path: Path, tail: int | None, ended: Callable[[], bool]) -> Iterator[str]:
    """Yield the lines of a log, without line ends, as they are written, until ``ended`` returns True.

    Begin with the last ``tail`` of the existing lines (None: all). The log need not exist yet.

    Raises:
        SpecError: ``tail`` is negative.
    """
    _check(tail)
    start, rest = None, b""
    while True:
        over = ended()  # check before reading, so that no line is missed
        if path.is_file():
            with path.open("rb") as file:
                file.seek(_find_tail(file, tail) if start is None else start)
                while data := file.read(_BLOCK):
                    *lines, rest = (rest + data).split(b"\n")
                    yield from (line.decode("utf-8", errors="replace") for line in lines)
                    if len(rest) > _BLOCK:
                        yield rest.decode("utf-8", errors="replace")
                        rest = b""
                start = file.tell()
        if over:
            if rest:
                yield rest.decode("utf-8", errors="replace")
            return
        time.sleep(_POLL)


def _check(tail: int | None) -> None:
    if tail is not None and tail < 0:
        raise SpecError(f"tail: must be 0 or more lines, got {tail}.", "Leave it out for the complete log.")


def _find_tail(file: BinaryIO, tail: int | None) -> int:
    """Return the position of the last ``tail`` lines, searching from the end."""
    if tail is None:
        return 0
    end = place = file.seek(0, os.SEEK_END)
    missing = tail
    while place > 0 and tail:
        size = min(_BLOCK, place)
        place -= size
        file.seek(place)
        block = file.read(size)
        cut = len(block)
        if place + cut == end and block.endswith(b"\n"):
            cut -= 1  # the final line end does not begin a new line
        while (cut := block.rfind(b"\n", 0, cut)) >= 0:
            missing -= 1
            if not missing:
                return place + cut + 1
    return 0 if tail else end
