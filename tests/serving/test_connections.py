"""Clients that send too little, too slowly or too much, over real connections with the limits of ``mae serve``."""

from __future__ import annotations

import io
import logging
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image

from openmae.serving import access_log, connections
from openmae.serving.access_log import LogLimit, limited_logs, log_loop_error
from openmae.serving.app import create_app
from openmae.serving.connections import descriptor_limits, limited
from openmae.serving.settings import Settings

Encode = Callable[..., bytes]
Listening = Callable[..., AbstractContextManager[str]]
HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
def limited_server(model: Any) -> Callable[..., AbstractContextManager[tuple[str, int]]]:
    """Return ``limited_server(settings, most)``, which starts a server with the protocol of ``mae serve``."""

    @contextmanager
    def listen(settings: Settings, most: int = 100) -> Iterator[tuple[str, int]]:
        config = uvicorn.Config(
            create_app(model, settings),
            http=limited(settings, most),
            ws="none",
            log_level="error",
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        listener = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            address = listener.getsockname()
            assert httpx.get(f"http://127.0.0.1:{address[1]}/health", timeout=20).status_code == 200
            yield address
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server did not stop"

    return listen


def _connect(address: tuple[str, int], data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(address, timeout=20)
    connection.sendall(data)
    return connection


def _read(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    with connection, connection.makefile("rb") as file:
        try:
            return file.read()
        except ConnectionResetError:
            return b""


def _health(address: tuple[str, int]) -> int:
    return httpx.get(f"http://127.0.0.1:{address[1]}/health", timeout=20).status_code


@pytest.mark.parametrize("sent", [b"", b"GET ", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: "])
def test_headers_that_do_not_arrive_end_the_connection(limited_server: Any, sent: bytes) -> None:
    with limited_server(Settings(header_seconds=0.3)) as address:
        answer = _read(_connect(address, sent))
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout")
    assert b"The headers did not arrive in time." in answer


def test_headers_that_trickle_in_end_the_connection(limited_server: Any) -> None:
    with limited_server(Settings(header_seconds=0.5)) as address, _connect(address, b"GET / HTTP/1.1\r\nX: ") as client:
        client.settimeout(0.05)
        for _ in range(400):
            try:
                client.sendall(b"a")
                if not client.recv(100):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            pytest.fail("each byte gave the headers more time")


def test_the_headers_of_the_next_request_have_the_same_limit(limited_server: Any) -> None:
    with limited_server(Settings(header_seconds=0.3)) as address:
        connection = _connect(address, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health HT")
        _read(connection)


def test_a_connection_is_reused_for_many_requests(limited_server: Any, encode: Encode) -> None:
    with limited_server(Settings()) as address, httpx.Client(base_url=f"http://127.0.0.1:{address[1]}") as client:
        for _ in range(5):
            assert client.post("/predict", files=[("images", ("a.png", encode()))]).status_code == 200


def test_a_slow_model_does_not_end_the_connection(limited_server: Any, model: Any, encode: Encode) -> None:
    model.gate.clear()
    image = encode()
    with limited_server(Settings(header_seconds=0.1)) as address:
        connection = _connect(address, HEAD % len(image) + image)
        idle = _connect(address)
        _read(idle)  # the time for headers is over
        model.gate.set()
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.close()


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\nX: ", HEAD % 9 + b"1"], ids=["headers", "bodies"])
def test_idle_connections_make_room_for_others(
    limited_server: Any, encode: Encode, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with limited_server(Settings(), most=5) as address:
        waiting = [_connect(address, sent) for _ in range(20)]
        for _ in range(3):
            assert _health(address) == 200
        answer = httpx.post(f"http://127.0.0.1:{address[1]}/predict", files=[("images", ("a.png", encode()))])
        assert answer.status_code == 200
        for connection in waiting:
            connection.close()
    assert "The limit of 5 connections is reached" in caplog.text


def test_a_request_in_progress_is_not_closed_for_others(limited_server: Any, model: Any, encode: Encode) -> None:
    model.gate.clear()
    image = encode()
    with limited_server(Settings(), most=2) as address:
        working = _connect(address, HEAD % len(image) + image)
        while not model.batches:
            pass
        waiting = [_connect(address, b"GET /") for _ in range(5)]
        assert _health(address) == 200
        model.gate.set()
        assert working.recv(4096).startswith(b"HTTP/1.1 200")
        for connection in (working, *waiting):
            connection.close()


def test_incomplete_bodies_do_not_block_other_clients(limited_server: Any, encode: Encode) -> None:
    with limited_server(Settings(max_requests=2)) as address:
        waiting = [_connect(address, HEAD % 100 + b"1") for _ in range(10)]
        answer = httpx.post(f"http://127.0.0.1:{address[1]}/predict", files=[("images", ("a.png", encode()))])
        assert answer.status_code == 200, answer.text
        for connection in waiting:
            connection.close()


def test_the_largest_incomplete_body_is_refused(
    limited_server: Any, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "max_held_bytes", 2_000_000)
    with limited_server(Settings(max_request_mb=1.5)) as address:
        large = _connect(address, HEAD % 1_500_000 + bytes(1_400_000))
        small = _connect(address, HEAD % 600_000 + bytes(400_000))
        small.sendall(bytes(199_999))
        other = _connect(address, HEAD % 600_000 + bytes(300_000))
        answer = large.recv(65536)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer.lower()
        while not answer.endswith(b"}"):
            answer += large.recv(65536)
        assert b"the requests in progress use all memory allowed for uploads. Try again in a second." in answer
        small.sendall(bytes(1))
        assert small.recv(4096).startswith(b"HTTP/1.1 422 "), "it had arrived, and is no image"
        for connection in (large, small, other):
            connection.close()
        answer = httpx.post(f"http://127.0.0.1:{address[1]}/predict", files=[("images", ("a.png", encode()))])
        assert answer.status_code == 200


def test_a_response_that_is_not_read_ends_the_connection(limited_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[object] = []
    original = connections.LimitedProtocol.pause_writing
    monkeypatch.setattr(
        connections.LimitedProtocol, "pause_writing", lambda self: paused.append(self) or original(self)
    )
    with limited_server(Settings(write_seconds=0.2)) as address, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(address)
        while not paused:  # pages that nobody reads
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        while not paused[0].transport.is_closing():  # type: ignore[attr-defined]
            pass
        assert _health(address) == 200


@pytest.mark.parametrize(
    ("soft", "most", "backlog"), [(1024, 704, 128), (256, 128, 32), (65536, 1000, 128), (64, 8, 8), (-1, 1000, 128)]
)
def test_connections_leave_file_descriptors_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, soft: int, most: int, backlog: int
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (soft, soft))
    assert descriptor_limits() == (most, backlog)


# ------------------------------------------------------------------------------------------------ work


def _bomb(width: int, height: int) -> bytes:
    """Return a PNG of one colour, without having its pixels in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = bytes(1 + (width + 7) // 8)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(row * height)) + chunk(b"IEND", b"")


def test_the_pixels_of_a_request_are_bounded_before_any_is_decoded(
    model: Any, encode: Encode, listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    load = Image.Image.load
    monkeypatch.setattr(
        "PIL.ImageFile.ImageFile.load", lambda self, *rest: decoded.append(self.size) or load(self, *rest)
    )
    with listening(model, Settings(max_pixels=1_000_000)) as address:
        bombs = [("images", (f"{number}.png", _bomb(1000, 900))) for number in range(5)]
        answer = httpx.post(f"{address}/predict", files=bombs)
        assert answer.status_code == 413
        assert answer.json() == {
            "error": "The images of a request may have 4,000,000 pixels together, got 4,500,000. "
            "Send them in several requests, or scale them down."
        }
        assert decoded == []
        assert httpx.get(f"{address}/metadata").json()["limits"]["max_request_pixels"] == 4_000_000
    with listening(model, Settings(max_pixels=1_000_000)) as address:
        monkeypatch.undo()
        assert httpx.post(f"{address}/predict", files=bombs[:4]).status_code == 200


def test_a_small_image_does_not_wait_for_large_ones(
    model: Any, encode: Encode, listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openmae.serving import app

    gate, begun, original = threading.Event(), threading.Semaphore(0), app.decode_upload

    def decode(upload: Any, *rest: Any) -> Any:
        if upload.name == "large":
            begun.release()
            assert gate.wait(20)
        return original(upload, *rest)

    monkeypatch.setattr(app, "decode_upload", decode)
    large = [("images", ("large", encode(size=(900, 900))))] * 4
    with listening(model, Settings(max_pixels=1_000_000)) as address, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(httpx.post, f"{address}/predict", files=large, timeout=30) for _ in range(6)]
        assert begun.acquire(timeout=20)
        small = httpx.post(f"{address}/predict", files=[("images", ("small", encode()))], timeout=20)
        assert small.status_code == 200
        gate.set()
        assert [answer.result().status_code for answer in answers] == [200] * 6


def test_the_last_places_are_for_small_requests(model: Any, encode: Encode, listening: Listening) -> None:
    model.gate.clear()
    many = [("images", ("a.png", encode()))] * 9
    with listening(model, Settings(max_requests=4)) as address, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(httpx.post, f"{address}/predict", files=many, timeout=30) for _ in range(3)]
        while httpx.get(f"{address}/health").json()["images_under_way"] < 27:
            pass
        assert httpx.post(f"{address}/predict", files=many, timeout=20).status_code == 503
        small = pool.submit(httpx.post, f"{address}/predict", files=many[:1], timeout=20)
        while httpx.get(f"{address}/health").json()["images_under_way"] < 28:
            pass
        model.gate.set()
        assert small.result().status_code == 200
        assert [answer.result().status_code for answer in answers] == [200] * 3


# ------------------------------------------------------------------------------------------------ logs


def test_records_that_clients_cause_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(access_log.time, "monotonic", lambda: now[0])
    stream, logger = io.StringIO(), logging.Logger("a test")
    logger.addHandler(logging.StreamHandler(stream))
    logger.addFilter(LogLimit())
    for number in range(1000):
        logger.warning("Invalid HTTP request %d received.", number)
    logger.warning("Something else.")
    assert len(stream.getvalue().splitlines()) == 11
    now[0] = 61.0
    logger.warning("Invalid HTTP request %d received.", 1000)
    last = stream.getvalue().splitlines()[-1]
    assert last == "Invalid HTTP request 1000 received. (990 more like this were not logged)"


def test_a_connection_that_cannot_be_accepted_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    error = OSError(24, "Too many open files")
    log_loop_error(None, {"message": "socket.accept() out of system resource", "exception": error})  # type: ignore[arg-type]
    assert caplog.messages == ["A connection could not be accepted (Too many open files)."]
    assert caplog.records[0].exc_info is None


def test_the_command_uses_the_limits(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    from openmae.serving import server

    monkeypatch.setattr(server, "descriptor_limits", lambda: (77, 33))
    config = server._configure(create_app(model), Settings(header_seconds=3))
    assert isinstance(config.http, type)
    assert issubclass(config.http, connections.LimitedProtocol)
    assert (config.http.most, config.http.settings.header_seconds, config.backlog, config.ws) == (77, 3, 33, "none")


def test_logs_are_limited_only_while_the_server_runs() -> None:
    def limits(name: str) -> int:
        return sum(isinstance(one, LogLimit) for one in logging.getLogger(name).filters)

    names = ("asyncio", "uvicorn.error", "openmae", "python_multipart")
    with limited_logs():
        assert [limits(name) for name in names] == [1] * 4
    assert [limits(name) for name in names] == [0] * 4
