"""``mae inference``: results.csv of a classifier, embeddings.parquet of a pretrained model."""

from __future__ import annotations

import csv
import shutil
import zipfile
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import openmae
from openmae.actions.inference import _most_frequent
from openmae.cli.main import main
from openmae.data.decode import ImageFile
from openmae.data.transforms import EvalTransform
from openmae.models.normalise import Normaliser
from openmae.results.status import read_status

pytestmark = pytest.mark.xdist_group("actions")

FAMILIES = ("vit", "convnextv2", "hiera")


def test_the_terminal_counts_classes_only_if_it_hides_several():
    names = {letter: 9 - place for place, letter in enumerate("abcdefg")}
    shown = _most_frequent(Counter(names))
    assert list(shown) == ["a", "b", "c", "d", "e", "..."]
    assert shown["..."] == "2 more classes"
    del names["g"]
    assert list(_most_frequent(Counter(names))) == [*"abcdef"]
    assert _most_frequent(Counter("a")) == {"a": "1 image"}


def infer(checkpoint, source, results, *overrides):
    settings = [f"inference.checkpoint={checkpoint}", f"dataset.test_data_sources={source}", f"results_dir={results}"]
    assert main(["inference", *settings, "dataset.num_workers_per_gpu=0", *overrides]) == 0
    return results / "inference"


def model_input(folder, names, size):
    """The images as evaluation shows them to a model."""
    transform = EvalTransform((size, size))
    pictures = []
    for name in names:
        with ImageFile(folder / name) as picture:
            pictures.append(transform(picture))
    return Normaliser((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(torch.stack(pictures))


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_deterministic_and_those_of_the_backbone(trained, family, photos, tmp_path):
    run = trained(family, "pretrain")
    folder = infer(run.checkpoint, photos.plain, tmp_path)
    first = pq.read_table(folder / "embeddings.parquet")
    assert first.column_names == ["path", "vector"]
    names = first["path"].to_pylist()
    assert names == [f"{number}.png" for number in range(8)]
    vectors = np.stack(first["vector"].to_numpy())
    backbone = openmae.load_backbone(run.checkpoint)
    with torch.no_grad():
        expected = backbone(model_input(photos.plain, names, 32 if family == "vit" else 64)).numpy()
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    again = pq.read_table(infer(run.checkpoint, photos.plain, tmp_path) / "embeddings.parquet")
    assert again.equals(first)
    assert {path.name for path in folder.iterdir()} == {
        *("embeddings.parquet", "reconstructions", "report.html", "status.json", "experiment.yaml"),
    }
    statuses = [line["status"] for line in read_status(folder / "status.json")]
    assert statuses == ["STARTED", "SUCCESS"] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_are_those_of_the_model(trained, family, photos, tmp_path):
    run = trained(family, "finetune")
    folder = infer(run.checkpoint, photos.val, tmp_path)
    with (folder / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    columns = ["path", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    assert list(rows[0]) == columns
    assert [row["path"] for row in rows] == [f"{c}/{n}.png" for c in ("blue", "green", "red") for n in range(3)]
    model = openmae.load_backbone(run.checkpoint)
    with torch.no_grad():
        images = model_input(photos.val, [row["path"] for row in rows], 32 if family == "vit" else 64)
        shares = model(images).softmax(1).numpy()
    names = ("blue", "green", "red")
    for row, share in zip(rows, shares, strict=True):
        assert row["class"] == names[share.argmax()]
        assert float(row["probability"]) == pytest.approx(share.max(), abs=2e-6)
        assert sum(float(row[name]) for name in columns if name.startswith("prob")) == pytest.approx(1, abs=1e-5)
    assert {path.name for path in folder.iterdir()} == {
        *("results.csv", "predictions.png", "report.html", "status.json", "experiment.yaml"),
    }


def test_the_classes_found_are_printed(trained, photos, tmp_path, capsys):
    infer(trained("vit", "finetune").checkpoint, photos.val, tmp_path)
    text = capsys.readouterr().err
    assert "vit_tiny_patch16 (finetune) on 9 images\n" in text
    assert f"written{tmp_path}" in "".join(text.split()), "a long path may be wrapped"


def test_a_folder_of_odd_images(trained, photos, tmp_path):
    """Formats, modes, turned pictures, names with blanks, folders within folders, and files that are no pictures."""
    odd = tmp_path / "odd"
    (odd / "deep er" / "still").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(odd / "turned.JPG", exif=exif)
    image.convert("CMYK").save(odd / "press.jpeg")
    image.convert("L").save(odd / "deep er" / "grey.bmp")
    image.convert("P").save(odd / "deep er" / "still" / "palette.png")
    image.convert("RGBA").save(odd / "see through.webp")
    image.save(odd / "scan.tiff")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(odd / "deep.png")
    Image.fromarray(pixels[:1, :7]).save(odd / "sliver.png")
    (odd / "notes.txt").write_text("no picture")
    (odd / ".hidden.png").write_text("no picture")
    for stage, file in (("pretrain", "embeddings.parquet"), ("finetune", "results.csv")):
        folder = infer(trained("vit", stage).checkpoint, odd, tmp_path / stage)
        assert not (folder / "corrupt_files.txt").exists()
        rows = (
            pq.read_table(folder / file).num_rows
            if stage == "pretrain"
            else len((folder / file).open().readlines()) - 1
        )
        assert rows == 8


def test_few_corrupt_files_are_skipped_and_listed(trained, photos, tmp_path, capsys):
    shutil.copytree(photos.plain, tmp_path / "set")
    (tmp_path / "set" / "0.png").write_bytes((tmp_path / "set" / "0.png").read_bytes()[:60])
    checkpoint = trained("vit", "finetune").checkpoint
    folder = infer(checkpoint, tmp_path / "set", tmp_path, "dataset.max_corrupt_fraction=0.2")
    names = [line.split(",")[0] for line in (folder / "results.csv").read_text().splitlines()]
    assert names == ["path", *(f"{number}.png" for number in range(1, 8))]
    listed = (folder / "corrupt_files.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [str(tmp_path / "set" / "0.png")]
    assert "Notice: Skipped a corrupt image: " in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_many_corrupt_files_end_the_run(trained, stage, photos, tmp_path, refused):
    shutil.copytree(photos.plain, tmp_path / "set")
    for number in (0, 3):
        (tmp_path / "set" / f"{number}.png").write_bytes(b"no picture")
    settings = [f"inference.checkpoint={trained('vit', stage).checkpoint}", f"results_dir={tmp_path}"]
    sources = [f"dataset.test_data_sources={tmp_path / 'set'}", "dataset.num_workers_per_gpu=0"]
    text = refused("inference", [*settings, *sources])
    assert "of 8 images" in text
    assert "more than dataset.max_corrupt_fraction=0.01 allows" in text
    assert "Replace or remove the files listed in" in text


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_nothing_but_corrupt_files_ends_the_run(trained, stage, tmp_path, refused):
    (tmp_path / "set").mkdir()
    for number in range(3):
        (tmp_path / "set" / f"{number}.png").write_bytes(b"no picture")
    settings = [f"inference.checkpoint={trained('vit', stage).checkpoint}", f"results_dir={tmp_path}"]
    sources = [f"dataset.test_data_sources={tmp_path / 'set'}", "dataset.num_workers_per_gpu=0"]
    text = refused("inference", [*settings, *sources, "dataset.max_corrupt_fraction=1"])
    assert "3 of 3 images" in text
    assert "so none is left" in text


def test_an_archive_is_a_source(trained, photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "images_test.zip", "w") as archive:
        for path in photos.plain.iterdir():
            archive.write(path, f"images/{path.name}")
    folder = infer(trained("vit", "finetune").checkpoint, tmp_path / "images_test.zip", tmp_path)
    assert len((folder / "results.csv").read_text().splitlines()) == 9
