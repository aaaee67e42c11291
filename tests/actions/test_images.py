"""``dataset.max_megapixels`` and the rule of regular files act in every action that reads images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.actions.conftest import COLOURS, FAMILIES, SMALL, Train

import openmae
from openmae.cli.main import main
from openmae.errors import DataError

REASON = "(it has 1200 x 1000 = 1,200,000 pixels, more than dataset.max_megapixels=1 allows)"


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes with two images of 1.2 megapixels each."""
    folder = tmp_path_factory.mktemp("large")
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for number in range(2):
            Image.new("RGB", (1200, 1000), colour).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("action", ["train", "evaluate", "inference", "export"])
def test_every_action(
    action: str, large: Path, trained: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained("vit", "finetune").checkpoint
    source = {
        "train": [*FAMILIES["vit"], f"dataset.train_data_sources={large}"],
        "evaluate": [f"evaluate.checkpoint={model}", f"dataset.val_data_sources={large}"],
        "inference": [f"inference.checkpoint={model}", f"dataset.test_data_sources={large}"],
        "export": [
            *(f"export.checkpoint={model}", f"export.onnx_file={tmp_path / 'a.onnx'}"),
            *("export.quantize=int8", f"export.calibration.images={large}", "export.calibration.batch=4"),
        ],
    }[action]
    overrides = [*SMALL, *source, f"results_dir={tmp_path}"]
    assert main([action, *overrides, "dataset.max_megapixels=1"]) == 2
    said = capsys.readouterr().err
    assert REASON in said
    assert "Fix: To read larger images, raise dataset.max_megapixels. Replace or remove the files listed in" in said
    (tmp_path / action / "corrupt_files.txt").unlink()
    assert main([action, *overrides, "dataset.max_megapixels=2"]) == 0


@pytest.mark.parametrize("command", ["check", "pack"])
def test_dataset_commands(command: str, large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--results_dir", str(tmp_path)] if command == "check" else [str(tmp_path)]
    code = main(["dataset", command, str(large), *where, "--max-megapixels", "1"])
    said = capsys.readouterr()
    if command == "check":
        assert code == 0
        assert f"{large / 'red' / '1.png'}\t{REASON[1:-1]}" in (tmp_path / "corrupt_files.txt").read_text()
    else:
        assert code == 2
        assert REASON in said.err
    assert main(["dataset", command, str(large), *where, "--max-megapixels", "2"]) == 0


def test_read_images(large: Path, trained: Train) -> None:
    card = openmae.open_predictor(trained("vit", "finetune").checkpoint).card
    path = large / "red" / "0.png"
    with pytest.raises(DataError) as caught:
        openmae.read_images([path], card, max_megapixels=1)
    assert caught.value.problem == f"{path} has 1200 x 1000 = 1,200,000 pixels, more than max_megapixels=1 allows."
    assert caught.value.fix == "Pass a larger max_megapixels if you trust the file, or make the image smaller."
    images = openmae.read_images([path], card, max_megapixels=1.2)
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor(COLOURS["red"], dtype=torch.uint8))


def test_read_images_names_what_is_wrong(tmp_path: Path, trained: Train, caplog: pytest.LogCaptureFixture) -> None:
    card = openmae.open_predictor(trained("vit", "finetune").checkpoint).card
    (tmp_path / "a.png").write_bytes(b"%PDF-1.7")
    with pytest.raises(DataError, match=r"a\.png cannot be read: its content is a PDF file, not an image"):
        openmae.read_images([tmp_path / "a.png"], card)
    page = Image.new("RGB", (40, 40))
    page.save(tmp_path / "b.tif", save_all=True, append_images=[page])
    assert openmae.read_images([tmp_path / "b.tif"], card).shape[0] == 1
    assert f"{tmp_path / 'b.tif'} has several pages, of which only the first is read." in caplog.text


Refused = Callable[[str, Sequence[str]], str]


def test_special_files_are_named(tmp_path: Path, refused: Refused, trained: Train) -> None:
    for name in ("set.zip", "spec.yaml", "model.pth", "key"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    model = trained("vit", "finetune").checkpoint
    source = f"dataset.test_data_sources={tmp_path / 'set.zip'}"
    request = [*SMALL, source, f"results_dir={tmp_path}"]
    said = refused("inference", [*request, f"inference.checkpoint={model}"])
    assert f"dataset.test_data_sources: {tmp_path / 'set.zip'} is a named pipe (FIFO)." in said
    for name, kind in (("model.pth", "a named pipe (FIFO)"), ("zero.pth", "a device")):
        said = refused("inference", [*request, f"inference.checkpoint={tmp_path / name}"])
        assert f"inference.checkpoint: {tmp_path / name} is {kind}, not a checkpoint." in said
    said = refused("inference", ["-e", str(tmp_path / "spec.yaml")])
    assert f"{tmp_path / 'spec.yaml'} cannot be read: it is a pipe without a writer." in said
    encrypted = f"encryption_key=file:{tmp_path / 'key'}"
    said = refused("inference", [*request, f"inference.checkpoint={model}", encrypted])
    assert "cannot be read (it is a pipe without a writer)" in said
