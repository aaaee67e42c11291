"""The HTTP interface, over real connections if the connection matters, else through FastAPI's test client."""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor

from openmae.data.decode import ImageFile
from openmae.data.formats import FORMAT_TITLES
from openmae.data.transforms import EvalTransform
from openmae.serving.app import create_app
from openmae.serving.settings import Settings

Encode = Callable[..., bytes]
Listening = Callable[..., AbstractContextManager[str]]


@pytest.fixture
def client(model: Any) -> Iterator[TestClient]:
    with TestClient(create_app(model)) as client:
        yield client


def form(*files: tuple[str, bytes], field: str = "images") -> list[tuple[str, tuple[str, bytes]]]:
    return [(field, file) for file in files]


def png_header(width: int, height: int) -> bytes:
    """Return a PNG with this size in its header and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.002)


# ------------------------------------------------------------------------------------------ predictions


def test_a_form_with_many_images(live: str, model: Any, encode: Encode) -> None:
    files = form(("b.jpg", encode("blue", "JPEG")), ("c.webp", encode("lime", "WEBP")), ("d.bmp", encode("red", "BMP")))
    answer = httpx.post(f"{live}/predict", files=[*form(("a.png", encode("red")), field="file"), *files])
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert said["model"] == "vit_tiny_patch16"
    found = [(one["name"], one["class"]) for one in said["predictions"]]
    assert found == [("a.png", "red"), ("b.jpg", "<b>blue</b>"), ("c.webp", "green"), ("d.bmp", "red")]
    first = said["predictions"][0]
    expected = torch.tensor([255 / 20, 0.0, 0.0]).softmax(0).tolist()
    assert first["probability"] == pytest.approx(expected[0])
    assert first["top"][0] == {"class": "red", "probability": first["probability"]}
    assert [one["probability"] for one in first["top"]] == pytest.approx(expected), "best first"


def test_an_image_as_the_body(live: str, encode: Encode) -> None:
    answer = httpx.post(f"{live}/predict", content=encode("lime", "JPEG"), headers={"Content-Type": "image/jpeg"})
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["predictions"]
    assert (found["name"], found["class"]) == ("image", "green")


def test_embeddings(embedder: Any, encode: Encode) -> None:
    with TestClient(create_app(embedder)) as client:
        found = client.post("/predict", files=form(("a.png", encode((10, 20, 30))))).json()["predictions"]
    assert found == [{"name": "a.png", "embedding": [10, 20, 30]}]


def test_images_are_preprocessed_as_in_inference(
    model: Any, client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 255, (90, 70, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    pixels.save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(rng.integers(0, 65535, (40, 50), dtype=np.uint16)).save(tmp_path / "b.png")
    transform = EvalTransform(model.card.model.input_size, 3, model.card.interpolation)
    for name in ("a.jpg", "b.png"):
        with ImageFile(tmp_path / name) as picture:
            expected = transform(picture)
        assert client.post("/predict", files=form((name, (tmp_path / name).read_bytes()))).status_code == 200
        torch.testing.assert_close(
            model.batches[-1][0], expected, rtol=0, atol=0, msg=f"{name} was preprocessed differently"
        )


def test_one_bad_image_among_good_ones(client: TestClient, encode: Encode) -> None:
    files = form(("a.png", encode("red")), ("notes.txt", b"hello"), ("cut.png", encode()[:60]), ("empty.png", b""))
    answer = client.post("/predict", files=files)
    assert answer.status_code == 200, answer.text
    good, *bad = answer.json()["predictions"]
    assert good["class"] == "red"
    assert [sorted(one) for one in bad] == [["error", "name"]] * 3
    kinds = f"({', '.join(FORMAT_TITLES)})"
    assert bad[0]["error"] == (
        f"notes.txt: its content is not an image that can be read {kinds}. Send an image that opens in a viewer."
    )
    assert bad[1]["error"].startswith("cut.png cannot be decoded: ")
    assert bad[1]["error"].endswith(f" or {FORMAT_TITLES[-1]}.")
    assert bad[2]["error"].startswith("empty.png: the file is empty (0 bytes). Send an image")


def test_only_bad_images(client: TestClient) -> None:
    answer = client.post("/predict", files=form(("a.txt", b"1"), ("b.txt", b"2")))
    assert answer.status_code == 422
    said = answer.json()
    assert said["error"].startswith("None of the 2 images could be used; the first: a.txt: its content is not an image")
    assert [one["name"] for one in said["predictions"]] == ["a.txt", "b.txt"]
    single = client.post("/predict", content=b"text", headers={"Content-Type": "image/png"})
    assert single.status_code == 422
    assert single.json()["error"].startswith("image: its content is not an image")


def test_formats_that_run_programs_are_refused(client: TestClient) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    answer = client.post("/predict", files=form(("a.png", buffer.getvalue())))
    assert answer.status_code == 422
    assert "a.png: its content is a PostScript (EPS) file, not an image" in answer.json()["error"]


def test_an_output_that_is_not_finite(model: Any, client: TestClient, encode: Encode, monkeypatch: Any) -> None:
    def outputs(self: Any, images: Tensor) -> dict[str, Tensor]:
        return {"logits": torch.tensor([[1.0, 2.0, 3.0], [1.0, torch.nan, 0.0]])[: len(images)]}

    monkeypatch.setattr(type(model), "__call__", outputs)
    answer = client.post("/predict", files=form(("a.png", encode()), ("b.png", encode())))
    assert answer.status_code == 200, answer.text
    good, bad = answer.json()["predictions"]
    assert good["class"] == "<b>blue</b>"
    assert bad["error"] == "The model's output for b.png is not finite. Export the model in a higher precision."


# --------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data; boundary=x"])
def test_a_body_that_is_too_large(model: Any, encode: Encode, listening: Listening, announced: bool, kind: str) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
    body = (part if "x" in kind[-1] else b"") + bytes(3_000_000)
    content = body if announced else (body[start : start + 65536] for start in range(0, len(body), 65536))
    with listening(model, Settings(max_request_mb=1)) as address:
        answer = httpx.post(f"{address}/predict", content=content, headers={"Content-Type": kind})
        got = f"{len(body):,} bytes" if announced else "more"
        assert answer.status_code == 413, answer.text
        assert answer.json() == {
            "error": f"The request's body may have 1,000,000 bytes at most, got {got}. Send fewer or smaller images, "
            "or start the server with a larger --max-request-mb."
        }
        assert httpx.post(f"{address}/predict", files=form(("a.png", encode()))).status_code == 200
    assert len(model.batches) == 1


def test_a_client_that_sends_everything_before_it_reads_gets_the_response(model: Any, listening: Listening) -> None:
    with listening(model, Settings(max_request_mb=4)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 15000000\r\n\r\n"
            connection.sendall(head.encode() + bytes(15_000_000))  # more than the buffers between the two hold
            assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_expects_100_continue_is_refused_before_it_sends(live: str) -> None:
    host, port = live.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99000000\r\n"
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("size", "got"), [((3000, 2000), "3000 x 2000 = 6,000,000"), ((60000, 60000), "3,600,000,000")]
)
def test_an_image_with_too_many_pixels(
    model: Any, encode: Encode, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], got: str
) -> None:
    decoded = []
    original = ImageFile.pixels
    monkeypatch.setattr(ImageFile, "pixels", lambda self, *rest: decoded.append(self.path) or original(self, *rest))
    with TestClient(create_app(model, Settings(max_pixels=1_000_000))) as client:
        files = form(("bomb.png", png_header(*size)))
        answer = client.post("/predict", files=files)
        assert answer.status_code == 413
        assert answer.json()["error"].startswith("An image may have 1,000,000 pixels at most; bomb.png has ")
        assert got in answer.json()["error"]
        assert "larger --max-pixels" in answer.json()["error"]
        answer = client.post("/predict", files=[*files, *form(("a.png", encode()))])
        assert answer.status_code == 200
        assert "at most" in answer.json()["predictions"][0]["error"]
    assert decoded == [Path("a.png")], "the image was not refused by its header"


@pytest.mark.parametrize(
    ("request_", "status", "text"),
    [
        ({"content": b"", "headers": {"Content-Type": "image/png"}}, 400, "has no image: its body has 0 bytes."),
        ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, "or image/*, got 'text/plain'."),
        ({"content": b"x"}, 415, "must be multipart/form-data or image/*, got 'none'."),
        ({"data": {"images": "x"}}, 415, "got 'application/x-www-form-urlencoded'."),
        ({"files": [("photo", ("a.png", b"x"))]}, 400, "no file in the field 'images'; found: photo."),
        ({"files": [("images", (None, "a text"))]}, 400, "no file in the field 'images'; found: images."),
        (
            {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
            400,
            "The form cannot be read: Missing boundary in multipart.",
        ),
        (
            {"content": b"nonsense", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
            400,
            "The form cannot be read: ",
        ),
        ({"files": [("images", ("a.png", b"x"))] * 65}, 413, "A request may have 64 images at most."),
        ({"files": [("images", ("a.png", b"x"))] * 70}, 413, "A request may have 64 images at most."),
    ],
)
def test_invalid_requests(client: TestClient, request_: dict[str, Any], status: int, text: str) -> None:
    answer = client.post("/predict", **request_)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert text in answer.json()["error"]
    assert "Send" in answer.json()["error"], "an error names its fix"


def test_a_body_that_does_not_arrive(model: Any, listening: Listening) -> None:
    with listening(model, Settings(read_seconds=0.2)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(
                b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\n1"
            )
            answer = connection.makefile().read()  # until the server closes
        assert answer.startswith("HTTP/1.1 408 ")
        assert "must arrive within 0.2 seconds" in answer


@pytest.mark.parametrize("path", ["/", "/health"])
def test_head_requests(client: TestClient, path: str) -> None:
    answer = client.head(path)
    assert answer.status_code == 200


@pytest.mark.parametrize(("path", "method", "status"), [("/nothing", "GET", 404), ("/predict", "GET", 405)])
def test_unknown_paths_and_methods(client: TestClient, path: str, method: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"].startswith(f"{method} {path}: ")
    assert "GET /openapi.json" in answer.json()["error"]


# -------------------------------------------------------------------------------------------- together


def test_requests_that_arrive_together_share_a_batch(live: str, model: Any, encode: Encode) -> None:
    model.gate.clear()
    colours = ["red", "lime", "blue", "red", "lime", "blue"]

    def ask(colour: str) -> str:
        answer = httpx.post(f"{live}/predict", files=form((colour, encode(colour))), timeout=30)
        return answer.json()["predictions"][0]["class"]

    with ThreadPoolExecutor(7) as pool:
        first = pool.submit(ask, "red")
        until(lambda: len(model.batches) == 1, "the first image was in the model")
        others = [pool.submit(ask, colour) for colour in colours]
        # The event loop answers while the model works.
        until(lambda: httpx.get(f"{live}/health").json()["images_under_way"] == 7, "all images were there")
        model.gate.set()
        names = {"red": "red", "lime": "green", "blue": "<b>blue</b>"}
        assert first.result() == "red"
        assert [other.result() for other in others] == [names[colour] for colour in colours]
    assert len(model.batches) < 1 + len(colours), "the waiting images did not share a batch"
    assert httpx.get(f"{live}/health").json() == {"status": "ok", "model": "vit_tiny_patch16", "images_under_way": 0}


@pytest.mark.parametrize("limit", [{"max_waiting": 2}, {"max_requests": 1}])
def test_a_full_queue(model: Any, encode: Encode, listening: Listening, limit: dict[str, int]) -> None:
    model.gate.clear()
    with listening(model, Settings(**limit)) as address, ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{address}/predict", files=form(("a", encode())), timeout=30)
        until(lambda: len(model.batches) == 1, "the first image was in the model")
        files = form(("b", encode()), ("c", encode()))
        answer = httpx.post(f"{address}/predict", files=files)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.json() == {"error": "The server is busy: its queue is full. Try again in a second."}
        model.gate.set()
        assert first.result().status_code == 200
        assert httpx.post(f"{address}/predict", files=files).status_code == 200, "the places were not released"


def test_a_client_that_disconnects_blocks_no_other(live: str, model: Any, encode: Encode) -> None:
    host, port = live.removeprefix("http://").split(":")
    image = encode()
    head = (
        f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(image)}\r\n\r\n".encode()
    )
    model.gate.clear()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + image[:20])  # half an image
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + image)
        until(lambda: len(model.batches) == 1, "the image was in the model")
    model.gate.set()
    assert httpx.post(f"{live}/predict", files=form(("a.png", image))).status_code == 200


def test_a_failing_model(live: str, model: Any, encode: Encode, caplog: pytest.LogCaptureFixture) -> None:
    model.error = RuntimeError("out of memory at 0x123")
    answer = httpx.post(f"{live}/predict", files=form(("a.png", encode())))
    assert answer.status_code == 500
    text = "The model failed on the images (RuntimeError). The server's log has the traceback."
    assert answer.json() == {"error": text}
    assert "out of memory at 0x123" in caplog.text
    health = httpx.get(f"{live}/health")
    assert (health.status_code, health.json()["status"]) == (503, "failing")
    model.error = None
    assert httpx.post(f"{live}/predict", files=form(("a.png", encode()))).status_code == 200
    assert httpx.get(f"{live}/health").status_code == 200


def test_stopping_finishes_requests_in_progress(model: Any, encode: Encode, listening: Listening) -> None:
    model.gate.clear()
    threads = set(threading.enumerate())
    with ThreadPoolExecutor(1) as pool:
        with listening(model) as address:
            answer = pool.submit(httpx.post, f"{address}/predict", files=form(("a", encode())), timeout=30)
            until(lambda: len(model.batches) == 1, "the image was in the model")
            threading.Timer(0.3, model.gate.set).start()  # the server is told to stop before that
        assert answer.result().json()["predictions"][0]["class"] == "red"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")
    left = [thread.name for thread in set(threading.enumerate()) - threads if thread.name.startswith("openmae")]
    assert left == [], "threads of the server outlived it"


def test_before_its_start_and_after_its_end_it_is_not_healthy(model: Any, encode: Encode) -> None:
    client = TestClient(create_app(model))  # without its lifespan
    assert client.get("/health").status_code == 503
    assert client.get("/health").json()["status"] == "stopped"
    answer = client.post("/predict", files=form(("a.png", encode())))
    assert answer.status_code == 503
    assert answer.json()["error"] == "The server is stopping. Try another server, or try again later."


# ------------------------------------------------------------------------------------------ description


def test_metadata(client: TestClient, model: Any) -> None:
    said = client.get("/metadata").json()
    assert said["card"] == json.loads(json.dumps(model.card.to_dict()))
    assert said["card"]["class_names"] == ["red", "green", "<b>blue</b>"]
    assert said["runtime"] == "a test"
    assert said["limits"]["max_pixels"] == 50_000_000


def test_openapi_describes_the_responses(client: TestClient) -> None:
    api = client.get("/openapi.json").json()
    post = api["paths"]["/predict"]["post"]
    assert set(post["requestBody"]["content"]) == {"multipart/form-data", "image/*"}
    assert {"200", "400", "408", "413", "415", "422", "500", "503"} == set(post["responses"])
    assert "The status is 200 if at least one image could be used" in post["description"]
    assert {"name", "class", "probability", "top", "embedding", "error"} == set(
        api["components"]["schemas"]["Prediction"]["properties"]
    )
    assert client.get("/docs").status_code == 404, "FastAPI's own page asks another host for its scripts"


def test_the_page_loads_nothing_from_other_hosts(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    page = answer.text.replace("http://www.w3.org/2000/svg", "")
    for text in ("http://", "https://", '<link rel="stylesheet', "src=", "@import", "innerHTML", " onclick", " style="):
        assert text not in page, f"the page has {text!r}"
