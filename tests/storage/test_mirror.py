from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from openmae.errors import DataError, RunError, StoppedAtOnce
from openmae.storage import mirror as mirror_module
from openmae.storage.mirror import Mirror, pull

pytestmark = pytest.mark.integration


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    (path / "status.json").write_text("started\n")
    return path


@pytest.fixture
def quick(monkeypatch) -> None:
    for name in ("_LOOK_SECONDS", "STATUS_SECONDS", "GROWING_SECONDS", "_RETRY_SECONDS"):
        monkeypatch.setattr(mirror_module, name, 0.02)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def replace(path: Path, content: bytes) -> None:
    """Write a file as checkpoints are written: under another name, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def everything(names):
    return names


def test_files_are_uploaded_as_they_appear(store, bucket, folder, quick):
    there = lambda: set(store.names(bucket))  # noqa: E731
    with Mirror(folder, f"s3://{bucket}/run", ["*.log", "wandb/*"]) as mirror:
        assert store.get(bucket, "run/status.json") == b"started\n", "at once"
        (folder / "reconstructions").mkdir()
        replace(folder / "reconstructions" / "last.png", b"png")
        (folder / ".model.pth.tmp").write_bytes(b"half")
        (folder / ".hidden").mkdir()
        (folder / ".hidden" / "x").touch()
        (folder / "wandb").mkdir()
        for name in ("noise.log", "wandb/run.db"):
            (folder / name).touch()
        until(lambda: "run/reconstructions/last.png" in there(), "a new file is not uploaded during the run")
        with (folder / "status.json").open("a") as lines:
            lines.write("running\n")
        until(lambda: store.get(bucket, "run/status.json") == b"started\nrunning\n", "the status is not updated")
        (folder / "metrics.csv").write_text("loss\n")
        mirror.finish()
        assert "run/metrics.csv" in there()
        (folder / "status.json").write_text("success\n")
    assert store.get(bucket, "run/status.json") == b"success\n"
    assert there() == {"run/status.json", "run/metrics.csv", "run/reconstructions/last.png"}
    assert mirror.complete


def test_links_and_removed_checkpoints(store, bucket, folder, monkeypatch):
    sent = []
    real = S3FileSystem._put_file

    async def counting(self, local, there, **options):
        sent.append(there)
        return await real(self, local, there, **options)

    monkeypatch.setattr(S3FileSystem, "_put_file", counting)
    with Mirror(folder, f"s3://{bucket}/run") as mirror:
        replace(folder / "model_epoch_001_step_00002.pth", b"one")
        (folder / "vit_latest.pth").symlink_to("model_epoch_001_step_00002.pth")
        os.link(folder / "model_epoch_001_step_00002.pth", folder / "model_best.pth")
        mirror.finish()
        checkpoints = [name for name in sent if name.endswith(".pth")]
        assert len(checkpoints) == 1, "other names of a file are copied by the store"
        for name in ("model_epoch_001_step_00002", "vit_latest", "model_best"):
            assert store.get(bucket, f"run/{name}.pth") == b"one"
        replace(folder / "model_epoch_002_step_00004.pth", b"two")
        (folder / "vit_latest.pth").unlink()
        (folder / "vit_latest.pth").symlink_to("model_epoch_002_step_00004.pth")
        (folder / "model_epoch_001_step_00002.pth").unlink()
    assert store.get(bucket, "run/vit_latest.pth") == b"two"
    assert store.get(bucket, "run/model_best.pth") == b"one"
    assert "run/model_epoch_001_step_00002.pth" not in store.names(bucket)


def test_large_files_appear_when_they_are_complete(store, bucket, folder, wire):
    content = os.urandom(24 << 20)  # uploaded in parts
    replace(folder / "model.pth", content)
    wire.cuts, wire.after = 3, 100
    with Mirror(folder, f"s3://{bucket}/run"):
        pass
    assert wire.cuts == 0, "no connection was broken"
    assert store.get(bucket, "run/model.pth") == content
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=bucket), "an unfinished upload is left"


def test_a_destination_that_cannot_be_written(store, folder):
    with pytest.raises(DataError, match="there is no bucket 'no-such-bucket-at-all'"):
        Mirror(folder, "s3://no-such-bucket-at-all/run").__enter__()


def test_failed_uploads_are_reported(store, bucket, folder, monkeypatch, wire, caplog):
    monkeypatch.setattr(mirror_module, "_TRIES", 2)
    monkeypatch.setattr(mirror_module, "_PATIENCE_SECONDS", 0)
    with Mirror(folder, f"s3://{bucket}/run") as mirror:
        replace(folder / "model.pth", b"x" * 1000)
        wire.cuts, wire.after = 1000, 0
        with pytest.raises(RunError, match=rf"model\.pth could not be uploaded to s3://{bucket}/run: ") as caught:
            mirror.finish()
        assert "the server cannot be reached, or closes the connection" in caught.value.problem
        assert f"Everything is still in {folder}: run the command again" in caught.value.fix
        wire.cuts = 0
    assert store.get(bucket, "run/model.pth") == b"x" * 1000, "it is not tried again at the end"
    mirror = Mirror(folder, f"s3://{bucket}/run")

    def fail() -> None:
        with mirror:
            replace(folder / "model.pth", b"y" * 1000)
            wire.cuts = 1000
            raise KeyError("the run's own error")

    with pytest.raises(KeyError):
        fail()
    assert "model.pth could not be uploaded" in "\n".join(caplog.messages)
    assert not mirror.complete


def test_the_end_of_a_run_waits_for_an_unreachable_store(store, bucket, folder, monkeypatch, wire):
    monkeypatch.setattr(mirror_module, "_TRIES", 1)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 4:
            wire.cuts = 0

    monkeypatch.setattr(mirror_module.time, "sleep", sleep)
    with Mirror(folder, f"s3://{bucket}/run") as mirror:
        replace(folder / "model.pth", b"x" * 1000)
        wire.cuts, wire.after = 1000, 0
        mirror.finish()
    assert waited == [0.5, 1.0, 2.0, 4.0]
    assert mirror.complete
    assert store.get(bucket, "run/model.pth") == b"x" * 1000


def test_an_unreachable_store_is_tried_with_one_file_only(store, bucket, folder, monkeypatch, wire):
    monkeypatch.setattr(mirror_module, "_TRIES", 2)
    monkeypatch.setattr(mirror_module, "_PATIENCE_SECONDS", 0)
    waited: list[float] = []
    monkeypatch.setattr(mirror_module.time, "sleep", waited.append)

    def end() -> None:
        with Mirror(folder, f"s3://{bucket}/run"):
            for name in "abcde":
                replace(folder / name, b"x")
            wire.cuts, wire.after = 1000, 0

    with pytest.raises(RunError, match=r"^a, b, c and 2 more could not be uploaded"):
        end()
    assert len(waited) == 1, "more than one file was tried"


def test_other_files_are_uploaded_when_one_fails(store, bucket, folder, monkeypatch):
    monkeypatch.setattr(mirror_module, "_TRIES", 1)
    monkeypatch.setattr(mirror_module, "_PATIENCE_SECONDS", 0)
    send = S3FileSystem._put_file

    async def put(self, local, there, **options):
        if there.endswith("/b"):
            raise TimeoutError("a slow line")
        return await send(self, local, there, **options)

    monkeypatch.setattr(S3FileSystem, "_put_file", put)

    def end() -> None:
        with Mirror(folder, f"s3://{bucket}/run"):
            for name in "abc":
                replace(folder / name, b"x")

    with pytest.raises(RunError, match=r"^b could not be uploaded"):
        end()
    assert {"run/a", "run/c"} <= set(store.names(bucket))


def test_older_checkpoints_are_kept_when_one_is_set_aside(store, bucket, folder, tmp_path):
    url, names = f"s3://{bucket}/run", [f"model_epoch_00{n}.pth" for n in (1, 2, 3)]
    with Mirror(folder, url):
        for name in names:
            replace(folder / name, name.encode())
    other = tmp_path / "other"
    other.mkdir()
    pull(url, other, lambda there: [max(name for name in there if name in names)])
    (other / names[2]).rename(other / f"{names[2]}.unreadable")
    with Mirror(other, url):
        pass
    kept = {name.removeprefix("run/") for name in store.names(bucket)}
    assert kept == {"status.json", names[0], names[1], f"{names[2]}.unreadable"}


def test_ctrl_c_uploads_complete_files(store, bucket, folder):
    def interrupted() -> None:
        with Mirror(folder, f"s3://{bucket}/run"):
            replace(folder / "model.pth", b"x")
            (folder / ".model2.pth.tmp").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(store.names(bucket)) == {"run/model.pth", "run/status.json"}


def test_a_run_resumes_on_another_machine(store, bucket, folder, tmp_path, caplog):
    url = f"s3://{bucket}/run"
    caplog.set_level(logging.INFO, "openmae")
    with Mirror(folder, url):
        for number in (1, 2, 3):
            replace(folder / f"model_epoch_00{number}_step_00001.pth", bytes([number]))
        (folder / "metrics.csv").write_text("loss\n1\n")
    other = tmp_path / "other"
    other.mkdir()
    pull(url, other, lambda names: [name for name in names if not name.startswith("model_epoch") or "003" in name])
    visible = {path.name for path in other.iterdir() if not path.name.startswith(".")}
    assert visible == {"status.json", "metrics.csv", "model_epoch_003_step_00001.pth"}
    caplog.clear()
    with Mirror(other, url):
        replace(other / "model_epoch_004_step_00001.pth", b"4")
        (other / "model_epoch_003_step_00001.pth").unlink()
        (other / "metrics.csv").write_text("loss\n1\n2\n")
    kept = [name for name in store.names(bucket) if "epoch" in name]
    assert kept == ["run/model_epoch_004_step_00001.pth"], "a file older than a removed one is kept"
    # the first machine again: what the other one wrote since replaces what is here
    pull(url, folder, everything)
    assert (folder / "metrics.csv").read_text() == "loss\n1\n2\n"
    assert not (folder / "model_epoch_001_step_00001.pth").exists()
    assert (folder / "model_epoch_004_step_00001.pth").read_bytes() == b"4"


def test_files_that_are_not_uploaded_yet_are_not_overwritten(store, bucket, folder):
    url = f"s3://{bucket}/run"
    with Mirror(folder, url):
        (folder / "metrics.csv").write_text("loss\n1\n")
    (folder / "metrics.csv").write_text("loss\n1\n2\n")  # then the process was killed
    (folder / "model.pth").write_bytes(b"new")
    pull(url, folder, everything)
    assert (folder / "metrics.csv").read_text() == "loss\n1\n2\n"
    with Mirror(folder, url):
        pass
    assert store.get(bucket, "run/metrics.csv") == b"loss\n1\n2\n"
    assert store.get(bucket, "run/model.pth") == b"new"


def test_pulling_a_missing_folder(store, bucket, tmp_path):
    pull(f"s3://{bucket}/none", tmp_path, everything)
    with pytest.raises(DataError, match="there is no bucket"):
        pull("s3://no-such-bucket-at-all/none", tmp_path, everything)


def test_a_checkpoint_is_uploaded_after_its_metrics(store, bucket, folder, quick, monkeypatch):
    """Metrics that were uploaded a moment ago are uploaded again, so that a resumed run misses none."""
    monkeypatch.setattr(mirror_module, "GROWING_SECONDS", 1000.0)
    monkeypatch.setattr(mirror_module, "STATUS_SECONDS", 1000.0)
    there = lambda: set(store.names(bucket))  # noqa: E731
    sent = []
    put = Mirror._put

    def noting(self, name, path, mark):
        sent.append((name, path.read_text()))
        return put(self, name, path, mark)

    monkeypatch.setattr(Mirror, "_put", noting)
    (folder / "metrics.csv").write_text("1\n")
    with Mirror(folder, f"s3://{bucket}/run"):
        until(lambda: "run/metrics.csv" in there(), "the metrics are not uploaded")
        for step in ("2", "3"):
            with (folder / "metrics.csv").open("a") as file:
                file.write(f"{step}\n")
            with (folder / "status.json").open("a") as file:
                file.write(f"epoch {step}\n")
            replace(folder / f"model_epoch_00{step}_step_0000{step}.pth", b"weights")
            until(lambda step=step: f"run/model_epoch_00{step}_step_0000{step}.pth" in there(), "no checkpoint")
        written = dict(sent)
        assert written["metrics.csv"] == "1\n2\n3\n"
        assert written["status.json"] == "started\nepoch 2\nepoch 3\n"
        names = [name for name, _ in sent]
        last = len(names) - 1 - names[::-1].index("metrics.csv")
        assert last < names.index("model_epoch_003_step_00003.pth")


def test_a_checkpoint_without_its_metrics_is_not_uploaded(store, bucket, folder, monkeypatch):
    put = Mirror._put

    async def failing(self, name, path, mark):
        if name == "metrics.csv":
            raise PermissionError
        return await put(self, name, path, mark)

    monkeypatch.setattr(Mirror, "_put", failing)
    (folder / "metrics.csv").write_text("1\n")
    (folder / "model_epoch_001_step_00001.pth").write_bytes(b"weights")
    mirror = Mirror(folder, f"s3://{bucket}/run")
    with pytest.raises(RunError, match=r"metrics\.csv, model_epoch_001_step_00001\.pth could not be uploaded"):
        mirror.finish()
    assert "run/model_epoch_001_step_00001.pth" not in store.names(bucket)


def test_an_older_checkpoint_is_kept_until_the_newer_one_is_uploaded(store, bucket, folder, monkeypatch):
    (folder / "model_epoch_001_step_00001.pth").write_bytes(b"one")
    mirror = Mirror(folder, f"s3://{bucket}/run")
    mirror.finish()
    (folder / "model_epoch_001_step_00001.pth").unlink()
    (folder / "model_epoch_002_step_00002.pth").write_bytes(b"two")
    seen = []
    remove = Mirror._forget_removed
    monkeypatch.setattr(Mirror, "_forget_removed", lambda self: (seen.extend(store.names(bucket)), remove(self)))
    mirror.finish()
    assert {"run/model_epoch_001_step_00001.pth", "run/model_epoch_002_step_00002.pth"} <= set(seen)
    assert "run/model_epoch_001_step_00001.pth" not in store.names(bucket)


def test_an_abandoned_copy_is_not_changed(store, bucket, folder):
    (folder / "old.txt").write_text("old")
    with Mirror(folder, f"s3://{bucket}/run") as mirror:
        mirror.finish()
        mirror.abandon()
        (folder / "old.txt").unlink()
        (folder / "new.txt").write_text("new")
        (folder / "status.json").write_text("interrupted\n")
    assert store.names(bucket) == ["run/old.txt", "run/status.json"]
    assert store.get(bucket, "run/status.json") == b"started\n"
    assert not mirror.complete


def test_a_run_that_stops_at_once_uploads_nothing_more(store, bucket, folder, caplog):
    mirror = Mirror(folder, f"s3://{bucket}/run")
    mirror.__enter__()
    mirror._stop.set()
    mirror._thread.join()
    (folder / "model.pth").write_bytes(b"weights")
    mirror.__exit__(StoppedAtOnce, StoppedAtOnce(), None)
    assert f"Files that were not uploaded to s3://{bucket}/run yet are in {folder}." in caplog.text
    assert not mirror.complete
    assert store.names(bucket) == ["run/status.json"]
