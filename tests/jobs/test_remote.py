"""Jobs whose data and results are in an object store: a local S3 server."""

from __future__ import annotations

import csv
import json
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.job_records import make_record
from tests.helpers.platform_contract import RunCode, Submit, until

from openmae.errors import CheckpointError, DataError
from openmae.jobs import Client, Job
from openmae.jobs.artifacts import list_folder, read_text
from openmae.jobs.parameters import fill, merge
from openmae.quickstart import HELD_OUT, write_digits
from openmae.storage.filesystem import open_filesystem

pytestmark = pytest.mark.integration

pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with suppress(OSError):
            urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
            return True
        return False

    try:
        until(answers, "the start of the S3 server")
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in (
        ("ACCESS_KEY_ID", "k"),
        ("SECRET_ACCESS_KEY", "s"),
        ("ENDPOINT_URL", server),
        ("REGION", "eu-central-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    filesystem = open_filesystem("s3://results")
    if not filesystem.exists("s3://results"):
        filesystem.mkdir("s3://results")
    return "s3://results"


def _put(url: str, text: str = "x") -> None:
    open_filesystem(url).pipe_file(url, text.encode())


def test_the_model_of_a_child_is_chosen_in_the_store(bucket: str) -> None:
    folder = f"{bucket}/one/train"
    for name in ("model_epoch_002_step_00010.pth", "model_epoch_010_step_00002.pth", "backbone.safetensors"):
        _put(f"{folder}/{name}")
    _put(f"{folder}/experiment.yaml", "train: {stage: finetune}\nmodel: {arch: vit_tiny_patch16, num_classes: 3}\n")
    filled = merge("evaluate")
    fill(filled, make_record("p1", ("COMPLETE",), results_folder=folder), "/own")
    assert filled.values["evaluate.checkpoint"] == f"{folder}/model_epoch_010_step_00002.pth"
    assert filled.values["model.num_classes"] == 3
    _put(f"{folder}/model_best.pth")
    again = merge("evaluate")
    fill(again, make_record("p1", ("COMPLETE",), results_folder=folder), "/own")
    assert again.values["evaluate.checkpoint"] == f"{folder}/model_best.pth"


def test_an_empty_folder_in_the_store_is_named(bucket: str) -> None:
    assert list_folder(f"{bucket}/nothing") == []
    assert read_text(f"{bucket}/nothing/status.json") is None
    with pytest.raises(CheckpointError, match=r"has no checkpoint \(\.pth\)\. It is empty\."):
        fill(merge("export"), make_record("p1", ("ERROR",), results_folder=f"{bucket}/nothing"), "/own")


def test_a_store_that_cannot_be_reached_is_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"s3://results/one"):
        list_folder(f"{bucket}/one")


def test_results_in_the_store_are_listed_analysed_and_deleted(
    bucket: str, client: Client, submit: Submit, run_code: RunCode, tmp_path: Path
) -> None:
    run_code("raise SystemExit(1)")
    job = client.wait(submit(spec_overrides={"results_dir": str(tmp_path / "out")}).id, 20)
    folder = f"{bucket}/two/train"
    with client.store.update(job.id) as record:
        record.results_folder = folder
    when = datetime.now()
    line: dict[str, Any] = {"date": f"{when.month}/{when.day}/{when.year}", "time": f"{when:%H:%M:%S}"}
    line |= {"status": "FAILURE", "message": "DataError: an image is broken"}
    _put(f"{folder}/status.json", json.dumps(line) + "\n")
    _put(f"{folder}/model_best.pth")
    _put(f"{folder}/notes.txt")
    failure = client.get_failure_analysis(job.id)
    assert failure is not None
    assert (failure.category, failure.error) == ("data", "DataError: an image is broken")
    assert {item.name: item.size for item in client.list_results(job.id)}["model_best.pth"] == 1
    assert {item.name for item in client.delete_job_artifacts(job.id)} == {"status.json", "model_best.pth"}
    assert [item.name for item in client.list_results(job.id)] == ["notes.txt"]


def test_a_data_source_in_the_store_is_checked(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from openmae.jobs.prepare import check_sources
    from openmae.spec.schema import ExperimentSpec

    spec = ExperimentSpec().replaced({"dataset.train_data_sources": f"{bucket}/images_train.tar.gz"})
    with pytest.raises(DataError, match=r"dataset.train_data_sources: There is nothing at s3://results/images_train"):
        check_sources(spec, "train")
    _put(f"{bucket}/images_train.tar.gz")
    check_sources(spec, "train")


def _upload(bucket: str, folder: Path, part: str, name: str) -> str:
    archive = shutil.make_archive(str(folder.parent / name), "gztar", folder)
    url = f"{bucket}/data/{part}/{name}.tar.gz"
    open_filesystem(bucket).put_file(archive, url)
    return url


@pytest.mark.slow  # five processes, one after another, that import torch
def test_a_chain_from_a_store_to_a_store(bucket: str, client: Client, tmp_path: Path) -> None:
    """Run train, evaluate, export, gen_trt_engine and inference on the digits of quickstart; no child names a model.

    The engine only runs on the GPU that it is built for, so inference is a child of the export.
    """
    pytest.importorskip("tensorrt_rtx", reason="builds the engine")
    write_digits(tmp_path / "digits")
    train_url = _upload(bucket, tmp_path / "digits/labelled", "train", "images_train")
    val_url = _upload(bucket, tmp_path / "digits/held_out", "eval", "images_val")
    test_url = _upload(bucket, tmp_path / "digits/held_out", "test", "images_test")
    results = {"results_dir": f"{bucket}/chain", "dataset.num_workers_per_gpu": 0}

    def run(action: str, parent: Job | None = None, **typed: Any) -> Job:
        specs, policy = typed.pop("specs", None), "off" if action == "train" else None
        job = client.create_job(action, specs, {**results, **typed}, parent.id if parent else None, policy)
        done = client.wait(job.id, 240)
        assert done.status == "COMPLETE", client.get_job_logs(job.id)
        assert done.results_folder == f"{bucket}/chain/{action}"
        return done

    def told(job: Job, key: str) -> tuple[Any, str]:
        return next((row["value"], row["function"]) for row in client.explain_job(job.id) if row["key"] == key)

    specs = {
        "model": {"patch_size": 8, "in_chans": 1},
        "dataset": {"augmentation": {"hflip": 0.0, "auto_aug": "", "mixup": 0.0, "cutmix": 0.0}},
        "train": {"optim": {"warmup_epochs": 1}, "validation_interval": 12},
        "wandb": {"enable": False},
    }
    data = {"dataset.train_data_sources": train_url, "dataset.val_data_sources": val_url}
    short = {"arch": "vit_tiny_patch16", "image_size": 32, "stage": "finetune", "num_epochs": 24, "batch_size": 10}
    train = run("train", specs=specs, **short, **data, learning_rate=5e-4)
    evaluate = run("evaluate", train, **{"dataset.val_data_sources": val_url})
    export = run("export", train)
    engine = run("gen_trt_engine", export, **{"gen_trt_engine.compute_capability": ["sm_89"]})
    inference = run("inference", export, **{"dataset.test_data_sources": test_url})

    best = f"{bucket}/chain/train/model_best.pth"
    onnx = f"{bucket}/chain/export/model.onnx"
    assert told(evaluate, "evaluate.checkpoint") == told(export, "export.checkpoint") == (best, "parent_model")
    assert told(export, "export.onnx_file") == (onnx, "create_onnx_file")
    assert told(engine, "gen_trt_engine.onnx_file") == told(inference, "inference.trt_engine") == (onnx, "parent_model")
    assert told(inference, "inference.checkpoint") == (None, "parent_model")
    assert told(inference, "model.arch") == ("vit_tiny_patch16", "carried")
    assert {"engine", "status", "report"} <= {item.kind for item in client.list_results(engine.id)}

    lines = (read_text(f"{evaluate.results_folder}/status.json") or "").splitlines()
    (accuracy,) = {line["kpi"]["ACC_all"] for line in map(json.loads, lines) if "ACC_all" in line.get("kpi", {})}
    rows = list(csv.DictReader((read_text(f"{inference.results_folder}/results.csv") or "").splitlines()))
    right = sum(Path(row["path"]).parent.name == row["class"] for row in rows)
    assert len(rows) == HELD_OUT
    assert accuracy > 0.15, f"{accuracy}: that is chance for ten classes"
    assert abs(right / HELD_OUT - accuracy) <= 2 / HELD_OUT, "inference used another model than evaluate"
