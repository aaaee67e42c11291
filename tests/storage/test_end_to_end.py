"""Actions with data and results in an S3 store, configured by the command line and environment variables."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from openmae.actions.staging import local_place
from openmae.cli.main import main
from openmae.errors import SpecError
from openmae.spec.load import load_spec, to_yaml
from openmae.storage import cache
from openmae.storage.lock import StoreLock

pytestmark = pytest.mark.integration

SMALL = (
    *("model.arch=vit_tiny_patch16", "dataset.augmentation.input_size=32", "model.decoder_depth=1"),
    *("model.decoder_embed_dim=32", "dataset.batch_size=4", "dataset.num_workers_per_gpu=0", "wandb.enable=false"),
)


def images(classes: tuple[str, ...] = ("",), count: int = 8) -> dict[str, bytes]:
    files = {}
    for place, name in enumerate(classes):
        for number in range(count):
            noise = np.random.default_rng([place, number]).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(noise).save(buffer, "PNG")
            files[f"{name}/{number}.png".lstrip("/")] = buffer.getvalue()
    return files


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def statuses(content: bytes) -> list[str]:
    return [json.loads(line)["status"] for line in content.splitlines()]


def train_arguments(bucket: str) -> list[str]:
    return [
        *("train", *SMALL, f"dataset.train_data_sources=s3://{bucket}/data/train/images_train.tar.gz"),
        *(f"results_dir=s3://{bucket}/results/run1", "train.keep_checkpoints=1"),
    ]


def checkpoints(store, bucket: str) -> list[str]:
    below = "results/run1/train/model_epoch_"
    return [name.removeprefix(below)[:3] for name in store.names(bucket) if name.startswith(below)]


def put_data(store, bucket: str) -> None:
    store.put(bucket, {"data/train/images_train.tar.gz": tar_gz(images())})
    store.put(bucket, {f"data/val/{name}": content for name, content in images(("a", "b"), 4).items()})


@pytest.fixture(scope="module")
def snapshot() -> dict[str, bytes]:
    """The results of one epoch of pretraining, by the first test that needs them."""
    return {}


@pytest.fixture
def trained(store, bucket, capfd, snapshot):
    """Put results of one epoch of pretraining into the store, and return their URL."""
    put_data(store, bucket)
    if snapshot:
        store.put(bucket, snapshot)
    else:
        assert main([*train_arguments(bucket), "train.num_epochs=1"]) == 0, capfd.readouterr().err
        snapshot |= {name: store.get(bucket, name) for name in store.names(bucket) if name.startswith("results/")}
    return f"s3://{bucket}/results/run1"


def test_train_and_evaluate_in_a_store(store, bucket, capfd, monkeypatch):
    put_data(store, bucket)
    assert main([*train_arguments(bucket), "train.num_epochs=1"]) == 0
    trained = f"s3://{bucket}/results/run1"
    assert f"Results are in {trained}/train; open report.html there." in capfd.readouterr().err
    below, names = "results/run1/train/", store.names(bucket)
    assert checkpoints(store, bucket) == ["001"]
    for name in ("model_best.pth", "vit_tiny_patch16_latest.pth", "backbone.safetensors", "report.html", "metrics.csv"):
        assert below + name in names
    assert not [name for name in names if "/." in name], "no temporary or hidden file is uploaded"
    assert statuses(store.get(bucket, f"{below}status.json"))[-1] == "SUCCESS"
    spec = store.get(bucket, f"{below}experiment.yaml").decode()
    assert f"results_dir: {trained}" in spec
    assert f"train_data_sources: s3://{bucket}/data/train/images_train.tar.gz" in spec
    newest = next(name for name in names if "model_epoch_" in name)
    assert store.get(bucket, f"{below}vit_tiny_patch16_latest.pth") == store.get(bucket, newest)

    checkpoint = f"{trained}/train/model_best.pth"
    evaluate = ["evaluate", f"evaluate.checkpoint={checkpoint}", f"dataset.val_data_sources=s3://{bucket}/data/val"]
    monkeypatch.setenv("OPENMAE_UPLOAD_EXCLUDES", "report.*, wandb/*")
    assert main([*evaluate, f"results_dir={trained}", "dataset.num_workers_per_gpu=0"]) == 0, capfd.readouterr().err
    assert "results/run1/evaluate/report.html" not in store.names(bucket), "OPENMAE_UPLOAD_EXCLUDES has no effect"
    last = store.get(bucket, "results/run1/evaluate/status.json").splitlines()[-2]
    assert "val_loss" in json.loads(last)["kpi"]
    assert f"checkpoint: {checkpoint}" in store.get(bucket, "results/run1/evaluate/experiment.yaml").decode()
    assert all(entry.complete and not entry.in_use for entry in cache.entries()), (
        "an entry is still held, or incomplete"
    )


def test_encrypted_results_in_a_store(store, bucket, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "c0rrect-h0rse")
    monkeypatch.setenv("WRONG_KEY", "another")
    put_data(store, bucket)
    train = [*train_arguments(bucket), "train.num_epochs=1"]
    assert main([*train, "encryption_key=env:MY_KEY"]) == 0, capfd.readouterr().err
    written = {name: store.get(bucket, name) for name in store.names(bucket) if name.startswith("results/")}
    models = [name for name in written if name.endswith((".pth", ".safetensors"))]
    assert len(models) == 4, models
    assert [name for name in models if not written[name].startswith(b"\x89OpenMAE-crypt")] == []
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [1 for content in (*written.values(), *kept) if b"c0rrect-h0rse" in content]

    checkpoint = f"s3://{bucket}/results/run1/train/model_best.pth"
    commands = {
        "train": [*train, "train.num_epochs=2"],
        "evaluate": [
            "evaluate",
            f"evaluate.checkpoint={checkpoint}",
            f"dataset.val_data_sources=s3://{bucket}/data/val",
        ],
        "inference": [
            *("inference", f"inference.checkpoint={checkpoint}", f"dataset.test_data_sources=s3://{bucket}/data/val"),
        ],
        "export": ["export", f"export.checkpoint={checkpoint}", f"export.onnx_file=s3://{bucket}/m.onnx"],
    }
    capfd.readouterr()
    for action, command in commands.items():
        results = [] if action == "train" else [f"results_dir={tmp_path / action}"]
        assert main([*command, *results]) == 2, action
        assert "is encrypted, but encryption_key is not set" in capfd.readouterr().err
        assert main([*command, *results, "encryption_key=env:WRONG_KEY"]) == 2, action
        assert "cannot be decrypted: encryption_key is not the key" in capfd.readouterr().err
    assert store.get(bucket, "results/run1/train/model_best.pth") == written["results/run1/train/model_best.pth"]
    assert main([*commands["evaluate"], f"results_dir={tmp_path}", "encryption_key=env:MY_KEY"]) == 0


@pytest.mark.slow  # half a minute: two training runs and an export
def test_resume_on_another_machine_and_export_in_a_store(trained, store, bucket, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "another"))
    assert main([*train_arguments(bucket), "train.num_epochs=2"]) == 0, capfd.readouterr().err
    assert "after epoch 1" in capfd.readouterr().err
    assert checkpoints(store, bucket) == ["002"]
    lines = statuses(store.get(bucket, "results/run1/train/status.json"))
    assert lines.count("SUCCESS") == 2, "earlier lines are lost"

    onnx, checkpoint = f"{trained}/export/model.onnx", f"{trained}/train/model_best.pth"
    export = ["export", f"export.checkpoint={checkpoint}", f"export.onnx_file={onnx}", f"results_dir={trained}"]
    assert main(export) == 0, capfd.readouterr().err
    assert "results/run1/export/model.onnx" in store.names(bucket)
    assert main(export) == 2
    assert f"export.onnx_file: {onnx} already exists" in capfd.readouterr().err
    elsewhere = f"s3://{bucket}/models/m.onnx"
    assert main([*export[:2], f"export.onnx_file={elsewhere}", f"results_dir={tmp_path / 'here'}"]) == 0
    assert store.get(bucket, "models/m.onnx") == store.get(bucket, "results/run1/export/model.onnx")
    inference = ["inference", f"inference.checkpoint={elsewhere}", f"dataset.test_data_sources=s3://{bucket}/data/val/"]
    assert main([*inference, f"results_dir={tmp_path / 'here'}", "dataset.num_workers_per_gpu=0"]) == 0
    assert (tmp_path / "here" / "inference" / "embeddings.parquet").exists()
    assert all(entry.complete and not entry.in_use for entry in cache.entries()), (
        "an entry is still held, or incomplete"
    )


@pytest.mark.parametrize("readable", [True, False], ids=["an older one is readable", "none is readable"])
def test_unreadable_newest_checkpoint_in_a_store(readable, trained, store, bucket, capfd, monkeypatch, tmp_path):
    """A checkpoint that was set aside is not brought to the next machine either."""
    below = "results/run1/train/model_epoch_"
    (first,) = (name for name in store.names(bucket) if name.startswith(below))
    content = store.get(bucket, first)
    store.put(bucket, {first.replace("_001_", "_002_"): content[:5000]})
    if not readable:
        store.put(bucket, {first: content[:4000], "results/run1/train/model_best.pth": content[:4000]})
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "another"))
    code = main([*train_arguments(bucket), "train.num_epochs=2"])
    told = capfd.readouterr().err
    if readable:
        assert code == 0, told
        assert re.search(r"model_epoch_002\S+ cannot be read: it is now \S+\.unreadable, and model_epoch_001", told), (
            told
        )
        assert "after epoch 1" in told
        left = [name.removeprefix(below) for name in store.names(bucket) if name.startswith(below)]
        assert left == ["002_step_00002.pth.unreadable", "002_step_00004.pth"]
        monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "a third"))
        assert main([*train_arguments(bucket), "train.num_epochs=2"]) == 0
        assert not list((tmp_path / "a third").rglob("*.unreadable"))
    else:
        assert code == 2, told
        assert re.search(r"model_epoch_002\S+ is truncated or damaged", told), told
        assert checkpoints(store, bucket) == ["001", "002"], "a checkpoint was removed"


def test_newest_checkpoint_in_a_store_that_is_not_finite(trained, store, bucket, capfd, monkeypatch, tmp_path):
    """Written by an older version: the numbered checkpoint is set aside in the store too, and the best replaces it."""
    below = "results/run1/train/model_epoch_"
    (first,) = (name for name in store.names(bucket) if name.startswith(below))
    content = torch.load(io.BytesIO(store.get(bucket, first)), weights_only=True)
    for value in content["state_dict"].values():
        value.fill_(float("nan"))
    broken = io.BytesIO()
    torch.save(content, broken)
    store.put(bucket, {first: broken.getvalue()})
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "another"))
    assert main([*train_arguments(bucket), "train.num_epochs=2"]) == 0
    told = capfd.readouterr().err
    assert re.search(r"model_epoch_001\S+ holds weights that are not finite: it is now \S+\.diverged", told), told
    assert re.search(r"Resuming from \S+/model_best\.pth, after epoch 1", told), told
    left = [name.removeprefix(below) for name in store.names(bucket) if name.startswith(below)]
    assert left == ["001_step_00002.pth.diverged", "002_step_00004.pth"]


def test_a_second_run_in_a_store_is_refused(trained, store, bucket, capfd):
    with StoreLock(f"s3://{bucket}/results/run1/train", "results_dir", lambda error: None):
        assert main([*train_arguments(bucket), "train.num_epochs=2"]) == 2
    told = capfd.readouterr().err
    assert f"results_dir: another run is writing to s3://{bucket}/results/run1/train: process {os.getpid()} on " in told


@pytest.mark.slow  # a minute: one process is interrupted, another killed, a third resumes
def test_interrupted_and_killed_runs_resume(store, bucket, tmp_path):
    store.put(bucket, {"data/train/images_train.tar.gz": tar_gz(images(count=16))})
    command = [
        sys.executable,
        "-m",
        "openmae",
        *train_arguments(bucket),
        "train.num_epochs=1000",
        "train.checkpoint_interval=5",
    ]

    def sent() -> set[str]:
        # not asked of the store: moto reckons an ETag at the first listing, wrongly if another request comes then
        records = (tmp_path / "cache" / "results").glob("*/train/.openmae-uploaded.json")
        return set(re.findall(r"model_epoch_\d+", "".join(record.read_text() for record in records)))

    def until_checkpoint(signal_number: int) -> str:
        before = sent()
        log = (tmp_path / f"log{signal_number}.txt").open("w+")
        run = subprocess.Popen(command, stderr=log)
        deadline = time.monotonic() + 90
        while not sent() - before:
            assert run.poll() is None, (tmp_path / f"log{signal_number}.txt").read_text()
            assert time.monotonic() < deadline, "no checkpoint is uploaded while the run goes on"
            time.sleep(0.2)
        run.send_signal(signal_number)
        run.wait(timeout=90)
        return (tmp_path / f"log{signal_number}.txt").read_text()

    assert "Interrupted." in until_checkpoint(signal.SIGINT)
    assert statuses(store.get(bucket, "results/run1/train/status.json"))[-1] == "FAILURE"
    (newest,) = checkpoints(store, bucket)
    until_checkpoint(signal.SIGKILL)
    (entry,) = [entry for entry in cache.entries() if entry.kind == "results"]
    assert not entry.complete, "the results of the killed run may be deleted"
    assert not entry.in_use
    assert "Resuming from" in until_checkpoint(signal.SIGINT)
    assert max(checkpoints(store, bucket)) > newest


def test_the_recorded_spec_has_no_secret(store, tmp_path):
    source = "https://user:hunter2@host/set.zip?X-Signature=topsecret"
    spec = load_spec(None, [f"dataset.train_data_sources={source}", f"results_dir={tmp_path}"], "train")
    with local_place(spec, "train") as place:
        assert place.spec.dataset.train_data_sources == source
        text = to_yaml(place.spec)
    assert "train_data_sources: https://host/set.zip?..." in text
    assert "hunter2" not in text
    assert "topsecret" not in text


def test_other_nodes_download_the_newest_checkpoint_and_the_final_files(trained, bucket):
    spec = load_spec(None, train_arguments(bucket)[1:], "train")
    with local_place(spec, "train", leads=False) as place:
        names = {path.name for path in place.folder.iterdir() if not path.name.startswith(".")}
    assert names == {"model_epoch_001_step_00002.pth", "backbone.safetensors", "report.html"}
    assert not place.folder.exists()


@pytest.mark.parametrize(
    ("action", "reads", "writes"),
    [("export", "checkpoint", "onnx_file"), ("gen_trt_engine", "onnx_file", "trt_engine")],
)
def test_a_model_in_a_store_is_only_replaced_if_asked(action, reads, writes, store, bucket, tmp_path):
    store.put(bucket, {"model": b"earlier"})
    values = [f"results_dir={tmp_path}", f"{action}.{reads}=x.onnx", f"{action}.{writes}=s3://{bucket}/model"]
    asked = rf"{action}\.{writes}: s3://{bucket}/model already exists\.\n  Fix: Pass {action}\.overwrite=true"
    with pytest.raises(SpecError, match=asked):
        local_place(load_spec(None, values, action), action).__enter__()
    with local_place(load_spec(None, [*values, f"{action}.overwrite=true"], action), action):
        pass


@pytest.mark.slow  # half a minute: two processes import torch
def test_two_processes_share_one_download(store, bucket, capfd, tmp_path):
    store.put(bucket, {"set.tar.gz": tar_gz(images())})
    arguments = [*SMALL, f"dataset.train_data_sources=s3://{bucket}/set.tar.gz", f"results_dir={tmp_path}"]
    assert main(["train", *arguments, "train.num_epochs=1", "train.num_gpus=2", "dataset.batch_size=2"]) == 0
    assert capfd.readouterr().err.count("Downloading s3://") == 1


@pytest.mark.parametrize(
    ("key", "command"),
    [
        ("dataset.train_data_sources", ["train"]),
        ("train.pretrained_model_path", ["train", "dataset.train_data_sources=."]),
        ("results_dir", ["train", "dataset.train_data_sources=."]),
        ("evaluate.checkpoint", ["evaluate", "dataset.val_data_sources=."]),
        ("gen_trt_engine.onnx_file", ["gen_trt_engine", "gen_trt_engine.trt_engine=m.engine"]),
        ("export.onnx_file", ["export", "export.checkpoint=m.pth"]),
    ],
)
def test_a_wrong_bucket_is_reported_with_the_config_key(key, command, store, capfd, tmp_path):
    results = [] if key == "results_dir" else [f"results_dir={tmp_path}"]
    assert main([*command, *results, f"{key}=s3://nobody-has-this/x.onnx"]) == 2
    err = capfd.readouterr().err
    assert f"{key}: s3://nobody-has-this/x.onnx" in err
    assert "there is no bucket 'nobody-has-this'" in err
    assert "Check the bucket's name and AWS_ENDPOINT_URL" in err
