"""Checkpoints of fsdp in parts: one folder a checkpoint, joined on demand, read by any run, never by halves."""

from __future__ import annotations

import errno
import gc
import importlib
import logging
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from openmae.actions.plan import make_plan
from openmae.checkpoints.folder import (
    CheckpointFolder,
    list_checkpoints,
    read_training_state,
    set_aside,
    write_checkpoint,
)
from openmae.checkpoints.format import read_checkpoint
from openmae.checkpoints.parts import Shared, complete, joined, write_part
from openmae.cli.checkpoint import consolidate
from openmae.cli.main import main
from openmae.distributed.launch import build_fabric, launch
from openmae.errors import CheckpointError, RunError, SpecError
from openmae.results.metrics_csv import read_metrics
from openmae.spec.load import load_spec
from openmae.storage.encryption import Key, is_encrypted
from openmae.training.resume import newest_checkpoint, newest_readable

several_processes = pytest.mark.xdist_group("several processes")  # one such test at a time: they need the cores

FSDP = {
    "dataset.batch_size": 2,
    "train.num_gpus": 2,
    "train.distributed_strategy": "fsdp",
    "train.checkpoint_interval": 3,
    "train.checkpoint_interval_unit": "step",
    "train.keep_checkpoints": 9,
}
PARTS = {**FSDP, "train.sharded_checkpoints": "true"}
TENSORS = {"model.a": torch.arange(15.0).reshape(5, 3), "model.b": torch.arange(2.0), "model.c": torch.zeros(0, 4)}
PAYLOAD = {
    "openmae": {"stage": "pretrain"},
    "state_dict": TENSORS,
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(5, 3)}}, "param_groups": [{"lr": 1}]},
    "progress": {"epoch": 1, "batch": 0, "step": 4},
}


def unfinished(folder: Path, ranks: int, key: Key | None = None) -> Path:
    """A folder as the processes of a run leave it before process 0 writes the index."""
    hidden = folder / ".model_epoch_001_step_00004.shards.tmp"
    hidden.mkdir(parents=True)
    places = {("state_dict", name): tensor for name, tensor in TENSORS.items()}
    places["optimizer", "state", 0, "exp_avg"] = PAYLOAD["optimizer"]["state"][0]["exp_avg"]
    for rank in range(ranks):
        rows = {}
        for place, tensor in places.items():
            share = -(-len(tensor) // ranks)
            first = min(rank * share, len(tensor))
            rows[place] = first, tensor[first : first + share].clone()
        write_part(rows, hidden, rank, ranks, key)
    return hidden


def index() -> dict:
    def told(value):
        if isinstance(value, torch.Tensor) and value.ndim:
            return {"openmae.shared": list(value.shape)}
        return {k: told(v) for k, v in value.items()} if isinstance(value, dict) else value

    return told(PAYLOAD)


def finished(folder: Path, ranks: int, key: Key | None = None) -> Path:
    final = folder / "model_epoch_001_step_00004.shards"
    complete(unfinished(folder, ranks, key), final, index(), ranks, key, patience=1.0)
    return final


def spoil(path: Path) -> None:
    """Change a byte of a tensor."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def test_rows_are_read_from_the_parts_that_have_them():
    whole = torch.arange(14).reshape(7, 2)
    shared = Shared([7, 2], [(6, whole[6:]), (0, whole[:3]), (3, whole[3:6]), (7, whole[7:])])
    assert shared.whole().equal(whole)
    assert shared.rows(2, 3).equal(whole[2:5])
    assert shared.rows(7, 0).shape == (0, 2)
    assert Shared([0, 2], [(0, whole[:0]), (0, whole[:0])]).whole().shape == (0, 2)
    with pytest.raises(ValueError, match=r"2 rows of \(9, 2\) are missing"):
        Shared([9, 2], [(0, whole)])
    with pytest.raises(ValueError, match="missing or twice"):
        Shared([7, 2], [(0, whole[:4]), (3, whole[3:])])
    with pytest.raises(ValueError, match="missing or twice"):
        Shared([7, 3], [(0, whole)])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("key", [None, Key(b"secret")])
def test_parts_join_to_the_whole(assert_same, tmp_path, ranks, key):
    """Five rows on four processes: the last one has none."""
    path = finished(tmp_path, ranks, key)
    assert sorted(os.listdir(path)) == ["index.pth", *(f"part_{rank:04d}_of_{ranks:04d}.pth" for rank in range(ranks))]
    assert all(is_encrypted(file) == bool(key) for file in path.iterdir())
    assert_same(joined(read_training_state(path, key)), PAYLOAD, "payload")
    assert newest_readable(tmp_path, key)[0] == path


def test_consolidate_writes_what_training_would_have_written(assert_same, tmp_path, capsys, monkeypatch):
    path = finished(tmp_path, 2)
    assert main(["checkpoint", "consolidate", str(path)]) == 0
    out = tmp_path / "model_epoch_001_step_00004.pth"
    assert capsys.readouterr().out == f"{out}\n"
    write_checkpoint(PAYLOAD, tmp_path / "whole.pth")
    assert_same(*(torch.load(file, weights_only=True) for file in (out, tmp_path / "whole.pth")), "payload")
    assert list_checkpoints(tmp_path) == [path, out], "a run goes on from the whole one"

    assert main(["checkpoint", "consolidate", str(path)]) == 2
    assert f"{out} exists, and is not replaced unasked.\n  Fix: Give another name with -o" in capsys.readouterr().err
    assert main(["checkpoint", "consolidate", str(out)]) == 2
    assert "is no checkpoint in parts: such a one is a folder, model_epoch_*.shards." in capsys.readouterr().err

    monkeypatch.setenv("MODEL_KEY", "secret")
    secret = finished(tmp_path / "secret", 2, Key(b"secret"))
    assert main(["checkpoint", "consolidate", str(secret), "-o", str(tmp_path / "new" / "out.pth")]) == 2
    assert "is encrypted, and there is no key." in capsys.readouterr().err
    assert not (tmp_path / "new" / "out.pth").exists()
    written = consolidate(secret, tmp_path / "new" / "out.pth", "env:MODEL_KEY")
    assert is_encrypted(written)
    assert_same(read_training_state(written, Key(b"secret")), PAYLOAD, "payload")


def test_a_run_killed_before_the_index_leaves_the_one_before(tmp_path):
    write_checkpoint(PAYLOAD, tmp_path / "model_epoch_000_step_00002.pth")
    hidden = unfinished(tmp_path, 2)
    (hidden / "part_0001_of_0002.pth").unlink()
    with pytest.raises(RunError, match=r"process 1 has written nothing of its part for 0\.1 s"):
        complete(hidden, tmp_path / "model_epoch_001_step_00004.shards", index(), 2, None, patience=0.1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["model_epoch_000_step_00002.pth"]
    CheckpointFolder(tmp_path, "vit", keep=2).go_on_from(0, 2)
    assert not hidden.exists(), "the next start clears away what was begun"


@pytest.mark.parametrize("harm", ["damaged part", "part missing", "index missing", "foreign part", "foreign index"])
def test_damaged_parts_are_set_aside_for_the_one_before(caplog, tmp_path, harm):
    write_checkpoint(PAYLOAD, tmp_path / "model_epoch_000_step_00002.pth")
    path = finished(tmp_path, 2)
    (tmp_path / f"{path.name}.unreadable").mkdir()
    (tmp_path / f"{path.name}.unreadable" / "earlier").touch()
    part = path / "part_0001_of_0002.pth"
    if harm == "damaged part":
        spoil(part)
    elif harm.startswith("foreign"):
        torch.save({"parts": 10**9, "rows": {}}, part if harm == "foreign part" else path / "index.pth")
    else:
        (part if harm == "part missing" else path / "index.pth").unlink()
    with pytest.raises(CheckpointError, match=r"step_00004\.shards cannot be read as a checkpoint"):
        read_training_state(path, lazily=True)
    found = newest_readable(tmp_path)
    assert found is not None
    assert found[0].name == "model_epoch_000_step_00002.pth"
    assert f"{path} cannot be read: it is now {path.name}.unreadable" in caplog.text
    assert not path.exists()
    assert (tmp_path / f"{path.name}.unreadable" / "earlier").exists(), "what was set aside before is gone"
    assert (tmp_path / f"{path.name}.unreadable.2").is_dir()


def test_two_processes_that_set_one_checkpoint_aside_delete_nothing(tmp_path):
    path = finished(tmp_path, 1)
    aside = [set_aside(path, ".unreadable") for _ in range(2)]
    assert aside == [tmp_path / f"{path.name}.unreadable"] * 2
    assert sorted(os.listdir(aside[0])) == ["index.pth", "part_0000_of_0001.pth"]


class Killed(BaseException):
    """What nothing cleans up after."""


@pytest.mark.parametrize("begin", [newest_readable, newest_checkpoint])
def test_a_run_killed_while_it_replaces_a_checkpoint_keeps_one(assert_same, tmp_path, monkeypatch, begin):
    path, replace = finished(tmp_path, 2), os.replace

    def killed(source, target):
        if Path(target) == path:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(Killed):
            finished(tmp_path, 2)
    assert begin(tmp_path) is not None, "neither of the two is found"
    CheckpointFolder(tmp_path, "vit", keep=1).make_room(2, 8)
    assert sorted(os.listdir(tmp_path)) == [".model_epoch_002_step_00008.shards.tmp", path.name]
    assert_same(joined(read_training_state(path)), PAYLOAD, "payload")


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    path, replace = finished(tmp_path, 2), os.replace

    def busy(source, target):
        if str(source).endswith(".tmp") and Path(target) == path:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        replace(source, target)

    monkeypatch.setattr("os.replace", busy)
    with pytest.raises(OSError, match="busy"):
        complete(unfinished(tmp_path, 2), path, index(), 2, None, patience=1.0)
    assert newest_readable(tmp_path)[0] == path


def test_what_cannot_be_deleted_ends_no_training(tmp_path, monkeypatch, caplog):
    """As on NFS, while another process has a file of it open."""

    def busy(folder, *_arguments):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))

    monkeypatch.setattr("shutil.rmtree", busy)
    with CheckpointFolder(tmp_path, "vit", keep=1) as folder:
        for step in (1, 2, 3):
            folder.make_room(0, step)
            folder.save_part(PAYLOAD, {}, 0, step, (0, 1))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["model_epoch_000_step_00003.shards"]
    old = tmp_path / ".model_epoch_000_step_00001.shards.tmp"
    assert f"{old} cannot be deleted (Directory not empty): it only takes room." in caplog.text
    with pytest.raises(RunError, match=r"cannot be deleted \(index.pth, part_0000_of_0001.pth\)") as caught:
        folder.make_room(0, 1)
    assert caught.value.fix == "Delete that folder: the parts of two runs must not mix."


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells which files are open")
def test_a_run_that_goes_on_lets_the_files_go(tmp_path):
    path = finished(tmp_path, 2)
    gc.disable()
    try:
        _, payload = newest_readable(tmp_path)
        plain = {key: payload[key] for key in ("openmae", "progress")}
        assert str(path / "part_0001_of_0002.pth") in Path("/proc/self/maps").read_text()
        index_of = [
            line for line in Path("/proc/self/maps").read_text().splitlines() if str(path / "index.pth") in line
        ]
        del payload
        assert str(path) not in Path("/proc/self/maps").read_text(), "the parts stay open"
    finally:
        gc.enable()
    assert not index_of, "the run keeps plain values of the index, and its file with them"
    assert plain == {key: PAYLOAD[key] for key in plain}


def test_both_kinds_are_counted_and_the_link_never_points_at_an_older_one(tmp_path):
    with CheckpointFolder(tmp_path, "vit", keep=2) as folder:
        folder.save(PAYLOAD, 0, 1)
        for step in (2, 3, 4):
            folder.make_room(0, step)
            folder.save_part(PAYLOAD, PAYLOAD if step == 3 else {}, 0, step, (0, 1))
        folder.wait()
        names = ["model_best.pth", "model_epoch_000_step_00003.shards", "model_epoch_000_step_00004.shards"]
        assert sorted(os.listdir(tmp_path)) == names
        folder.make_room(0, 4)  # cut twice at one place
        folder.save_part(PAYLOAD, {}, 0, 4, (0, 1))
        folder.save(PAYLOAD, 1, 5)
    assert sorted(os.listdir(tmp_path))[1:] == [
        *("model_epoch_000_step_00004.shards", "model_epoch_001_step_00005.pth", "vit_latest.pth")
    ]
    assert os.readlink(tmp_path / "vit_latest.pth") == "model_epoch_001_step_00005.pth"
    CheckpointFolder(tmp_path, "vit", keep=2).go_on_from(0, 4)
    assert sorted(os.listdir(tmp_path))[1:] == [
        *("model_epoch_000_step_00004.shards", "model_epoch_001_step_00005.pth.superseded")
    ]


def test_processes_wait_for_the_slowest_and_see_one_folder(tmp_path, monkeypatch):
    with CheckpointFolder(tmp_path, "vit", keep=2) as first, CheckpointFolder(tmp_path, "vit", keep=2) as second:
        first.make_room(0, 1)
        first.save_part(PAYLOAD, {}, 0, 1, (0, 2))
        waiting = threading.Event()
        watch = threading.Thread(target=lambda: (first.wait(), waiting.set()))
        watch.start()
        assert not waiting.wait(0.3), "complete without the part of process 1"
        second.save_part(PAYLOAD, PAYLOAD, 0, 1, (1, 2))
        second.wait()
        assert waiting.wait(20), "the part of process 1 was not found"
        watch.join()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["model_epoch_000_step_00001.shards"]
    assert not (tmp_path / "model_best.pth").exists(), "process 0 alone writes the best"
    elsewhere = CheckpointFolder(tmp_path / "another disk", "vit", keep=2)
    with pytest.raises(RunError, match=r"Process 1 does not see the folder.*that process 0 has made") as caught:
        elsewhere.save_part(PAYLOAD, {}, 0, 2, (1, 2))
    assert "on a file system that all nodes share" in caught.value.fix


def test_process_0_hears_at_once_that_a_part_cannot_be_written(tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("OPENMAE_ANSWER_SECONDS", "20")
    first, second = (CheckpointFolder(tmp_path, "vit", keep=2) for _ in range(2))
    first.make_room(0, 1)
    first.save_part(PAYLOAD, {}, 0, 1, (0, 3))
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob(".*/part_0000_of_0003.pth")):
        assert time.monotonic() < deadline, "process 0 has not written its part"
        time.sleep(0.01)
    monkeypatch.setattr("openmae.checkpoints.parts.created", full)
    second.save_part(PAYLOAD, {}, 0, 1, (1, 3))
    with pytest.raises(RunError, match=r"step_00001\.shards could not be written \(No space left on device\)"):
        second.wait()
    with pytest.raises(RunError) as caught:
        first.wait()
    problem = "The checkpoint model_epoch_000_step_00001.shards could not be written "
    assert caught.value.problem == problem + "(process 1: No space left on device)."
    assert os.listdir(tmp_path) == [], "what was begun takes room"


def test_a_process_that_comes_late_to_what_was_given_up_tells_nothing_of_its_own(tmp_path, monkeypatch, caplog):
    late = CheckpointFolder(tmp_path, "vit", keep=2)
    late.make_room(0, 1)

    def given_up(*arguments):
        shutil.rmtree(tmp_path / ".model_epoch_000_step_00001.shards.tmp")
        write_part(*arguments)

    monkeypatch.setattr("openmae.checkpoints.folder.write_part", given_up)
    late.save_part(PAYLOAD, {}, 0, 1, (1, 2))
    late.wait()
    assert "Process 1: model_epoch_000_step_00001.shards was given up before its part was written." in caplog.text


def test_a_part_that_grows_is_waited_for(tmp_path):
    hidden, final = unfinished(tmp_path, 2), tmp_path / "model_epoch_001_step_00004.shards"
    part, growing = hidden / "part_0001_of_0002.pth", hidden / ".part_0001_of_0002.pth.tmp"
    content = part.read_bytes()
    part.unlink()

    def write():
        for size in range(10, 21):
            growing.write_bytes(content[: len(content) * size // 20])
            time.sleep(0.15)
        growing.replace(part)

    writer = threading.Thread(target=write)
    writer.start()
    complete(hidden, final, index(), 2, None, patience=1.0)  # it takes 1.65 s
    writer.join()
    assert newest_readable(tmp_path)[0] == final


def test_the_memory_of_the_best_is_let_go(tmp_path):
    best = {**PAYLOAD, "state_dict": {"model.a": torch.zeros(1000)}}
    with CheckpointFolder(tmp_path, "vit", keep=3) as folder:
        kept = []
        for step in (1, 2, 3):
            folder.make_room(0, step)
            folder.save_part(PAYLOAD, best if step == 2 else {}, 0, step, (0, 1))
            kept.append(sum(tensor.nbytes for tensor in folder._host._kept.values()))
    assert kept[1] > 4000
    assert kept[2] == kept[0], "a checkpoint that is not the best keeps the copy of one that was"


def test_where_consolidate_finds_no_room(tmp_path, capsys, monkeypatch):
    path = finished(tmp_path, 2)
    command = ["checkpoint", "consolidate", str(path), "-o"]
    assert main([*command, "s3://bucket/a.pth"]) == 2
    assert "-o must be a path on this machine, not s3://bucket/a.pth." in capsys.readouterr().err

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "elsewhere" / "a.pth"
    with monkeypatch.context() as patch:
        patch.setattr("openmae.checkpoints.folder.created", full)
        assert main([*command, str(out)]) == 1
    told = capsys.readouterr().err
    assert "The checkpoint a.pth could not be written (No space left on device)." in told
    assert f"Fix: Free space in {out.parent}, or name a place with room with -o.\n" in told
    assert os.listdir(out.parent) == []

    def small(*_arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore")

    monkeypatch.setattr(Shared, "whole", small)
    assert main([*command, str(out)]) == 1
    told = capsys.readouterr().err
    assert f"{path} could not be joined: DefaultCPUAllocator: can't allocate memory" in told
    assert "GiB of memory: join it on a machine that has that." in told
    assert "Traceback" not in told


def test_what_needs_a_whole_checkpoint_says_how_to_get_one(tmp_path):
    path = finished(tmp_path, 2)
    with pytest.raises(CheckpointError, match="is a sharded checkpoint, which only training reads") as caught:
        read_checkpoint(path)
    assert caught.value.fix == f"Join it: mae checkpoint consolidate {path}"


def test_where_parts_cannot_be_written(tiny_overrides, tmp_path, caplog):
    changes = {"train.distributed_strategy": "fsdp", "train.sharded_checkpoints": "true"}
    with pytest.raises(SpecError, match=r"train\.sharded_checkpoints.*results_dir is in a store\. Set it to false"):
        load_spec(None, tiny_overrides("s3://bucket/run", changes), action="train")
    load_spec(None, tiny_overrides(tmp_path, {"train.sharded_checkpoints": "true"}), action="train")
    assert "train.sharded_checkpoints has no effect without train.distributed_strategy=fsdp." in caplog.text


@pytest.fixture(scope="module")
def parts(tiny_overrides, tmp_path_factory):
    """Two processes that write parts at every third of ten steps."""
    folder = tmp_path_factory.mktemp("parts")
    assert main(["train", *tiny_overrides(folder, PARTS)]) == 0
    return folder


def _begun(parts: Path, folder: Path, until: str) -> None:
    """The run as it was when it had written the checkpoint ``until``."""
    folder.mkdir()
    for path in list_checkpoints(parts):
        if path.name <= until:
            shutil.copytree(path, folder / path.name)
    for name in ("metrics.csv", "status.json"):
        shutil.copy(parts / name, folder / name)


@several_processes
def test_parts_of_a_run_equal_its_whole_checkpoints(parts, tiny_overrides, assert_same, tmp_path, capfd):
    names = [f"model_epoch_00{epoch}_step_0000{step}.shards" for epoch, step in ((0, 3), (1, 6), (1, 9))]
    assert [path.name for path in list_checkpoints(parts)] == [*names, "model_epoch_002_step_00010.pth"]
    assert (parts / "vit_tiny_patch16_latest.pth").resolve().name == "model_epoch_002_step_00010.pth"
    assert {"model_best.pth", "backbone.safetensors", "report.html"} <= set(os.listdir(parts))
    assert not list(parts.glob(".*.tmp"))
    sizes = [(parts / names[0] / f"part_000{rank}_of_0002.pth").stat().st_size for rank in range(2)]
    whole_size = (parts / "model_epoch_002_step_00010.pth").stat().st_size
    assert max(sizes) < 0.6 * whole_size, "each process writes half of it"

    assert main(["train", *tiny_overrides(tmp_path, {**FSDP, "train.stop_after_epoch": 1})]) == 0
    written = consolidate(parts / names[0], tmp_path / "joined.pth")
    ours, theirs = (
        torch.load(path, weights_only=True) for path in (written, tmp_path / names[0].replace("shards", "pth"))
    )
    assert ours.keys() == theirs.keys()
    for part in ("state_dict", "optimizer", "precision", "progress"):
        assert_same(ours[part], theirs[part], part)


@several_processes
def test_a_run_goes_on_from_the_newest_whole_parts(parts, tiny_overrides, assert_same_run, tmp_path, caplog):
    """The newest is damaged; the one before gives the same end, bit for bit."""
    folder = tmp_path / "again"
    _begun(parts, folder, "model_epoch_001_step_00009.shards")
    spoil(folder / "model_epoch_001_step_00009.shards" / "part_0001_of_0002.pth")
    with caplog.at_level(logging.WARNING):
        assert main(["train", *tiny_overrides(folder, PARTS)]) == 0
    assert "model_epoch_001_step_00009.shards.unreadable, and model_epoch_001_step_00006.shards is used" in caplog.text
    assert_same_run(parts, folder)


@pytest.mark.slow  # two spawned processes, and the seconds that the other one gets to end
@several_processes
def test_a_part_that_cannot_be_written_ends_the_run(tiny_overrides, tmp_path, monkeypatch):
    """Process 0 has written its own, and waits for the other's: it is not to wait for ever."""
    work = importlib.import_module("tests.helpers.two_process_work")
    spec = load_spec(None, tiny_overrides(tmp_path, PARTS), action="train")
    plan = make_plan(spec, tmp_path)
    with pytest.raises(RunError) as caught:
        launch(build_fabric("train", 2, [0, 1], 1, "fp32", "fsdp"), work.train_on_a_full_disk, plan)
    who = "" if "process 1" not in caught.value.problem else "process 1: "  # whichever of the two ended first
    problem = f"The checkpoint model_epoch_001_step_00006.shards could not be written ({who}No space left on device)."
    assert caught.value.problem == problem
    assert "model_epoch_000_step_00003.shards is intact: the same command resumes from it." in caught.value.fix
    assert [path.name for path in list_checkpoints(tmp_path)] == ["model_epoch_000_step_00003.shards"]
    assert not list(tmp_path.glob(".*.tmp")), "the other part still takes room"


@several_processes
def test_one_process_goes_on_from_parts(parts, train, tmp_path):
    folder = tmp_path / "one"
    named = {"train.resume_training_checkpoint_path": parts / "model_epoch_001_step_00006.shards"}
    train(folder, {"dataset.batch_size": 2, **named})
    ours, theirs = (
        [row["train_loss"] for row in read_metrics(place / "metrics.csv") if "train_loss" in row]
        for place in (folder, parts)
    )
    assert ours == pytest.approx(theirs[6:], rel=2e-3)
    last, expected = (
        torch.load(list_checkpoints(place)[-1], weights_only=True)["state_dict"] for place in (folder, parts)
    )
    for name, tensor in last.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-3, rtol=1e-2)


@pytest.mark.slow
@several_processes
def test_four_processes_go_on_from_the_parts_of_two(parts, tiny_overrides, tmp_path, capfd):
    """Each takes its rows out of the parts of others."""
    folder = tmp_path / "four"
    _begun(parts, folder, "model_epoch_001_step_00009.shards")
    changes = {**PARTS, "dataset.batch_size": 1, "train.num_gpus": 4, "train.gpu_ids": "[0,1,2,3]"}
    assert main(["train", *tiny_overrides(folder, changes)]) == 0
    assert "goes on with 4 process(es) in place of 2: its global batch stays 4" in capfd.readouterr().err
    last, expected = (
        torch.load(list_checkpoints(place)[-1], weights_only=True)["state_dict"] for place in (folder, parts)
    )
    for name, tensor in last.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-3, rtol=1e-2)
