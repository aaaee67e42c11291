"""Latency and requests/s of ``mae serve`` over HTTP, compared with the time of the model."""

from __future__ import annotations

import http.client
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from openmae.engines.predictor import OnnxPredictor
from openmae.errors import RunError

from .deploy import build, export
from .measure import compare, load_average
from .report import Report

ARCH, SIDE = "convnextv2_atto", 224
CLIENTS = (1, 8)
_REQUESTS = 200  # of each client
_WARM_UP = 5  # requests of each client that are not counted
_SIZE = (500, 375)  # of the uploaded JPEG
_TIMEOUT = 60  # seconds for an answer


@dataclass(frozen=True)
class Load:
    """Response times that clients measured.

    Attributes:
        milliseconds: of each request, from its first byte until the answer was read.
        wall: seconds from the first request to the last answer.
    """

    milliseconds: tuple[float, ...]
    wall: float

    def percentile(self, percent: float) -> float:
        """In milliseconds."""
        return float(np.percentile(self.milliseconds, percent))

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.milliseconds) / self.wall


def run(quick: bool) -> Report:
    """Measure a server in a separate process, with clients in this one.

    Raises:
        RunError: the server does not start, or does not answer with predictions.
    """
    requests = 10 if quick else _REQUESTS
    image, load = photograph(), load_average()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model, card = build(ARCH, SIDE)
        export(model, card, path)
        own = _own_time(path, quick)
        with serving(path) as port:
            found = {clients: ask(port, image, clients, requests) for clients in CLIENTS}
    rows, data = [], []
    for clients, seen in found.items():
        p50, p99 = seen.percentile(50), seen.percentile(99)
        rows.append((str(clients), f"{p50:.1f}", f"{p99:.1f}", f"{seen.rate:.1f}", f"{own[clients]:.1f}"))
        data.append(
            {"clients": clients, "requests": len(seen.milliseconds), "p50_ms": p50, "p99_ms": p99}
            | {"requests_per_second": seen.rate, "model_ms_per_image": own[clients]}
        )
    notes = [
        f"{ARCH} at {SIDE} px in ONNX Runtime, one JPEG of {_SIZE[0]}x{_SIZE[1]} px ({len(image) // 1000} kB) per "
        f"request; {requests} requests a client over a connection that stays open, after {_WARM_UP} that do not count.",
        "'model only' is the time per image of the model in a batch as large as there are clients, normalizing "
        "included, without HTTP, decoding and resizing.",
        f"{torch.get_num_threads()} threads; clients and server share the cores. Load before the start: {load}; "
        "above 1 others were at work, and the figures are noisy.",
    ]
    columns = ("clients", "p50 [ms]", "p99 [ms]", "requests/s", "model only [ms/image]")
    values = {"arch": ARCH, "side": SIDE, "threads": torch.get_num_threads(), "load": load, "clients": data}
    return Report("mae serve on the CPU", columns, rows, values, notes)


def photograph() -> bytes:
    """Return a JPEG file with the detail of a photo."""
    rng = np.random.default_rng(0)
    width, height = _SIZE
    image = np.zeros((height, width, 3), np.float32)
    for cells in (4, 16, 64):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += np.asarray(noise.resize(_SIZE, Image.Resampling.BICUBIC), np.float32) / 3
    buffer = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _own_time(path: Path, quick: bool) -> dict[int, float]:
    """Milliseconds per image by batch size."""
    predictor = OnnxPredictor(path, torch.device("cpu"))
    times = {}
    for batch in CLIENTS:
        images = torch.zeros(batch, 3, SIDE, SIDE, dtype=torch.uint8)
        found = compare({"model": lambda images=images: predictor(images)}, items=batch, turns=2 if quick else 9)
        times[batch] = 1000 / found.timings["model"].rate
    return times


@contextmanager
def serving(path: Path) -> Iterator[int]:
    """``mae serve`` on a free port, which is given once it answers.

    Raises:
        RunError: it ended instead.
    """
    command = [sys.executable, "-m", "openmae", "serve", "-m", str(path), "--port", "0", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with tempfile.TemporaryFile("w+") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        assert server.stdout is not None
        try:
            line = server.stdout.readline()  # it says where it answers as soon as it does
            port = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if port is None:
                errors.seek(0)
                raise RunError(f"mae serve did not start: {line}{errors.read()}", "Try it by hand: mae serve --help.")
            yield int(port[1])
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            server.stdout.close()


def ask(port: int, image: bytes, clients: int, requests: int) -> Load:
    """Send ``requests`` images from each of ``clients`` threads, each over one connection.

    Raises:
        RunError: a response is not a prediction.
    """

    def client() -> tuple[float, float, list[float]]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
        try:
            for _ in range(_WARM_UP):
                _post(connection, image)
            start = time.perf_counter()
            times = [_post(connection, image) for _ in range(requests)]
            return start, time.perf_counter(), times
        finally:
            connection.close()

    with ThreadPoolExecutor(clients) as pool:
        seen = [future.result() for future in [pool.submit(client) for _ in range(clients)]]
    wall = max(end for _, end, _ in seen) - min(start for start, _, _ in seen)
    return Load(tuple(1000 * second for _, _, times in seen for second in times), wall)


def _post(connection: http.client.HTTPConnection, image: bytes) -> float:
    """Seconds until the answer."""
    start = time.perf_counter()
    connection.request("POST", "/predict", image, {"Content-Type": "image/jpeg"})
    answer = connection.getresponse()
    text = answer.read()
    seconds = time.perf_counter() - start
    if answer.status != 200:
        raise RunError(f"mae serve answered {answer.status}: {text.decode(errors='replace')}")
    return seconds
