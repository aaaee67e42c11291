"""An engine can be loaded on a GPU alone: TensorRT's runtime is a fake here that reads and writes the real memory."""

from __future__ import annotations

import ctypes
import hashlib
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from openmae.engines.metadata import ModelCard
from openmae.engines.tensorrt import runtime
from openmae.engines.tensorrt.runtime import TensorRTPredictor
from openmae.engines.tensorrt.sidecar import (
    EngineInfo,
    Profile,
    TensorInfo,
    read_sidecar,
    sidecar_path,
    sidecar_text,
)
from openmae.errors import CheckpointError, RunError, SpecError
from openmae.models.build import ModelConfig

CONFIG = ModelConfig("vit_tiny_patch16", (32, 48), num_classes=3)
CARD = ModelCard("finetune", CONFIG, (0.5, 0.25, 0.0), (0.25, 0.5, 1.0), ("a", "b", "c"))


class FakeContext:
    """Logits are the mean of each channel, as the engine's memory holds them."""

    def __init__(self, fails: bool) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.batches: list[tuple[int, ...]] = []
        self.fails = fails

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shapes["input"][0], 3)

    def execute(self) -> bool:
        if self.fails:
            return False
        shape = self.shapes["input"]
        self.batches.append(shape)
        channels_last = shape[-1] == 3
        images = self._array("input", shape, np.uint8 if channels_last else np.float32)
        logits = self._array("logits", (shape[0], 3), np.float16)
        logits[:] = images.mean((1, 2) if channels_last else (2, 3))
        return True

    def _array(self, name: str, shape: tuple[int, ...], kind: Any) -> np.ndarray:
        count = math.prod(shape) * np.dtype(kind).itemsize
        buffer = (ctypes.c_char * count).from_address(self.addresses[name])
        return np.frombuffer(buffer, kind).reshape(shape)


class FakeRuntime:
    """A stand-in for the runtime of tensorrt_rtx 1.7.1 that loads any file with the first bytes of an engine."""

    __version__ = "1.7.1"
    ILogger = type("ILogger", (), {"__init__": lambda self: None, "ERROR": 1, "WARNING": 2})

    def __init__(self) -> None:
        self.context = FakeContext(fails=False)

    def Runtime(self, logger: Any) -> Any:
        def deserialize(data: bytes) -> Any:
            if not data.startswith(b"engine"):
                logger.log(1, "The engine is corrupt")
                return None
            return SimpleNamespace(create_execution_context=lambda: self.context)

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


@pytest.fixture
def fake(monkeypatch):
    """The module, and a GPU of which everything but its memory is here."""
    module = FakeRuntime()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    monkeypatch.setattr(runtime, "_open_device", lambda device, info, path: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(runtime, "_execute", lambda context, device: context.execute())
    return module


def write_engine(folder: Path, card: ModelCard | None = CARD, data: bytes = b"engine 1", **changes: Any) -> Path:
    preprocessing = card is not None and card.preprocessing
    shape, dtype = ((-1, 32, 48, 3), "uint8") if preprocessing else ((-1, 3, 32, 48), "float32")
    info = EngineInfo(
        builder="tensorrt_rtx",
        builder_version="1.7.1",
        data_type="fp16",
        compute_capability=("SM86", "SM89"),
        profile=Profile(2, 2, 4),
        inputs=(TensorInfo("input", shape, dtype),),
        outputs=(TensorInfo("logits", (-1, 3), "float16"),),
        onnx_sha256="0" * 64,
        engine_sha256=hashlib.sha256(data).hexdigest(),
    )
    path = folder / "model.engine"
    path.write_bytes(data)
    sidecar_path(path).write_text(sidecar_text(card, replace(info, **changes)), encoding="utf-8")
    return path


def refusal(path: Path, device: str = "cuda", kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        TensorRTPredictor(path, device)
    return str(caught.value)


def test_sidecar_round_trip(tmp_path):
    path = write_engine(tmp_path)
    card, info = read_sidecar(path)
    assert card == CARD
    assert info.profile == Profile(2, 2, 4)
    assert info.inputs == (TensorInfo("input", (-1, 3, 32, 48), "float32"),)
    assert sidecar_path(path).name == "model.engine.json"
    assert sidecar_path(path).read_text(encoding="utf-8") == sidecar_text(card, info)


@pytest.mark.parametrize(("count", "batches"), [(1, [2]), (3, [3]), (9, [4, 4, 2])])
def test_images_are_normalised_split_and_padded_FAKE_runtime(fake, tmp_path, count, batches):
    predictor = TensorRTPredictor(write_engine(tmp_path))
    images = torch.randint(0, 256, (count, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    outputs = predictor(images)
    assert fake.context.batches == [(batch, 3, 32, 48) for batch in batches]
    expected = ((images / 255).mean((2, 3)) - torch.tensor(CARD.mean)) / torch.tensor(CARD.std)
    assert list(outputs) == ["logits"]
    assert outputs["logits"].dtype == torch.float32
    torch.testing.assert_close(outputs["logits"], expected, atol=2e-3, rtol=2e-3)  # the fake's output is fp16
    assert predictor.card == CARD
    assert predictor.runtime == "tensorrt_rtx 1.7.1 fp16, CPU"


def test_an_engine_that_normalises_gets_bytes_FAKE_runtime(fake, tmp_path):
    predictor = TensorRTPredictor(write_engine(tmp_path, replace(CARD, preprocessing=True)))
    images = torch.full((2, 3, 32, 48), 200, dtype=torch.uint8)
    images[:, 1] = 7
    assert predictor(images)["logits"].tolist() == [[200, 7, 200]] * 2
    assert fake.context.batches == [(2, 32, 48, 3)]


def test_a_batch_that_fails_FAKE_runtime(fake, tmp_path):
    predictor = TensorRTPredictor(write_engine(tmp_path))
    fake.context.fails = True
    with pytest.raises(RunError, match="tensorrt_rtx failed on a batch of 2"):
        predictor(torch.zeros(2, 3, 32, 48, dtype=torch.uint8))


def test_the_time_of_a_batch_FAKE_runtime(fake, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    path = write_engine(tmp_path, profile=Profile(1, 3, 4))
    engine = runtime.LoadedEngine(path.read_bytes(), read_sidecar(path)[1], torch.device("cpu"), "it")
    assert 0 < engine.seconds_per_batch() < 1
    assert {batch[0] for batch in fake.context.batches} == {3}, "it is not timed at the batch it is tuned for"
    assert len(waits) == len(fake.context.batches), "a batch was timed before it had ended"


def test_an_engine_that_the_runtime_rejects_FAKE_runtime(fake, tmp_path):
    text = refusal(write_engine(tmp_path, data=b"noise"))
    assert "tensorrt_rtx 1.7.1 cannot load" in text
    assert "The engine is corrupt\n  Fix: Build the engine again with mae gen_trt_engine." in text


def test_another_version_of_tensorrt_FAKE_runtime(fake, tmp_path):
    text = refusal(write_engine(tmp_path, builder_version="1.3.0"))
    assert "was built with tensorrt_rtx 1.3.0 and runs with that version only; 1.7.1 is installed." in text
    assert "or install tensorrt_rtx 1.3.0." in text


def test_tensorrt_that_is_not_installed_FAKE_runtime(fake, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    text = refusal(write_engine(tmp_path), kind=SpecError)
    assert "tensorrt_rtx is not installed.\n  Fix: Run pip install 'openmae[tensorrt-rtx]'." in text


def test_an_engine_without_its_sidecar(tmp_path):
    path = write_engine(tmp_path)
    sidecar_path(path).unlink()
    assert "has no model.engine.json next to it" in refusal(path)
    path.unlink()
    assert "No engine at" in refusal(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"card": null}', '{"card": null, "engine": {"inputs": []}}'])
def test_a_damaged_sidecar(tmp_path, text):
    path = write_engine(tmp_path)
    sidecar_path(path).write_text(text, encoding="utf-8")
    assert "is damaged or of another version of OpenMAE" in refusal(path)


def test_a_sidecar_names_no_other_module_to_import(tmp_path):
    assert "builder is 'antigravity'" in refusal(write_engine(tmp_path, builder="antigravity"))


def test_the_sidecar_of_another_engine(tmp_path):
    path = write_engine(tmp_path)
    path.write_bytes(b"engine 2")
    text = refusal(path)
    assert "belongs to another engine than" in text
    assert "Fix: Copy both again, or build the engine again with mae gen_trt_engine." in text


def test_an_engine_of_a_foreign_onnx_file(tmp_path):
    with pytest.raises(CheckpointError, match="its classes and preprocessing are unknown"):
        read_sidecar(write_engine(tmp_path, card=None))


def test_a_machine_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = write_engine(tmp_path)
    assert read_sidecar(path)[0] == CARD, "the card needs no GPU"
    text = refusal(path, kind=SpecError)
    assert "is a TensorRT engine, which needs a CUDA GPU; none was found." in text
    assert "Fix: Use the ONNX file or the checkpoint" in text


def test_another_gpu_than_the_engine_was_built_for(tmp_path, monkeypatch):
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_name", "NVIDIA T4")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    text = refusal(write_engine(tmp_path))
    assert "was built for sm_86, sm_89, and NVIDIA T4 is sm_75." in text
    assert "Build the engine again with mae gen_trt_engine and gen_trt_engine.compute_capability=[sm_75]." in text
    path = write_engine(tmp_path, builder="tensorrt")
    assert "and gen_trt_engine.backend=tensorrt here." in refusal(path)
    assert "cannot run on cpu.\n  Fix: Use the device cuda." in refusal(path, "cpu", SpecError)
