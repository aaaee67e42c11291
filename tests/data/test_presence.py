"""Paths of a spec that do not exist: all of them, for the action at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from openmae.cli.main import main
from openmae.data.presence import missing_files, missing_sources
from openmae.spec.load import load_spec


def found(action: str, *overrides: str) -> dict[str, str]:
    spec = load_spec(None, overrides)
    return {**missing_sources(spec, action), **missing_files(spec, action)}


def test_every_path_of_an_action_is_looked_at(tmp_path: Path) -> None:
    sources = [f"dataset.{name}_data_sources={tmp_path}/{name}" for name in ("train", "val", "test")]
    files = ["evaluate.checkpoint=e.pth", "export.checkpoint=x.pth", "train.pretrained_model_path=p.pth"]
    (tmp_path / "val").mkdir()
    at = f"there is nothing at '{tmp_path}"
    assert found("train", *sources, *files) == {
        "dataset.train_data_sources": f"{at}/train'",
        "train.pretrained_model_path": "there is nothing at 'p.pth'",
    }
    assert found("evaluate", *sources, *files) == {"evaluate.checkpoint": "there is nothing at 'e.pth'"}
    assert set(found("inference", *sources, *files, "inference.trt_engine=m.engine")) == {
        "dataset.test_data_sources",
        "inference.trt_engine",
    }
    assert found("automl", *sources, *files) == found("train", *sources, *files)
    assert found("export", *sources[1:2], *files, "encryption_key=file:k") == {
        "export.checkpoint": "there is nothing at 'x.pth'",
        "encryption_key": "there is nothing at 'k'",
    }
    int8 = ["gen_trt_engine.tensorrt.data_type=int8", "gen_trt_engine.onnx_file=m.onnx"]
    assert set(found("gen_trt_engine", *int8, "gen_trt_engine.tensorrt.calibration.cal_image_dir=[c]")) == {
        "gen_trt_engine.onnx_file",
        "gen_trt_engine.tensorrt.calibration.cal_image_dir",
    }


@pytest.mark.parametrize(
    "source", ["s3://bucket/train", "S3://bucket/train", "https://host/a.tar", "timm:vit_tiny_patch16_224.mae"]
)
def test_what_is_no_local_path_is_left_to_whatever_opens_it(source: str) -> None:
    assert found("train", f"train.pretrained_model_path={source}") == {}


def test_shards_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a-01.tar").touch()
    pattern = f"dataset.train_data_sources={tmp_path}/a-{{00..03}}.tar"
    assert (
        found("train", pattern)["dataset.train_data_sources"] == f"there is nothing at '{tmp_path}/a-00.tar' and 2 more"
    )


def test_the_check_of_a_spec_names_them_and_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A spec is often checked on another machine than the one that runs it."""
    sources = [f"dataset.{name}_data_sources={tmp_path}/{name}" for name in ("train", "val")]
    assert main(["spec", "check", *sources]) == 0
    told = capsys.readouterr().err
    for name in ("train", "val"):
        assert f"dataset.{name}_data_sources: there is nothing at '{tmp_path}/{name}' on this machine." in told


def test_an_action_names_them_all_before_it_makes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [f"dataset.{name}_data_sources={tmp_path}/{name}" for name in ("train", "val")]
    assert main(["train", *sources, "train.pretrained_model_path=p.pth", f"results_dir={tmp_path}/results"]) == 2
    told = capsys.readouterr().err
    for key in ("dataset.train_data_sources", "dataset.val_data_sources", "train.pretrained_model_path"):
        assert f"{key}: there is nothing at" in told
    assert not (tmp_path / "results").exists()


def test_a_name_that_is_not_utf8_is_found_as_it_is_printed(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    assert found("train", rf"dataset.train_data_sources={tmp_path}/caf\xe9") == {}
    assert set(found("train", rf"dataset.train_data_sources={tmp_path}/caf\xe8")) == {"dataset.train_data_sources"}
