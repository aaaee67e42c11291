"""The command ``mae serve``: its responses, its address, its limits."""

from __future__ import annotations

import csv
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from openmae.checkpoints.format import CheckpointInfo
from openmae.cli.main import main
from openmae.errors import UserError
from openmae.models.build import ModelConfig, build_classifier
from openmae.serving import server
from openmae.serving.settings import Settings

Encode = Callable[..., bytes]
Listening = Callable[..., AbstractContextManager[str]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of an untrained classifier, whose head has large weights so that its probabilities differ."""
    config = ModelConfig("vit_tiny_patch16", (32, 48), num_classes=7)
    torch.manual_seed(0)
    weights = build_classifier(config).state_dict()
    weights["head.weight"] = torch.randn_like(weights["head.weight"])
    names = tuple("abcdefg")
    info = CheckpointInfo("finetune", config, names, (0.4, 0.5, 0.6), (0.2, 0.3, 0.2))
    torch.save(
        {"state_dict": {f"model.{k}": v for k, v in weights.items()}, "openmae": info.to_dict()}, tmp_path / "model.pth"
    )
    return tmp_path / "model.pth"


def test_the_command_returns_the_probabilities_of_inference(checkpoint: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(1)
    for number, suffix in enumerate(("jpg", "png", "webp", "jpg")):
        base = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(base).resize((90 + 70 * number, 80), Image.Resampling.BILINEAR).save(
            images / f"{number}.{suffix}"
        )
    options = (f"inference.checkpoint={checkpoint}", f"dataset.test_data_sources={images}", f"results_dir={tmp_path}")
    assert main(["inference", *options, "dataset.num_workers_per_gpu=0"]) == 0
    with (tmp_path / "inference" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["probability"] for row in rows}) == 4, "the probabilities of the images do not differ"

    command = [sys.executable, "-m", "openmae", "serve", "-m", str(checkpoint), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("vit_tiny_patch16 (torch "), process.communicate(timeout=20)[1]
        address = line.split(" is serving at ")[1].split()[0]
        assert address.startswith("http://127.0.0.1:")
        files = [("images", (row["path"], (images / row["path"]).read_bytes())) for row in rows]
        found = httpx.post(f"{address}/predict", files=files, timeout=30).json()["predictions"]
        page = httpx.get(f"{address}/", timeout=30)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    for row, one in zip(rows, found, strict=True):
        places = [row["class"], *(row[f"class_{place}"] for place in range(2, 6))]
        assert [share["class"] for share in one["top"]] == places
        assert one["probability"] == pytest.approx(float(row["probability"]), abs=2e-6)
        assert one["top"][4]["probability"] == pytest.approx(float(row["probability_5"]), abs=2e-6)
    assert (process.returncode, err) == (130, "Interrupted.\n"), "a warning about other machines was printed"


# -------------------------------------------------------------------------------------------- starting


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[SimpleNamespace]:
    """Replace the model on disk and uvicorn's loop; collect what would be run."""
    runs: list[SimpleNamespace] = []

    class Server:
        def __init__(self, config: Any) -> None:
            self.config = config

        def run(self, sockets: list[socket.socket]) -> None:
            prompt = sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            runs.append(SimpleNamespace(prompt=prompt, address=sockets[0].getsockname()))

    monkeypatch.setattr(server, "open_predictor", lambda path, device, key: model)
    monkeypatch.setattr("uvicorn.Server", Server)
    return runs


def test_listening_on_all_addresses_is_a_warning(started: Any, capsys: Any, caplog: Any, model: Any) -> None:
    server.serve(Path("m.pth"), "0.0.0.0", 0, Settings())
    assert "which has no authentication and no encryption" in caplog.text
    (run,) = started
    host, port = run.address
    assert run.prompt, "without TCP_NODELAY each response is 40 ms late"
    assert (
        capsys.readouterr().out
        == f"vit_tiny_patch16 (a test) is serving at http://{host}:{port} (press Ctrl-C to stop)\n"
    )
    (warm_up,) = model.batches
    assert (tuple(warm_up.shape), warm_up.dtype) == ((1, 3, 16, 24), torch.uint8)


def test_listening_on_localhost_is_not(started: Any, caplog: Any) -> None:
    server.serve(Path("m.pth"), "localhost", 0, Settings())
    assert started
    assert caplog.text == ""


def test_a_port_that_is_taken(started: Any, model: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError) as caught:
            server.serve(Path("m.pth"), "127.0.0.1", port, Settings())
    assert f"Cannot listen on --host 127.0.0.1 --port {port}: Address already in use." in str(caught.value)
    assert "--port 0 finds one" in caught.value.fix
    assert not model.batches, "the model was loaded for nothing"


@pytest.mark.parametrize(
    ("host", "port", "text"),
    [
        ("no such host", 0, "Cannot listen on --host no such host"),
        ("a..b", 0, "it is not an address"),
        ("127.0.0.1", 70000, "must be between 0 and 65535"),
    ],
)
def test_invalid_addresses(started: Any, host: str, port: int, text: str) -> None:
    with pytest.raises(UserError, match=text):
        server.serve(Path("m.pth"), host, port, Settings())


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"max_batch": 0}, "--max-batch must be 1 or more, got 0."),
        ({"max_request_mb": 0}, "--max-request-mb must be above 0, got 0."),
        ({"max_request_mb": float("nan")}, "--max-request-mb must be above 0, got nan."),
        ({"max_pixels": 200_000_000}, "between 1 and 178,956,970 (Pillow opens no larger image), got 200,000,000."),
    ],
)
def test_invalid_limits(option: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as caught:
        Settings(**option)
    assert text in caught.value.problem


def test_the_largest_limit_on_pixels() -> None:
    assert Settings(max_pixels=178_956_970), "Pillow opens it by default"
    with pytest.raises(UserError):
        Settings(max_pixels=178_956_971)
