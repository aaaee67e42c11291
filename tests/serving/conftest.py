"""A model that classifies colours, and running servers."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import httpx
import pytest
import torch
import uvicorn
from PIL import Image
from torch import Tensor

from openmae.engines.metadata import FEATURES, LOGITS, TOKENS, ModelCard
from openmae.engines.predictor import Predictor
from openmae.models.build import ModelConfig
from openmae.serving.app import create_app
from openmae.serving.settings import Settings

NAMES = ("red", "green", "<b>blue</b>")
SIZE = (16, 24)


class Colours:
    """A model that can be blocked or fail. Its class is the strongest channel, its embedding the mean colour."""

    def __init__(self, stage: str = "finetune") -> None:
        classes = len(NAMES) if stage == "finetune" else 0
        config = ModelConfig("vit_tiny_patch16", SIZE, num_classes=classes)
        self.card = ModelCard(stage, config, (0.5,) * 3, (0.5,) * 3, NAMES if classes else ())  # type: ignore[arg-type]
        self.device = torch.device("cpu")
        self.runtime = "a test"
        self.batches: list[Tensor] = []
        self.gate = threading.Event()  # while cleared, batches wait
        self.gate.set()
        self.error: Exception | None = None

    def __call__(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        self.batches.append(images_BCHW)
        assert self.gate.wait(20), "the test left the gate closed"
        if self.error is not None:
            raise self.error
        means = images_BCHW.float().mean(dim=(2, 3))
        if self.card.stage == "finetune":
            return {LOGITS: means / 20}
        return {FEATURES: means, TOKENS: images_BCHW.float()}


def _encode(colour: tuple[int, ...] | str = "red", kind: str = "PNG", size: tuple[int, int] = (40, 32)) -> bytes:
    """Return an image file of one colour; ``size`` is (width, height)."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


@contextmanager
def _listening(predictor: Predictor, settings: Settings | None = None) -> Iterator[str]:
    """Run a server on a free port in a thread; yield its address once it is healthy."""
    config = uvicorn.Config(create_app(predictor, settings), port=0, log_level="error", timeout_graceful_shutdown=20)
    server = uvicorn.Server(config)
    listener = config.bind_socket()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while httpx.get(f"{address}/health", timeout=20).status_code != 200:
            assert time.monotonic() < deadline, "the server did not become healthy"
        yield address
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def model() -> Colours:
    return Colours()


@pytest.fixture
def embedder() -> Colours:
    return Colours("pretrain")


@pytest.fixture
def live(model: Colours) -> Iterator[str]:
    """Run a server around ``model``; yield its address."""
    with _listening(model) as address:
        yield address


@pytest.fixture
def listening() -> Callable[..., AbstractContextManager[str]]:
    return _listening


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return _encode
