"""Names that no text can hold, files that are not read, loose files and missing classes, from training to inference."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from openmae.cli.main import main
from openmae.results.metrics_csv import read_metrics
from openmae.storage.printable import original_name

from .conftest import FAMILIES, SMALL, SMALL_DECODER

pytestmark = pytest.mark.xdist_group("actions")

TINY = (*SMALL, *FAMILIES["vit"], *SMALL_DECODER)
FINETUNE = ("train.stage=finetune", "dataset.augmentation.auto_aug=''")
CLASSES = ("=SUM(A1)", "@x", "-1", "plain", "'quoted")
FILES = (
    b"a;=1+1.png",
    b"caf\xe9.png",
    b"new\nline.png",
    b"tab\there.png",
    b"-dash.png",
    b"<b>.png",
    b"c,'\".png",
    b"\\xe9.png",
)


def run(action: str, results: Path, *overrides: str) -> Path:
    assert main([action, *overrides, *(TINY if action == "train" else SMALL[1:3]), f"results_dir={results}"]) == 0
    return results / action


def newest(folder: Path) -> Path:
    return max(folder.glob("model_epoch_*.pth"))


@pytest.fixture
def odd(photos, tmp_path) -> Path:
    """Class folders and files whose names are formulas, or no text, and some corrupt files."""
    folder = tmp_path / "odd"
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for file in FILES if number == 0 else FILES[:2]:
            shutil.copy(photos.plain / "0.png", folder / name / os.fsdecode(file))
    for name in (b"bad\xe9.png", b"bad\n.png"):
        (folder / "plain" / os.fsdecode(name)).write_bytes(b"no image")
    return folder


def paths_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.png") if not path.name.startswith("bad")}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return [{name: cell.removeprefix("'") for name, cell in row.items()} for row in csv.DictReader(stream)]


def test_odd_names_from_training_to_inference(odd: Path, tmp_path: Path) -> None:
    allowed = "dataset.max_corrupt_fraction=0.5"
    sources = [f"dataset.{part}_data_sources={odd}" for part in ("train", "val", "test")]
    trained = run("train", tmp_path / "fine", *sources, allowed, *FINETUNE)
    listed = (trained / "corrupt_files.txt").read_text(encoding="utf-8").splitlines()
    assert {line.split("\t")[0] for line in listed} == {f"{odd}/plain/bad\\xe9.png", f"{odd}/plain/bad\\x0a.png"}
    key = f"checkpoint={newest(trained)}"
    run("evaluate", tmp_path / "fine", *sources, allowed, f"evaluate.{key}")
    rows = table(run("inference", tmp_path / "fine", *sources, allowed, f"inference.{key}") / "results.csv")
    assert {original_name(row["path"]) for row in rows} == paths_below(odd)
    assert {row["class"] for row in rows} <= set(CLASSES)
    trained = run("train", tmp_path / "pre", *sources, allowed)
    folder = run("inference", tmp_path / "pre", *sources, allowed, f"inference.checkpoint={newest(trained)}")
    names = pq.read_table(folder / "embeddings.parquet")["path"].to_pylist()
    assert {original_name(name) for name in names} == paths_below(odd)


def test_no_cell_of_the_results_is_a_formula(odd: Path, tmp_path: Path) -> None:
    sources = [f"dataset.{part}_data_sources={odd}" for part in ("train", "test")]
    allowed = "dataset.max_corrupt_fraction=0.5"
    trained = run("train", tmp_path, *sources, allowed, *FINETUNE)
    results = run("inference", tmp_path, *sources, allowed, f"inference.checkpoint={newest(trained)}") / "results.csv"
    for delimiter in ",;":
        with results.open(newline="", encoding="utf-8") as stream:
            cells = [cell for row in csv.reader(stream, delimiter=delimiter) for cell in row]
        formulas = [cell for cell in cells if cell.startswith(("=", "+", "-", "@")) and cell != "-1"]
        assert not formulas, f"separated by {delimiter!r}"


def test_odd_names_are_checked_and_packed(odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "check", str(odd), "--results_dir", str(tmp_path / "checked")]) == 0
    assert "2 (11.11%)" in capsys.readouterr().out
    page = (tmp_path / "checked" / "report.html").read_text(encoding="utf-8")
    assert "caf\\xe9.png" in page
    assert "&lt;b&gt;.png" in (
        page + (tmp_path / "checked" / "duplicate_files.txt").read_text().replace("<b>", "&lt;b&gt;")
    )
    assert main(["dataset", "pack", str(odd), str(tmp_path / "packed")]) == 0
    assert main(["dataset", "check", str(tmp_path / "packed"), "--results_dir", str(tmp_path / "again")]) == 0


def test_reports_count_the_unreadable_images(odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [f"dataset.{part}_data_sources={odd}" for part in ("train", "val", "test")]
    allowed = "dataset.max_corrupt_fraction=0.5"
    folders = [run("train", tmp_path, *sources, allowed, *FINETUNE)]
    for action in ("evaluate", "inference"):
        capsys.readouterr()
        folders.append(run(action, tmp_path, *sources, allowed, f"{action}.checkpoint={newest(folders[0])}"))
        assert "(finetune) on 18 images, 2 of them unreadable" in notices(capsys)
    for folder in folders:
        text = (folder / "report.html").read_text(encoding="utf-8")
        assert f"{odd}: 18 images, 2 of them unreadable." in text
        assert "corrupt_files.txt names them" in text
    assert "Evaluated on 18 images, 2 of them unreadable" in (folders[1] / "status.json").read_text()


def notices(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_files_that_are_not_read_are_named_at_the_start_and_in_every_report(
    photos, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(photos.train, folder)
    for number in range(3):
        (folder / "red" / f"IMG_{number}.cr2").touch()
    sources = [f"dataset.{part}_data_sources={folder}" for part in ("train", "val", "test")]
    trained = run("train", tmp_path, *sources, *FINETUNE)
    text = "12 images are found; 3 files of other kinds are skipped: 3 .cr2 (such as red/IMG_0.cr2)."
    assert notices(capsys).count(text) == 2, "of training and of validation"
    run("evaluate", tmp_path, *sources, f"evaluate.checkpoint={newest(trained)}")
    run("inference", tmp_path, *sources, f"inference.checkpoint={newest(trained)}")
    assert notices(capsys).count(text) == 2
    for action in ("train", "evaluate", "inference"):
        page = (tmp_path / action / "report.html").read_text(encoding="utf-8")
        assert "Files that are not read" in page
        assert "red/IMG_0.cr2" in page


def test_validation_images_may_lack_a_class(photos, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = (f"dataset.train_data_sources={photos.train}", f"dataset.val_data_sources={photos.two_classes}")
    trained = run("train", tmp_path, *sources, *FINETUNE)
    assert (
        "Notice: dataset.val_data_sources has no images of 1 of the 3 classes of dataset.train_data_sources: green."
        in notices(capsys)
    )
    facts = torch.load(newest(trained), weights_only=True)["openmae"]
    assert list(facts["class_names"]) == ["blue", "green", "red"]
    validated = [row["ACC_all"] for row in read_metrics(trained / "metrics.csv") if "ACC_all" in row]
    run("evaluate", tmp_path, sources[1], f"evaluate.checkpoint={newest(trained)}")
    assert validated[-1] in (0, 0.5, 1)
    page = (tmp_path / "evaluate" / "report.html").read_text(encoding="utf-8")
    assert "green" in page


def test_an_unlabelled_file_does_not_change_the_accuracy(
    photos, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "val"
    shutil.copytree(photos.val, folder)
    found: dict[str, Sequence[float]] = {}
    for case in ("without", "with"):
        if case == "with":
            shutil.copy(photos.plain / "0.png", folder / "zz.png")
        sources = (f"dataset.train_data_sources={photos.plain}", f"dataset.val_data_sources={folder}")
        metrics = read_metrics(run("train", tmp_path / case, *sources) / "metrics.csv")
        _, found[case] = [(row["knn_acc"], row["probe_acc"]) for row in metrics if "knn_acc" in row]
    assert found["with"] == found["without"]
    assert "1 of 10 images are outside of the 3 class folders and have no label: zz.png." in notices(capsys)


def test_training_in_the_folder_of_the_images_reads_the_same_twice(
    photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos.plain, tmp_path / "photos")
    monkeypatch.chdir(tmp_path / "photos")
    for epochs in (1, 2):
        assert main(["train", *TINY, "dataset.train_data_sources=.", f"train.num_epochs={epochs}"]) == 0
        text = notices(capsys)
        assert "8 to train" in text
        assert f"{tmp_path}/photos: results of OpenMAE are not read as images: results/train." in text
        assert "are not those that checkpoint" not in text
    assert Path("results/train/curves.png").exists()
