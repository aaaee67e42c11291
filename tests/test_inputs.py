"""Only regular files are opened, and pipes where they make sense."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from openmae import inputs
from openmae.inputs import open_regular, read_file_or_pipe


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [(fifo, "a named pipe (FIFO)"), (device, "a device"), (bound_socket, "a socket")],
)
def test_only_regular_files_are_opened(tmp_path: Path, make: Callable[[Path], None], kind: str) -> None:
    make(tmp_path / "x.png")
    (tmp_path / "link.png").symlink_to("x.png")
    for name in ("x.png", "link.png"):
        with pytest.raises(OSError, match="not a regular file") as caught:
            open_regular(tmp_path / name)
        assert caught.value.strerror == f"it is {kind}, not a regular file"


def test_fifo_that_replaces_a_file_after_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo(tmp_path / "x.png")
    monkeypatch.setattr(inputs, "irregular", lambda path: None)
    with pytest.raises(OSError, match="named pipe"):
        open_regular(tmp_path / "x.png")


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to("a")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"
    assert read_file_or_pipe(tmp_path / "link", 100) == b"content"
    assert read_file_or_pipe(tmp_path / "a", 4) == b"cont"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


def test_a_pipe_with_a_writer_is_read_to_its_end() -> None:
    """As a shell's ``<(command)`` is."""
    reading, writing = os.pipe()
    content = b"x: 1\n" * 50_000  # more than a pipe holds
    writer = threading.Thread(target=lambda: (os.write(writing, content), os.close(writing)))
    writer.start()
    try:
        assert read_file_or_pipe(f"/dev/fd/{reading}", len(content) + 1) == content
    finally:
        writer.join()
        os.close(reading)


def test_waiting_for_a_pipe_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr(inputs, "_PATIENCE", 0)

    class WriteWhenTold(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            os.write(writing, b"late")
            os.close(writing)

    handler = WriteWhenTold()
    logging.getLogger("openmae").addHandler(handler)
    try:
        assert read_file_or_pipe(f"/dev/fd/{reading}", 100) == b"late"
    finally:
        logging.getLogger("openmae").removeHandler(handler)
        os.close(reading)
    assert f"Waiting for data from /dev/fd/{reading}, which is a pipe" in caplog.text


def test_a_pipe_without_a_writer(tmp_path: Path) -> None:
    fifo(tmp_path / "spec.yaml")
    with pytest.raises(OSError, match="it is a pipe without a writer"):
        read_file_or_pipe(tmp_path / "spec.yaml", 100)
    with pytest.raises(OSError, match="it is a device, not a regular file"):
        read_file_or_pipe("/dev/zero", 100)
