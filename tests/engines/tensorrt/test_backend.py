"""Which builder is taken, and what classic tensorrt is asked for: it is a recorded fake here, as the names say."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from openmae.engines.tensorrt.backend import Backend, choose_backend
from openmae.engines.tensorrt.builder import BuildSettings, build_engine
from openmae.engines.tensorrt.sidecar import Profile
from openmae.errors import SpecError


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, as torch tells of it."""

    def have(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))

    return have


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def refusal(*arguments: Any) -> str:
    with pytest.raises(SpecError) as caught:
        choose_backend(*arguments)
    return str(caught.value)


def test_a_capability_has_several_spellings(no_gpu):
    assert choose_backend("auto", ["sm_89", "SM80", "8.9", "sm120", "12.0"], 0).targets == ("SM89", "SM80", "SM120")


@pytest.mark.parametrize("capabilities", [[], ["current"], ["sm_89", "Current"]])
def test_current_needs_a_gpu(no_gpu, capabilities):
    text = refusal("auto", capabilities, 0)
    assert "current, or unset, means the GPU that is present, and no GPU was found" in text
    assert "gen_trt_engine.compute_capability=[sm_89]" in text
    assert "supports sm_75, sm_80, sm_86, sm_89, sm_120, sm_121" in text


def test_current_is_the_gpu_of_this_machine(gpu):
    gpu(8, 6)
    backend = choose_backend("tensorrt_rtx", [], 0)
    assert (backend.targets, backend.gpu) == (("SM86",), 0)
    backend = choose_backend("tensorrt_rtx", ["current", "sm_89"], 0)
    assert (backend.targets, backend.gpu) == (("SM86", "SM89"), None)


def test_an_unsupported_capability(gpu):
    text = refusal("tensorrt_rtx", ["sm_99"], 0)
    assert "cannot build for sm_99" in text
    assert "It supports sm_75, sm_80, sm_86, sm_89, sm_120, sm_121." in text
    gpu(9, 0)
    assert "build on it with gen_trt_engine.backend=tensorrt" in refusal("auto", [], 0)
    assert "'ada' is not a compute capability" in refusal("auto", ["ada"], 0)


def test_a_builder_that_is_not_installed(gpu, monkeypatch):
    gpu(8, 9)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "tensorrt is not installed." in refusal("tensorrt", [], 0)
    assert choose_backend("auto", [], 0).name == "tensorrt_rtx"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert "tensorrt_rtx is not installed.\n  Fix: Run pip install 'openmae[tensorrt-rtx]'." in refusal("auto", [], 0)


def test_a_gpu_number_out_of_range(gpu):
    gpu(8, 9)
    assert "gen_trt_engine.gpu_id: this machine has 1 GPU, counted from 0, got 1." in refusal("auto", [], 1)


# -------------------------------------------------------------------------------- classic tensorrt: a recorded fake


class FakeTensorRT:
    """A stand-in for classic TensorRT 10 that records the calls of its builder and builds nothing."""

    __version__ = "10.9.0.34"
    ILogger = type("ILogger", (), {"__init__": lambda self: None, "ERROR": 1, "WARNING": 2})
    IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.steps: list[bool] = []
        self.takes_cache = True

    def Builder(self, logger: Any) -> Any:
        return SimpleNamespace(
            create_network=lambda flags: self.calls.append(("network flags", flags)) or self.network(),
            create_builder_config=self.config,
            create_optimization_profile=lambda: SimpleNamespace(
                set_shape=lambda *shapes: self.calls.append(("shapes", *shapes))
            ),
            build_serialized_network=self.build,
        )

    def network(self) -> Any:
        tensor = SimpleNamespace(name="input", shape=(-1, 3, 8, 8), dtype=SimpleNamespace(name="FLOAT"))
        return SimpleNamespace(num_inputs=1, num_outputs=1, get_input=lambda n: tensor, get_output=lambda n: tensor)

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        return SimpleNamespace(parse_from_file=lambda path: self.calls.append(("parse", path)) or True)

    def config(self) -> Any:
        return SimpleNamespace(
            set_memory_pool_limit=lambda pool, limit: self.calls.append((pool, limit)),
            add_optimization_profile=lambda profile: self.calls.append(("profile",)),
            create_timing_cache=lambda held: SimpleNamespace(held=held),
            set_timing_cache=self.set_cache,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"timings"),
        )

    def set_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.calls.append(("timing cache", cache.held, ignore_mismatch))
        return self.takes_cache or not cache.held

    def build(self, network: Any, config: Any) -> Any:
        monitor = config.progress_monitor
        self.steps.append(monitor.step_complete("phase", 0))
        return np.frombuffer(b"engine", np.uint8)


@pytest.fixture
def classic(monkeypatch, gpu):
    gpu(9, 0)
    fake = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(Backend, "on_gpu", lambda self: fake.calls.append(("gpu", self.gpu)) or _Nothing())
    return fake


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def test_auto_chooses_classic_tensorrt_on_its_gpu_FAKE(classic):
    assert choose_backend("auto", [], 0) == Backend("tensorrt", classic, ("SM90",), 0)
    assert choose_backend("auto", ["9.0"], 0).name == "tensorrt"
    assert choose_backend("auto", ["sm_89"], 0).name == "tensorrt_rtx"
    text = refusal("tensorrt", ["sm_89"], 0)
    assert "tensorrt builds for the GPU it runs on, sm_90, got sm_89." in text


def test_classic_tensorrt_without_a_gpu_FAKE(classic, no_gpu):
    assert "tensorrt builds on the GPU that the engine is for, and no GPU was found" in refusal("tensorrt", [], 0)
    assert choose_backend("auto", ["sm_89"], 0).name == "tensorrt_rtx"


def test_classic_tensorrt_that_is_too_old_FAKE(classic, monkeypatch, caplog):
    monkeypatch.setattr(FakeTensorRT, "__version__", "8.6.1")
    assert "tensorrt 8.6.1 is too old; 10.0 or later is required" in refusal("tensorrt", [], 0)
    with caplog.at_level(logging.INFO, "openmae"):
        assert choose_backend("auto", ["sm_89"], 0).name == "tensorrt_rtx"


def test_calls_of_classic_tensorrt_FAKE(classic, tmp_path):
    cache = tmp_path / "caches" / "t.cache"
    backend = choose_backend("tensorrt", [], 0)
    settings = BuildSettings(Profile(1, 2, 4), workspace_mib=512, timing_cache=cache)
    built = build_engine(tmp_path / "a.onnx", backend, settings)
    assert classic.calls == [
        ("gpu", 0),
        ("network flags", 2),  # strongly typed
        ("parse", str(tmp_path / "a.onnx")),
        ("workspace", 512 * 2**20),
        ("timing cache", b"", False),
        ("shapes", "input", (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)),
        ("profile",),
    ]
    assert bytes(built.engine) == b"engine"
    assert cache.read_bytes() == b"timings"
    assert classic.steps == [True], "the build was cancelled although nobody asked"


def test_a_timing_cache_is_used_or_replaced_FAKE(classic, tmp_path, caplog):
    cache, backend = tmp_path / "t.cache", choose_backend("tensorrt", [], 0)
    cache.write_bytes(b"older timings")
    settings = BuildSettings(Profile(1, 1, 1), timing_cache=cache)
    build_engine(tmp_path / "a.onnx", backend, settings)
    assert ("timing cache", b"older timings", False) in classic.calls
    assert caplog.messages == []
    assert not any(call[0] == "workspace" for call in classic.calls), "0 sets no limit"
    classic.takes_cache = False
    build_engine(tmp_path / "a.onnx", backend, settings)
    assert "t.cache is damaged or of another TensorRT or GPU; it is replaced" in caplog.text
    assert classic.calls.count(("timing cache", b"", False)) == 1


def test_ctrl_c_cancels_classic_tensorrt_and_keeps_the_cache_FAKE(classic, tmp_path, monkeypatch):
    cache = tmp_path / "t.cache"

    def press(network: Any, config: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        classic.steps.append(config.progress_monitor.step_complete("phase", 0))

    monkeypatch.setattr(classic, "build", press)
    with pytest.raises(KeyboardInterrupt):
        build_engine(
            tmp_path / "a.onnx",
            choose_backend("tensorrt", [], 0),
            BuildSettings(Profile(1, 1, 1), timing_cache=cache),
        )
    assert classic.steps == [False], "the builder was not told to stop"
    assert not cache.exists()
