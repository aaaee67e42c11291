"""An S3 server in its own process, a web server and a proxy with faults, found by environment variables."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

_VARIABLES = ("AWS_", "ACCESS_KEY", "SECRET_KEY", "S3_ENDPOINT", "CLOUD_REGION", "OPENMAE_")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass(frozen=True)
class Store:
    """The server, and a client that does not use s3fs."""

    endpoint: str
    client: Any

    def put(self, bucket: str, files: Mapping[str, bytes]) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda item: self.client.put_object(Bucket=bucket, Key=item[0], Body=item[1]), files.items()))

    def get(self, bucket: str, key: str) -> bytes:
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def names(self, bucket: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    port, log = free_port(), tmp_path_factory.mktemp("moto") / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=out, stderr=out
        )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, f"the S3 server did not start:\n{log.read_text()}"
                assert time.monotonic() < deadline, "the S3 server did not answer"
                time.sleep(0.05)
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test-secret",
            region_name="us-east-1",
            config=Config(max_pool_connections=8),
        )
        yield Store(endpoint, client)
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the user's credentials, and use an empty cache."""
    for name in [name for name in os.environ if name.startswith(_VARIABLES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store(_server: Store, clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Return the S3 server, with its address and credentials in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", _server.endpoint)
    # botocore waits up to a second before it repeats a request
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    return _server


@pytest.fixture
def bucket(store: Store, request: pytest.FixtureRequest) -> Iterator[str]:
    """Create an empty bucket and yield its name."""
    name = f"b{abs(hash(request.node.nodeid)):x}"
    store.client.create_bucket(Bucket=name)
    yield name
    keys = [{"Key": key} for key in store.names(name)]
    for start in range(0, len(keys), 1000):
        store.client.delete_objects(Bucket=name, Delete={"Objects": keys[start : start + 1000]})
    store.client.delete_bucket(Bucket=name)


class Web:
    """A web server in this process, with faults.

    Attributes:
        files: path -> content.
        ranges: it supports requests for a part of a file.
        tags: responses have an ETag.
        cuts: how many of the next responses break off half-way.
        delay: seconds before each response.
        status: if not 0, the status of all responses.
        requests: (path, Range header) of each request.
        on_request: called before each response with the number of requests so far.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = self.tags = True
        self.cuts = self.status = 0
        self.delay = 0.0
        self.requests: list[tuple[str, str]] = []
        self.on_request: Callable[[int], None] = lambda number: None
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """Ignore clients that have gone."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, span = request.path.partition("?")[0], request.headers.get("Range", "")
        self.requests.append((path, span))
        self.on_request(len(self.requests))
        time.sleep(self.delay)
        if self.status or (path not in self.files and not path.endswith("/")):
            self._send(request, self.status or 404, b"", {})
        elif path.endswith("/"):
            names = {name.removeprefix(path).partition("/") for name in self.files if name.startswith(path)}
            links = "".join(f'<a href="{first}{slash}">x</a>' for first, slash, _ in sorted(names))
            self._send(request, 200, f'<a href="../">up</a>{links}'.encode(), {"Content-Type": "text/html"})
        else:
            self._send_file(request, self.files[path], span)

    def _send_file(self, request: BaseHTTPRequestHandler, content: bytes, span: str) -> None:
        digest = hashlib.md5(content[: 1 << 20]).hexdigest()  # of a gigabyte, it would take a second for each part
        headers = {"ETag": f'"{digest}-{len(content)}"'} if self.tags else {}
        if not self.ranges or not span:
            return self._send(request, 200, content, headers)
        start, _, stop = span.removeprefix("bytes=").partition("-")
        first, last = int(start), min(int(stop or len(content)), len(content) - 1)
        if first >= len(content):
            return self._send(request, 416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._send(request, 206, content[first : last + 1], headers)

    def _send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        with contextlib.suppress(ConnectionError):  # the client has closed the connection
            request.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                request.send_header(name, value)
            request.end_headers()
            if self.cuts and len(body) > 1:
                self.cuts -= 1
                request.wfile.write(body[: len(body) // 2])
                request.wfile.flush()
                request.connection.shutdown(socket.SHUT_RDWR)
                request.close_connection = True
            else:
                request.wfile.write(body)


@pytest.fixture
def web(clean_environment: None) -> Iterator[Web]:
    server = Web()
    thread = threading.Thread(target=server.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.server.shutdown()
    server.server.server_close()
    thread.join()


class Wire:
    """A TCP proxy that breaks or stalls connections.

    Attributes:
        cuts: how many of the next connections are broken.
        after: bytes of responses that a connection passes on before it is broken.
        stalled: no response is passed on.
    """

    def __init__(self, port: int) -> None:
        self.cuts, self.after, self.stalled = 0, 0, False
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        carried = 0
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                carried += len(chunk)
                while answers and self.stalled:
                    time.sleep(0.05)
                if answers and self.cuts and carried > self.after:
                    self.cuts -= 1
                    break
                target.sendall(chunk)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self.stalled = False
        self._listener.close()


@pytest.fixture
def wire(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """Put a proxy between s3fs and the store."""
    proxy = Wire(int(store.endpoint.rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()
