"""Real engines of tensorrt_rtx, of a graph small enough to be built at once."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from openmae.actions import gen_trt_engine
from openmae.actions.calibration import calibration_batches
from openmae.cli.main import main
from openmae.engines.metadata import ModelCard, file_sha256
from openmae.engines.predictor import exported_kind, read_exported_card
from openmae.engines.tensorrt.backend import choose_backend
from openmae.engines.tensorrt.builder import Built
from openmae.engines.tensorrt.sidecar import read_sidecar
from openmae.errors import RunError, SpecError
from openmae.models.build import ModelConfig
from openmae.spec.load import load_spec

pytestmark = pytest.mark.xdist_group("trt")

CARD = ModelCard(
    "finetune", ModelConfig("vit_tiny_patch16", (32, 32), num_classes=3), (0.5,) * 3, (0.25,) * 3, ("a", "b", "c")
)


def write_model(path: Path, batch: int | str = "batch", card: ModelCard | None = CARD) -> Path:
    """A classifier of a convolution and a mean."""
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.normal(size=(3, 3, 5, 5)).astype(np.float32), "weight")
    nodes = [
        helper.make_node("Conv", ["input", "weight"], ["maps"], name="stem/conv"),
        helper.make_node("GlobalAveragePool", ["maps"], ["mean"], name="pool"),
        helper.make_node("Flatten", ["mean"], ["logits"], name="flat"),
    ]
    images = helper.make_tensor_value_info("input", TensorProto.FLOAT, (batch, 3, 32, 32))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, (batch, 3))
    graph = helper.make_graph(nodes, "graph", [images], [logits], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    if card is not None:
        helper.set_model_props(model, card.to_metadata())
    onnx.save(model, path)
    return path


@pytest.fixture
def request_for(tmp_path):
    """Overrides that build ``model.onnx``; dotted keys below gen_trt_engine replace or add."""

    def make(**changes: Any) -> list[str]:
        values = {
            "onnx_file": tmp_path / "model.onnx",
            "trt_engine": tmp_path / "out" / "model.engine",
            "compute_capability": "[sm_89]",
            **changes,
        }
        return [
            f"results_dir={tmp_path / 'results'}",
            *(f"gen_trt_engine.{key}={value}" for key, value in values.items()),
        ]

    write_model(tmp_path / "model.onnx")
    return make


def tensorrt(**values: Any) -> dict[str, Any]:
    return {f"tensorrt.{key}": value for key, value in values.items()}


def status(tmp_path: Path) -> list[dict[str, Any]]:
    lines = (tmp_path / "results" / "gen_trt_engine" / "status.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_an_engine_its_sidecar_and_a_report(request_for, tmp_path, capsys):
    changes = tensorrt(data_type="fp16", opt_batch_size=2, max_batch_size=4)
    assert main(["gen_trt_engine", *request_for(**changes)]) == 0
    engine = tmp_path / "out" / "model.engine"
    sidecar = json.loads((tmp_path / "out" / "model.engine.json").read_text())
    assert sorted(path.name for path in engine.parent.iterdir()) == ["model.engine", "model.engine.json"]
    assert ModelCard.from_dict(sidecar["card"]) == read_sidecar(engine)[0] == replace(CARD, precision="fp16")
    found = sidecar["engine"]
    assert found["builder"] == "tensorrt_rtx"
    assert found["data_type"] == "fp16"
    assert found["compute_capability"] == ["SM89"]
    assert found["profile"] == {"min": 1, "opt": 2, "max": 4}
    assert found["inputs"] == [{"name": "input", "shape": [-1, 3, 32, 32], "dtype": "float32"}]
    assert found["outputs"] == [{"name": "logits", "shape": [-1, 3], "dtype": "float32"}]
    assert found["onnx_sha256"] == file_sha256(tmp_path / "model.onnx")
    assert found["engine_sha256"] == hashlib.sha256(engine.read_bytes()).hexdigest()
    running = status(tmp_path)[-2]
    assert status(tmp_path)[-1]["status"] == "SUCCESS"
    assert running["kpi"]["engine_mb"] == pytest.approx(engine.stat().st_size / 1e6, abs=1e-3)
    assert running["kpi"]["build_seconds"] > 0
    text = capsys.readouterr().err
    for part in ("tensorrt_rtx 1.", "fp16", "1 to 4, tuned for 2", "sm_89", "MB"):
        assert part in text, f"{part} is not in the table"
    report = (tmp_path / "results" / "gen_trt_engine" / "report.html").read_text()
    assert "1 to 4, tuned for 2" in report
    assert "data_type: fp16" in report
    load_spec(tmp_path / "results" / "gen_trt_engine" / "experiment.yaml", action="gen_trt_engine")


def test_names_without_a_suffix(request_for, tmp_path):
    """NVIDIA's SDK names output files after their keys."""
    (tmp_path / "model.onnx").rename(tmp_path / "export_onnx_file")
    engine = tmp_path / "out" / "gen_trt_engine_trt_engine"
    changes = {"onnx_file": tmp_path / "export_onnx_file", "trt_engine": engine}
    assert main(["gen_trt_engine", *request_for(**changes)]) == 0
    kinds = [exported_kind(path) for path in (*changes.values(), tmp_path / "out" / "none")]
    assert kinds == ["onnx", "engine", None]
    assert read_exported_card(engine).class_names == CARD.class_names


def test_int8_is_calibrated_with_images(request_for, tmp_path, photos):
    calibration = {"tensorrt.calibration.images": photos.plain, "tensorrt.calibration.count": 5}
    assert main(["gen_trt_engine", *request_for(**tensorrt(data_type="int8"), **calibration)]) == 0
    assert json.loads((tmp_path / "out" / "model.engine.json").read_text())["engine"]["data_type"] == "int8"


def test_int8_calibration_with_the_names_of_tao(request_for, tmp_path, photos, caplog):
    """Six batches of two, shared by two folders; the cache has no effect."""
    names = {"cal_image_dir": [str(photos.plain)] * 2, "cal_batch_size": 2, "cal_batches": 6, "cal_cache_file": "c.bin"}
    calibration = {f"tensorrt.calibration.{name}": value for name, value in names.items()}
    request = request_for(**tensorrt(data_type="INT8"), **calibration)
    assert main(["gen_trt_engine", *request]) == 0
    assert json.loads((tmp_path / "out" / "model.engine.json").read_text())["engine"]["data_type"] == "int8"
    assert "calibration.cal_cache_file has no effect because the ranges are part of the engine" in caplog.text
    spec = load_spec(None, request, action="gen_trt_engine")
    settings = spec.gen_trt_engine.tensorrt.calibration
    assert (settings.sources, settings.count, settings.batch) == ((str(photos.plain),) * 2, 12, 2)
    batches = list(calibration_batches(spec, "gen_trt_engine.tensorrt.calibration", CARD, tmp_path))
    assert [len(batch) for batch in batches] == [2] * 6
    again = request_for(**tensorrt(data_type="int8"), **calibration, **{"tensorrt.calibration.images": "x"})
    with pytest.raises(SpecError, match=r"calibration\.cal_image_dir .* means the same as .*images\. Remove one"):
        load_spec(None, again, action="gen_trt_engine")


def test_int8_needs_images(request_for, tmp_path, refused):
    text = refused("gen_trt_engine", request_for(**tensorrt(data_type="int8")))
    assert "there are no images: gen_trt_engine.tensorrt.calibration.images is not set" in text
    assert "export.quantize=int8" in text
    write_model(tmp_path / "model.onnx", card=None)
    text = refused("gen_trt_engine", request_for(**tensorrt(data_type="int8")))
    assert "was not written by mae export: it cannot be calibrated, since its preprocessing is unknown" in text
    write_model(tmp_path / "model.onnx")
    missing = {"tensorrt.calibration.images": tmp_path / "none"}
    text = refused("gen_trt_engine", request_for(**tensorrt(data_type="int8"), **missing))
    assert "gen_trt_engine.tensorrt.calibration.images:" in text
    assert not (tmp_path / "out").exists()


def test_a_foreign_file_is_built_without_metadata(request_for, tmp_path):
    write_model(tmp_path / "model.onnx", card=None)
    assert main(["gen_trt_engine", *request_for(**tensorrt(data_type="fp32"))]) == 0
    assert json.loads((tmp_path / "out" / "model.engine.json").read_text())["card"] is None


@pytest.mark.parametrize(
    ("batch", "changes", "profile"),
    [
        ("batch", {}, (1, 1, 1)),
        ("batch", {"batch_size": 8}, (8, 8, 8)),
        ("batch", tensorrt(min_batch_size=2, opt_batch_size=4, max_batch_size=16), (2, 4, 16)),
        (4, {}, (4, 4, 4)),
        (4, {"batch_size": 4, **tensorrt(max_batch_size=4)}, (4, 4, 4)),
        (4, {"batch_size": -1}, (4, 4, 4)),
    ],
)
def test_the_batches_of_the_engine(request_for, tmp_path, batch, changes, profile):
    write_model(tmp_path / "model.onnx", batch)
    assert main(["gen_trt_engine", *request_for(**{**tensorrt(data_type="fp32"), **changes})]) == 0
    found = json.loads((tmp_path / "out" / "model.engine.json").read_text())["engine"]["profile"]
    assert tuple(found.values()) == profile


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"batch_size": 2}, "gen_trt_engine.batch_size"),
        (tensorrt(max_batch_size=8), "gen_trt_engine.tensorrt.max_batch_size"),
    ],
)
def test_batch_sizes_that_the_file_does_not_support(request_for, tmp_path, refused, changes, key):
    write_model(tmp_path / "model.onnx", 4)
    text = refused("gen_trt_engine", request_for(**changes))
    value = next(iter(changes.values()))
    assert f"{key} is {value}, but {tmp_path / 'model.onnx'} takes batches of 4 only." in text
    assert "export.batch_size=-1" in text


@pytest.mark.parametrize(
    ("changes", "notice"),
    [
        ({"timing_cache": "t.cache"}, "timing_cache has no effect: tensorrt_rtx does not time kernels"),
        ({"gpu_id": 0}, "gpu_id has no effect: the engine is built without a GPU."),
        (tensorrt(layers_precision="[stem*:fp32]"), "layers_precision has no effect: nodes have the precision"),
        ({"tensorrt.calibration.images": "photos"}, "calibration has no effect: the engine is fp32."),
        ({"batch_size": 4, **tensorrt(opt_batch_size=2)}, "opt_batch_size has no effect: gen_trt_engine.batch_size=4"),
    ],
)
def test_options_without_effect_are_reported(request_for, caplog, changes, notice):
    with caplog.at_level(logging.WARNING, "openmae"):
        assert main(["gen_trt_engine", *request_for(**{**tensorrt(data_type="fp32"), **changes})]) == 0
    assert [message for message in caplog.messages if notice in message], f"no notice, but {caplog.messages}"


def test_the_default_data_type_without_a_gpu_is_fp16(request_for, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "openmae"):
        assert main(["gen_trt_engine", *request_for()]) == 0
    (notice,) = caplog.messages
    assert "data_type=fp32,fp16 builds fp16" in notice
    assert json.loads((tmp_path / "out" / "model.engine.json").read_text())["engine"]["data_type"] == "fp16"


def test_the_faster_of_two_engines_is_kept_FAKE_gpu(request_for, tmp_path, monkeypatch, capsys):
    """On a GPU both are built and timed; here the times are made up."""
    backend = choose_backend("tensorrt_rtx", ["sm_89"], 0)
    present = SimpleNamespace(
        **{name: getattr(backend, name) for name in ("name", "module", "targets", "version")}, gpu=0
    )
    monkeypatch.setattr(gen_trt_engine, "choose_backend", lambda *request: present)
    built = []

    def build(onnx_file: Path, backend: Any, settings: Any) -> Built:
        kinds = {tensor.data_type for tensor in onnx.load(onnx_file).graph.initializer}
        built.append("fp16" if TensorProto.FLOAT16 in kinds else "fp32")
        return Built(np.frombuffer(built[-1].encode(), np.uint8), (), (), 1.0)

    seconds = {b"fp32": 0.002, b"fp16": 0.003}
    loaded = lambda data, *_: SimpleNamespace(seconds_per_batch=lambda: seconds[bytes(data)])  # noqa: E731
    monkeypatch.setattr(gen_trt_engine, "build_engine", build)
    monkeypatch.setattr(gen_trt_engine, "LoadedEngine", loaded)
    for expected in ("fp32", "fp16"):
        assert main(["gen_trt_engine", *request_for(overwrite=True)]) == 0
        assert built == ["fp32", "fp16"]
        assert (tmp_path / "out" / "model.engine").read_text() == expected, "the slower engine was kept"
        assert "fp32 2 ms, fp16" in capsys.readouterr().err
        built.clear()
        seconds[b"fp16"] = 0.001


@pytest.mark.parametrize(("error", "code"), [(RunError("It failed."), 1), (KeyboardInterrupt(), 130)])
def test_a_failed_build_keeps_the_old_engine(request_for, tmp_path, monkeypatch, error, code):
    engine = tmp_path / "out" / "model.engine"
    engine.parent.mkdir()
    engine.write_bytes(b"older")

    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(gen_trt_engine, "build_engine", fail)
    assert main(["gen_trt_engine", *request_for(overwrite=True)]) == code
    assert [path.name for path in engine.parent.iterdir()] == ["model.engine"], "something half-written is there"
    assert engine.read_bytes() == b"older"
    assert status(tmp_path)[-1]["status"] == "FAILURE"


def test_invalid_input_writes_nothing(request_for, tmp_path, refused):
    assert "gen_trt_engine.compute_capability: current, or unset" in refused(
        "gen_trt_engine", request_for(compute_capability="[]")
    )
    checkpoint = tmp_path / "model.pth"
    checkpoint.write_bytes(b"PK\x03\x04")
    text = refused("gen_trt_engine", request_for(onnx_file=checkpoint))
    assert f"gen_trt_engine.onnx_file: {checkpoint} is a checkpoint, and engines are built from ONNX." in text
    assert "is the same file as gen_trt_engine.onnx_file" in refused(
        "gen_trt_engine", request_for(trt_engine=tmp_path / "model.onnx")
    )
    assert "must end in .engine, .plan, .trt, got" in refused(
        "gen_trt_engine", request_for(trt_engine=tmp_path / "out" / "model.pth")
    )
    text = refused("gen_trt_engine", request_for(compute_capability="[sm_75, 8.9]", **tensorrt(data_type="BF16")))
    assert "data_type: bf16 needs a GPU of sm_80 or newer, got sm_75." in text
    older = tmp_path / "older.engine"
    older.write_bytes(b"older")
    text = refused("gen_trt_engine", request_for(trt_engine=older))
    assert f"{older} already exists." in text
    assert "gen_trt_engine.overwrite=true" in text
    assert older.read_bytes() == b"older"
    (tmp_path / "file").write_text("no folder")
    text = refused("gen_trt_engine", request_for(trt_engine=tmp_path / "file" / "model.engine"))
    assert "gen_trt_engine.trt_engine: cannot write to" in text
    assert "is a folder" in refused("gen_trt_engine", request_for(trt_engine=tmp_path))
    assert "No node of" in refused("gen_trt_engine", request_for(**tensorrt(layers_precision="[head:fp32]")))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "results" / "gen_trt_engine" / "experiment.yaml").exists()
