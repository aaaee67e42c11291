"""``encryption_key``: what an action writes is encrypted, the next one opens it, and the key is found nowhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

import openmae
from openmae.actions.sections import running_example
from openmae.cli.main import main
from openmae.engines.onnx import read_onnx_card, writing
from openmae.engines.precision import to_int8
from openmae.engines.tensorrt.source import in_precision, read_source
from openmae.errors import CheckpointError, SpecError
from openmae.results.status import read_status
from openmae.storage import encryption
from openmae.storage.atomic import write_atomically
from openmae.storage.encryption import Key, is_encrypted, read_bytes

from .conftest import Photos, paint, train_arguments

pytestmark = pytest.mark.xdist_group("actions")

KEY = "hunter2-is-no-good-key"
MODELS = (".pth", ".safetensors", ".onnx", ".engine")


def models_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in MODELS and not path.is_symlink())


def assert_nowhere(folder: Path, *texts: str) -> None:
    for path in folder.rglob("*"):
        assert KEY not in str(path)
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), f"the key stands in {path}"
    for text in texts:
        assert KEY not in text, "the key was shown"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, photos: Photos) -> Path:
    """Train an epoch with the key itself in the command, and export in int8; returns the results folder."""
    root = tmp_path_factory.mktemp("encrypted")
    key = f"encryption_key={KEY}"
    overrides = [*train_arguments(photos, "vit", "finetune"), f"results_dir={root}", key]
    shown: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openmae.actions.train.open_wandb", lambda *settings: shown.update(settings=settings))
        assert main(["train", *overrides]) == 0
    assert "encryption_key" in shown["settings"][2], "the configuration that Weights & Biases shows has the key's mark"
    assert KEY not in repr(shown)
    checkpoint = root / "train" / "model_best.pth"
    export = [f"export.checkpoint={checkpoint}", f"export.onnx_file={root / 'model.onnx'}", "export.quantize=int8"]
    export += [f"export.calibration.images={photos.plain}", "export.calibration.count=4"]
    folders: list[str] = []  # where what int8 is made with is written; they are gone afterwards

    def noting(*given: Any) -> ModelProto:
        folders.append(tempfile.gettempdir())
        return to_int8(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openmae.actions.export.to_int8", noting)
        assert main(["export", *export, f"results_dir={root}", key]) == 0
    assert folders[0].startswith("/dev/shm/"), "its temporary files are in memory"
    assert not Path(folders[0]).exists()
    return root


def test_models_are_encrypted_and_the_key_is_not_stored(chain, photos, tmp_path, capsys):
    key = f"encryption_key={KEY}"
    evaluate = ["evaluate", f"dataset.val_data_sources={photos.val}", f"results_dir={chain}", key]
    assert main([*evaluate, f"evaluate.checkpoint={chain / 'train' / 'model_best.pth'}"]) == 0
    found = models_in(chain)
    assert {path.name for path in found} >= {"model_best.pth", "backbone.safetensors", "model.onnx"}
    assert len(found) == 5, found
    assert [path for path in found if not is_encrypted(path)] == []
    assert_nowhere(chain, *capsys.readouterr())
    for action in ("train", "export", "evaluate"):
        assert "encryption_key: '***'" in (chain / action / "experiment.yaml").read_text()
    checkpoint = torch.load(
        encryption.unlocked(chain / "train" / "model_best.pth", Key(KEY.encode())), weights_only=True
    )
    assert checkpoint["openmae"]["spec"]["encryption_key"] == "***"
    assert KEY not in repr(checkpoint)


def test_a_literal_key_is_a_notice_and_does_not_load_back(chain, photos, capsys):
    assert main(["spec", "check", "dataset.train_data_sources=a", f"encryption_key={KEY}"]) == 0
    out, err = capsys.readouterr()
    assert "encryption_key: '***'" in out
    assert "Notice: encryption_key contains the key itself" in err
    assert "Use env:NAME or file:PATH." in err
    assert_nowhere(chain / "no", out, err)
    assert main(["train", "-e", str(chain / "train" / "experiment.yaml")]) == 2
    err = capsys.readouterr().err
    assert "encryption_key (line " in err
    assert "*** stands for a key that was not recorded. Set encryption_key to env:NAME, file:PATH or the key." in err


def test_without_the_key_and_with_another(chain, photos, refused):
    sources = [f"dataset.val_data_sources={photos.val}", f"results_dir={chain / 'refused'}"]
    for key, file in (("evaluate.checkpoint", "train/model_best.pth"), ("evaluate.trt_engine", "model.onnx")):
        path = chain / file
        text = refused("evaluate", [*sources, f"{key}={path}"])
        assert f"{key}: {path} is encrypted, but encryption_key is not set." in text
        assert "Fix: Set encryption_key to the key that it was written with" in text
        text = refused("evaluate", [*sources, f"{key}={path}", "encryption_key=another"])
        assert f"{key}: {path} cannot be decrypted: encryption_key is not the key" in text
    text = refused("export", [f"export.checkpoint={chain / 'train/backbone.safetensors'}", "export.onnx_file=a.onnx"])
    assert "is encrypted, but encryption_key is not set" in text
    text = refused(
        "gen_trt_engine", [f"gen_trt_engine.onnx_file={chain / 'model.onnx'}", "gen_trt_engine.trt_engine=e.engine"]
    )
    assert "gen_trt_engine.onnx_file: " in text
    assert "is encrypted, but encryption_key is not set" in text
    overrides = [*train_arguments(photos, "vit", "finetune"), f"results_dir={chain}", "train.num_epochs=2"]
    assert "results_dir: " in (text := refused("train", overrides))
    assert "is encrypted, but encryption_key is not set" in text


def test_a_missing_key_is_named_before_anything_is_done(photos, tmp_path, refused):
    overrides = [*train_arguments(photos, "vit", "finetune"), f"results_dir={tmp_path}", "encryption_key=env:NO_KEY"]
    assert "encryption_key: the environment variable 'NO_KEY' is not set." in refused("train", overrides)
    assert models_in(tmp_path) == []
    assert "'NO_KEY' is not set" in read_status(tmp_path / "train" / "status.json")[-1]["message"]


def test_encrypted_checkpoints_resume_and_initialise(chain, photos, tmp_path, monkeypatch, capsys):
    """By a reference: a second epoch of an encrypted run, and another run with its weights."""
    monkeypatch.setenv("MY_KEY", KEY)
    (tmp_path / "train").mkdir()
    shutil.copy(chain / "train" / "model_epoch_001_step_00003.pth", tmp_path / "train")
    common = [*train_arguments(photos, "vit", "finetune"), "encryption_key=env:MY_KEY"]
    assert main(["train", *common, f"results_dir={tmp_path}", "train.num_epochs=2"]) == 0
    assert "Resuming from" in capsys.readouterr().err
    assert "encryption_key: env:MY_KEY" in (tmp_path / "train" / "experiment.yaml").read_text()
    weights = f"train.pretrained_model_path={chain / 'train' / 'backbone.safetensors'}"
    assert main(["train", *common, f"results_dir={tmp_path / 'next'}", weights]) == 0
    out, err = capsys.readouterr()
    assert "loaded 100 % of " in (tmp_path / "next" / "train" / "report.html").read_text()
    assert "encryption_key contains the key itself" not in err, "a reference is no secret"
    assert all(map(is_encrypted, models_in(tmp_path)))
    assert_nowhere(tmp_path, out, err)


@contextmanager
def processes_watched() -> Iterator[list[str]]:
    """The command lines of the processes that ran meanwhile."""
    seen: set[bytes] = set()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(path.read_bytes())
                except OSError:  # it has ended
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    lines: list[str] = []
    try:
        yield lines
    finally:
        done.set()
        thread.join()
        lines += [line.replace(b"\0", b" ").decode(errors="replace") for line in seen]


@pytest.mark.slow  # each process imports torch and ONNX Runtime anew: 20 s
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no list of processes to look at")
def test_two_processes_get_the_key_and_no_command_line_shows_it(chain, photos, tmp_path, capsys):
    """Each opens the ONNX file by itself."""
    overrides = [f"dataset.val_data_sources={photos.val}", f"results_dir={tmp_path}", "evaluate.num_gpus=2"]
    with processes_watched() as lines:
        code = main(["evaluate", *overrides, f"evaluate.trt_engine={chain / 'model.onnx'}", f"encryption_key={KEY}"])
    assert code == 0
    assert [line for line in lines if "spawn_main" in line], "there were other processes"
    assert [line for line in lines if KEY in line] == []
    assert_nowhere(tmp_path, *capsys.readouterr())


def test_the_command_line_is_not_recorded(photos, tmp_path, monkeypatch, capsys):
    """Weights & Biases, and whoever asks Python, reads sys.argv."""
    monkeypatch.setattr(sys, "argv", ["mae", "evaluate", f"encryption_key={KEY}", "encryption_key=env:NO_KEY"])
    assert main() == 2
    assert sys.argv[2:] == ["encryption_key=***", "encryption_key=env:NO_KEY"]
    assert_nowhere(tmp_path, *capsys.readouterr())


def test_a_bug_in_openmae_does_not_show_the_key(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(spec: object, *rest: object, **options: object) -> None:
        raise RuntimeError(f"a fault with {spec!r}")

    monkeypatch.setattr("openmae.actions.train.make_plan", fail)
    overrides = [*train_arguments(photos, "vit", "finetune"), f"results_dir={tmp_path}", f"encryption_key={KEY}"]
    assert main(["train", *overrides]) == 1
    assert len(list(tmp_path.glob("mae-traceback-*.txt"))) == 1
    assert_nowhere(tmp_path, *capsys.readouterr())


def test_the_python_api_decrypts(chain, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", KEY)
    write_atomically(tmp_path / "key", KEY + "\n")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    files = ("train/model_best.pth", "train/backbone.safetensors", "model.onnx")
    logits = [openmae.open_predictor(chain / file, encryption_key="env:MY_KEY")(images)["logits"] for file in files]
    assert torch.equal(logits[0], logits[1])
    assert logits[2].shape == (2, 3)
    for file in files[:2]:
        backbone = openmae.load_backbone(chain / file, encryption_key=f"file:{tmp_path / 'key'}")
        assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
        with pytest.raises(CheckpointError, match="is encrypted, but encryption_key is not set"):
            openmae.load_backbone(chain / file)
    with pytest.raises(SpecError, match="'NO_KEY' is not set"):
        openmae.load_backbone(chain / files[0], encryption_key="env:NO_KEY")


def test_an_engine_of_an_encrypted_file(chain, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("MY_KEY", KEY)
    common = ["encryption_key=env:MY_KEY", f"results_dir={tmp_path}"]
    engine = tmp_path / "model.engine"
    build = [f"gen_trt_engine.onnx_file={chain / 'model.onnx'}", f"gen_trt_engine.trt_engine={engine}"]
    build += ["gen_trt_engine.compute_capability=[sm_80]", "gen_trt_engine.tensorrt.data_type=int8"]
    assert main(["gen_trt_engine", *build, *common]) == 0
    assert models_in(tmp_path) == [engine]
    assert is_encrypted(engine)
    described = json.loads((tmp_path / "model.engine.json").read_text())
    plain = read_bytes(engine, Key(KEY.encode()))
    assert hashlib.sha256(plain).hexdigest() == described["engine"]["engine_sha256"]
    assert_nowhere(tmp_path, *capsys.readouterr())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match="needs a CUDA GPU"):  # which is asked for once the engine has opened
        openmae.open_predictor(engine, encryption_key="env:MY_KEY")
    with pytest.raises(CheckpointError, match="cannot be decrypted"):
        openmae.open_predictor(engine, encryption_key="another")


def linear_graph() -> ModelProto:
    weight = numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], "g", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_an_encrypted_graph_in_another_precision_is_in_no_file(tmp_path):
    key, proto = Key(b"x"), linear_graph()
    with writing(proto, tmp_path / "model.onnx", key):
        pass
    source = read_source(tmp_path / "model.onnx", key)
    for precision, kind in (("fp32", TensorProto.FLOAT), ("fp16", TensorProto.FLOAT16)):
        with in_precision(source, precision, (), (), tmp_path) as graph:
            assert isinstance(graph, bytes)
            assert onnx.load_from_string(graph).graph.initializer[0].data_type == kind
            assert os.listdir(tmp_path) == ["model.onnx"]


def test_the_script_of_the_report_decrypts(chain, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NAME", KEY)
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "image.jpg", (200, 30, 30), 1)
    assert "read_bytes(&#39;model.onnx&#39;" in (chain / "export" / "report.html").read_text()
    card = read_onnx_card(chain / "model.onnx", Key(KEY.encode()))
    exec(running_example(card, str(chain / "model.onnx"), encrypted=True), {})
    assert capsys.readouterr().out.strip() in card.class_names


def test_external_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("openmae.engines.onnx.LARGEST_PROTOBUF", 4)
    with pytest.raises(SpecError, match="which have their weights in a second file, cannot be encrypted"):
        writing(linear_graph(), tmp_path / "model.onnx", Key(b"x")).__enter__()
    assert os.listdir(tmp_path) == []


def test_serve_takes_no_key_itself(chain, capsys):
    assert main(["serve", "-m", str(chain / "model.onnx"), "--encryption-key", KEY]) == 2
    out, err = capsys.readouterr()
    assert "--encryption-key takes env:NAME or file:PATH, not the key" in err
    assert_nowhere(chain, out, err)
    assert main(["serve", "-m", str(chain / "model.onnx"), "--port", "0"]) == 2
    assert "is encrypted, but encryption_key is not set" in capsys.readouterr().err
