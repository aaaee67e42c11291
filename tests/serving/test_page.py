"""The page in headless Chromium, controlled over the DevTools protocol: choosing, dropping, pasting, keyboard."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from openmae.data.formats import FORMAT_TITLES
from openmae.serving.settings import Settings

pytestmark = pytest.mark.browser

Encode = Callable[..., bytes]
Listening = Callable[..., AbstractContextManager[str]]
LIMIT = 20  # seconds


class Browser:
    """A page of Chromium, controlled over two pipes with JSON messages that end in a zero byte.

    Attributes:
        requests: Addresses that the page requested.
        complaints: Exceptions, and messages of the console and the security policy.
    """

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if binary is None:
            pytest.skip("Chromium is not installed: apt-get install chromium")
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        options = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "remote-debugging-pipe")
        quiet = ("disable-background-networking", "disable-component-update", "disable-sync", "hide-scrollbars")
        self._process = subprocess.Popen(
            # Chromium reads descriptor 3 and writes to 4; sh only supports descriptors of one digit.
            ["bash", "-c", f'exec "$0" "$@" 3<&{commands} 4>&{answers}', binary]
            + [f"--{name}" for name in (*options, *quiet, f"user-data-dir={folder}")],
            pass_fds=(commands, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._count, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + LIMIT
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"Chromium did not respond for {LIMIT} s"
            piece = os.read(self._in, 1 << 16)
            assert piece, "Chromium ended"
            self._buffer += piece
        text, self._buffer = self._buffer.split(b"\0", 1)
        answer = json.loads(text)
        params = answer.get("params", {})
        if answer.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif answer.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif answer.get("method") == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        return answer

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page, awaited."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + LIMIT
        while not self.run(f"Boolean({condition})"):
            page = self.run("document.body && document.body.innerText")
            assert time.monotonic() < deadline, f"{condition} did not become true; the page shows:\n{page}"
            time.sleep(0.02)

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && document.title.includes(' · ')")

    def choose(self, *files: Path) -> None:
        """Choose files, as the file dialog does."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector="#files")["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in files])

    def drop(self, *files: Path) -> None:
        """Drag files over the page and drop them."""
        data = {"items": [], "files": [str(path) for path in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.send("Input.dispatchDragEvent", type=kind, x=150, y=250, data=data)

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def texts(self, selector: str) -> list[str]:
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture
def images(tmp_path: Path, encode: Encode) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("red.png", "red"), ("green.jpg", "lime"), ("<i>blue.webp", "blue")):
        kind = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[name.rpartition(".")[2]]
        (folder / name).write_bytes(encode(colour, kind))
    (folder / "notes.png").write_text("not an image")
    return folder


def test_a_chosen_image_is_classified(live: str, browser: Browser, images: Path) -> None:
    browser.open(live)
    assert browser.texts("h1") == ["vit_tiny_patch16"]
    assert browser.texts("#about") == ["3 classes · 16 × 24 pixels · fp32 · a test"]
    browser.choose(images / "red.png")
    browser.wait("document.querySelector('article ol')")
    assert browser.texts("article h2") == ["red"]
    assert browser.texts("article li span:last-child") == ["100.0 %", "0.0 %", "0.0 %"]
    widths = browser.run("[...document.querySelectorAll('.track i')].map(e => e.offsetWidth)")
    assert widths[0] > 100 * widths[1], "the bars are not as long as the probabilities"
    browser.wait("document.querySelector('article img').naturalWidth === 40")
    assert browser.texts("#news") == ["red.png: red, 100.0 %"], "the text for screen readers"
    assert all(address.startswith((live, "blob:", "data:")) for address in browser.requests), browser.requests
    assert browser.complaints == []


def test_dropped_images(live: str, browser: Browser, images: Path) -> None:
    browser.open(live)
    browser.drop(*(images / name for name in ("red.png", "green.jpg", "<i>blue.webp", "notes.png")))
    browser.wait("document.querySelectorAll('article ol, article .problem').length === 4")
    assert browser.texts(".heading span:first-child") == ["notes.png", "<i>blue.webp", "green.jpg", "red.png"]
    assert browser.texts("article h2") == ["<b>blue</b>", "green", "red"], "names were interpreted as HTML"
    assert browser.texts("article .problem") == [
        f"notes.png: its content is not an image that can be read ({', '.join(FORMAT_TITLES)}). "
        "Send an image that opens in a viewer."
    ]
    browser.wait("document.querySelector('article .preview').textContent === 'no preview'")
    assert browser.texts("#count") == ["4 images"]
    assert browser.run("document.querySelectorAll('article i:not(.track i), article b').length") == 0
    assert browser.run("location.href") == f"{live}/", "the page was replaced by the image"
    (complaint,) = browser.complaints
    assert "422" in complaint, "the console reports another problem than that of notes.png"


def test_a_pasted_image(live: str, browser: Browser, images: Path) -> None:
    browser.open(live)
    data = json.dumps(list((images / "green.jpg").read_bytes()))
    browser.run(
        f"(() => {{ const data = new DataTransfer(); const bytes = new Uint8Array({data});"
        "data.items.add(new File([bytes], 'image.png', {type: 'image/png'}));"
        "document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true})) })()"
    )
    browser.wait("document.querySelector('article ol')")
    assert browser.texts("article h2") == ["green"]


def test_the_page_can_be_used_with_the_keyboard(live: str, browser: Browser, images: Path) -> None:
    browser.open(live)
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.id") == "files"
    outline = browser.run("getComputedStyle(document.querySelector('.zone')).outlineStyle")
    assert outline == "solid", "the focused zone is not highlighted"
    browser.choose(images / "red.png")
    browser.wait("document.querySelector('article ol')")
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.id") == "clear"
    browser.run("document.activeElement.click()")
    assert browser.texts("article") == []
    assert browser.run("document.activeElement.id") == "files"
    browser.choose(images / "red.png")  # the same file again
    browser.wait("document.querySelector('article ol')")


def test_embeddings_are_compared(embedder: Any, browser: Browser, images: Path, listening: Listening) -> None:
    with listening(embedder) as address:
        browser.open(address)
        assert browser.texts("#about") == ["embeddings · 16 × 24 pixels · fp32 · a test"]
        browser.choose(images / "red.png")
        browser.wait("document.querySelector('article canvas')")
        assert browser.texts("article h2") == ["3 dimensions"]
        assert browser.texts("article .numbers") == ["255.0000, 0.0000, 0.0000", "norm 255.000"]
        assert browser.run("document.getElementById('similarity').hidden"), "a single image was compared"
        browser.choose(images / "<i>blue.webp")
        browser.wait("document.querySelectorAll('#similarity td:not(.hidden)').length === 4")
    assert browser.texts("#similarity tbody th") == ["1  <i>blue.webp", "2  red.png"]
    same, other, *_ = (float(text) for text in browser.texts("#similarity tbody td"))
    assert same == 1
    assert abs(other) < 0.01
    assert browser.complaints == []


def test_a_file_that_is_too_large_is_not_sent(
    model: Any, browser: Browser, tmp_path: Path, listening: Listening
) -> None:
    (tmp_path / "large.png").write_bytes(bytes(1_500_000))
    with listening(model, Settings(max_request_mb=1)) as address:
        browser.open(address)
        browser.choose(tmp_path / "large.png")
        browser.wait("document.querySelector('article .problem')")
    (text,) = browser.texts("article .problem")
    assert text == "An image may have 1 MB at most, this one has 1.5 MB. Send a smaller one."
    assert not any(address.endswith("/predict") for address in browser.requests)


def test_a_server_that_has_stopped(model: Any, browser: Browser, images: Path, listening: Listening) -> None:
    with listening(model) as address:
        browser.open(address)
    browser.choose(images / "red.png")
    browser.wait("document.querySelector('article .problem')")
    assert "Is mae serve still running, and the file still there?" in browser.texts("article .problem")[0]


@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_is_wider_than_the_window(live: str, browser: Browser, images: Path, width: int) -> None:
    browser.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    browser.open(live)
    browser.drop(*sorted(images.iterdir()))
    browser.wait("document.querySelectorAll('article ol, article .problem').length === 4")
    assert browser.run("document.documentElement.scrollWidth") <= width
