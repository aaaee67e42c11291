"""The files of a results folder, and the choice of the model that a child job takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmae.errors import CheckpointError
from openmae.jobs.artifacts import (
    Artifact,
    artifact,
    choose_model,
    list_folder,
    list_outputs,
    newest_checkpoint,
    remove,
)

_numbered = st.builds("model_epoch_{:03d}_step_{:05d}.pth".format, st.integers(0, 2000), st.integers(0, 10**7))
_noise = st.sampled_from(
    ["backbone.safetensors", "experiment.yaml", "status.json", "report.html", "vit_tiny_patch16_latest.pth", "a.onnx"]
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model_epoch_001_step_00012.pth", "checkpoint"),
        ("model_best.pth", "checkpoint"),
        ("vit_tiny_patch16_latest.pth", "checkpoint"),
        ("model.onnx", "onnx"),
        ("MODEL.ONNX", "onnx"),
        ("model.engine", "engine"),
        ("model.engine.json", "other"),
        ("backbone.safetensors", "weights"),
        ("experiment.yaml", "spec"),
        ("status.json", "status"),
        ("metrics.csv", "metrics"),
        ("results.csv", "predictions"),
        ("report.html", "report"),
        ("last.png", "image"),
        ("events.out.tfevents.1.host.2.0", "events"),
        ("notes.txt", "other"),
    ],
)
def test_the_kind_comes_from_the_name(name: str, kind: str) -> None:
    assert artifact(f"s3://bucket/x/{name}").kind == kind


def test_epoch_and_step_come_from_the_name() -> None:
    found = artifact("/r/model_epoch_1000_step_123456.pth")
    assert (found.epoch, found.step, found.best, found.latest) == (1000, 123456, False, False)
    assert artifact("/r/model_best.pth").best
    assert artifact("/r/hiera_tiny_224_latest.pth").latest


def test_a_folder_is_listed_without_incomplete_files(tmp_path: Path) -> None:
    assert list_folder(str(tmp_path / "nowhere")) == []
    (tmp_path / "sub").mkdir()
    for name in ("model_epoch_000_step_00003.pth", ".model_best.pth.tmp", "sub/last.png"):
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "vit_latest.pth").symlink_to("model_epoch_000_step_00003.pth")
    (tmp_path / "dangling.pth").symlink_to("gone.pth")
    found = list_folder(str(tmp_path))
    assert [(item.name, item.kind, item.size, item.link) for item in found] == [
        ("model_epoch_000_step_00003.pth", "checkpoint", 5, False),
        ("last.png", "image", 5, False),
        ("vit_latest.pth", "checkpoint", 5, True),
    ]
    remove(found)
    assert list_folder(str(tmp_path)) == []


def test_only_the_results_folder_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output file may be in the user's home folder."""
    (tmp_path / "results").mkdir()
    for name in ("results/status.json", "mine.onnx", "other.onnx"):
        (tmp_path / name).touch()
    walk, seen = os.walk, []
    monkeypatch.setattr("os.walk", lambda folder: seen.append(folder) or walk(folder))
    outputs = [str(tmp_path / name) for name in ("mine.onnx", "missing.onnx", "results/status.json")]
    assert [item.name for item in list_outputs(str(tmp_path / "results"), outputs)] == ["status.json", "mine.onnx"]
    assert seen == [tmp_path / "results"]


@given(st.lists(_numbered | _noise, unique=True), st.booleans())
def test_the_best_checkpoint_or_else_the_newest_is_chosen(names: list[str], best: bool) -> None:
    files = [artifact(f"/r/{name}", modified=float(age)) for age, name in enumerate(names)]
    files += [artifact("/r/model_best.pth")] if best else []
    numbers = sorted((int(n[12:].split("_")[0]), int(n[:-4].rpartition("_")[2]), n) for n in names if "epoch" in n)
    newest = newest_checkpoint(files)
    assert (newest.name if newest else None) == (numbers[-1][2] if numbers else None)
    latest = "vit_tiny_patch16_latest.pth"
    expected = "model_best.pth" if best else numbers[-1][2] if numbers else latest if latest in names else None
    if expected is None:
        with pytest.raises(CheckpointError, match="has no checkpoint"):
            choose_model(files, ("checkpoint",), (), "the parent")
    else:
        assert choose_model(files, ("checkpoint",), (), "the parent")[0].name == expected


def test_steps_are_compared_as_numbers() -> None:
    files = [artifact(f"/r/model_epoch_{epoch}_step_{step}.pth") for epoch, step in ((999, 5), (1000, 10), (1000, 9))]
    chosen, why = choose_model(files, ("checkpoint",), (), "the parent")
    assert (chosen.epoch, chosen.step) == (1000, 10)
    assert why == "the parent's newest: epoch 1000, step 10; it has no best"


def test_the_file_named_in_the_parents_spec_comes_first() -> None:
    files = [artifact("/r/export/other.onnx", modified=9.0), artifact("/r/export/mine.onnx", modified=1.0)]
    assert choose_model(files, ("onnx",), ("/r/export/mine.onnx",), "p")[0].name == "mine.onnx"
    assert choose_model(files, ("onnx",), (), "p")[0].name == "other.onnx"


def _refusal(files: list[Artifact], kinds: tuple[str, ...] = ("checkpoint",)) -> str:
    with pytest.raises(CheckpointError) as caught:
        choose_model(files, kinds, (), "job 1 (train, ERROR)")
    return str(caught.value)


def test_an_error_lists_the_artifacts_if_none_fits() -> None:
    assert _refusal([]) == (
        "parent_job_id: job 1 (train, ERROR) has no checkpoint (.pth). It is empty.\n"
        "  Fix: Wait for the parent to finish, or look at its log with `mae jobs logs`."
    )
    assert "It has status.json (status), a.onnx (onnx)." in _refusal(
        [artifact("/r/status.json"), artifact("/r/a.onnx")]
    )
    assert "has no .engine file or .onnx file." in _refusal([artifact("/r/x.pth")], ("engine", "onnx"))
    many = _refusal([artifact(f"/r/{number}.png") for number in range(20)])
    assert "11.png (image) and 8 more." in many


def test_a_checkpoint_with_another_name_is_not_chosen() -> None:
    text = _refusal([artifact("/r/weights.pth")])
    assert "It has weights.pth (checkpoint)." in text
    assert "Fix: Set the key in the spec, for example to /r/weights.pth." in text
