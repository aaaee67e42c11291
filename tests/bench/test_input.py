"""The input pipeline's benchmark, and start-up's: same work for both sides, and both in small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import input as bench_input
from bench import startup
from openmae.errors import RunError


@pytest.mark.parametrize("size", bench_input.SIZES)
def test_photographs_have_detail_and_differ(size: tuple[int, int], tmp_path: Path) -> None:
    paths = bench_input.write_photographs(tmp_path, size, 4)
    assert all(Image.open(path).size == size for path in paths)
    assert len({path.read_bytes() for path in paths}) == 4
    bits = 8 * np.mean([path.stat().st_size for path in paths]) / (size[0] * size[1])
    assert 1.0 < bits < 4.0, "bits a pixel of photographs at this quality"


def test_both_sides_make_the_same_kind_of_batch(tmp_path: Path) -> None:
    paths = bench_input.write_photographs(tmp_path, (500, 375), 4)
    for contestants in (bench_input._pretraining(paths, quick=True), bench_input._finetuning(paths, quick=True)):
        for name, call in contestants.items():
            batch = call()
            assert batch.shape == (4, 3, 224, 224), name
            assert batch.dtype == torch.float32, name
            assert -3 < batch.mean() < 3, name
            assert 0.3 < batch.std() < 3, name
            assert not torch.equal(batch, call()), f"{name}: random crops"


def test_the_loaders_give_every_image(tmp_path: Path) -> None:
    paths = bench_input.write_photographs(tmp_path, (64, 64), 4)
    contestants = bench_input._loaders(tmp_path, paths, batch=2)
    assert {name: call() for name, call in contestants.items()} == {"torchvision on PIL": 4, "OpenMAE": 4}


def test_input_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_input, "SIZES", {(500, 375): 2.5})
    before = torch.get_num_threads()
    text = bench_input.run(quick=True).write(tmp_path, "input", quick=True)
    assert torch.get_num_threads() == before
    found = json.loads((tmp_path / "input-quick.json").read_text())["results"]
    assert [line["what"].partition(",")[0] for line in found] == [
        *("pretraining", "pretraining", "fine-tuning", "fine-tuning", "pretraining", "pretraining")
    ]
    assert all(line["reference"].startswith("timm" if "tuning" in line["what"] else "torchvision") for line in found)
    assert all(line["ratio"] > 0 and line["target"] is None for line in found)
    assert str(tmp_path) not in text


def test_packed_photographs_are_smaller_and_give_the_same_batches(tmp_path: Path) -> None:
    paths = bench_input.write_photographs(tmp_path, (1920, 1080), 4)
    packed = bench_input._packed(paths)
    assert len(packed) == 4
    with packed.open(0) as picture:
        assert picture.pixels().shape[:2] == (512, 910)
    contestants = bench_input._pretraining(paths, quick=True, index=packed)
    assert {name: call().shape for name, call in contestants.items()} == dict.fromkeys(contestants, (4, 3, 224, 224))
    (again, *_) = bench_input._as_files(packed, tmp_path / "small")
    with Image.open(again) as image:
        assert image.size == (910, 512)


@pytest.mark.slow(reason="starts a training run")
def test_a_training_that_fails_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("dataset: {train_data_sources: nowhere}\n")
    with pytest.raises(RunError, match=r"mae train made no step: (?s:.)*nowhere"):
        startup.first_step(tmp_path / "spec.yaml", tmp_path / "run")


@pytest.mark.slow(reason="starts every command")
def test_startup_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(startup._TURNS, True, 1)
    text = startup.run(quick=True).write(tmp_path, "startup", quick=True)
    commands = json.loads((tmp_path / "startup-quick.json").read_text())["results"]["commands"]
    found = {line["what"]: line["median"] for line in commands}
    assert found[startup.PYTHON] < found[startup.HELP] < found[startup.FIRST_STEP]
    assert str(tmp_path) not in text
