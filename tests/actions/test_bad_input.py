"""Invalid input ends with exit code 2 and a message with rule, value and fix, before anything is trained."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from openmae.cli.main import main
from openmae.results.status import read_status

pytestmark = pytest.mark.xdist_group("actions")

Refused = Callable[[str, Sequence[str]], str]

PLAIN = ("dataset.train_data_sources={photos.plain}", "dataset.batch_size=4", "model.arch=vit_tiny_patch16")
SIZED = (*PLAIN, "dataset.augmentation.input_size=32", "dataset.num_workers_per_gpu=0")
CLASSES = (*SIZED, "dataset.train_data_sources={photos.train}", "train.stage=finetune")
EVALUATE = ("dataset.val_data_sources={photos.val}", "dataset.batch_size=4", "dataset.num_workers_per_gpu=0")
INFER = ("dataset.test_data_sources={photos.plain}", "dataset.batch_size=4", "dataset.num_workers_per_gpu=0")
PRE, FINE = "checkpoint={vit_pretrain}", "checkpoint={vit_finetune}"

#: action, overrides, parts of the text
SPEC_MISTAKES = [
    ("train", (*PLAIN, "train.optim.learning_rate=1"), ("there is no such key", "Did you mean train.optim.")),
    ("train", (*PLAIN, "train.num_epochs=many"), ("train.num_epochs", "must be an integer >= 1, got 'many'")),
    ("train", (*PLAIN, "train.optim.lr=7"), ("train.optim.lr", "must be a number > 0 and <= 1, got 7")),
    ("train", ("model.arch=vit_tiny_patch16",), ("dataset.train_data_sources", "`mae train` needs it", "Example:")),
    ("evaluate", EVALUATE, ("evaluate.checkpoint", "it is not set (or evaluate.trt_engine)")),
    (
        "train",
        (*PLAIN, "train.recipe=tao", "dataset.augmentation.input_size=40"),
        ("must be a multiple of 16", "got 40x40", "The nearest sizes: 40 -> 32 or 48."),
    ),
    (
        "train",
        (*SIZED, "model.arch=hiera_tiny_224", "dataset.augmentation.input_size=[64,80]"),
        ("must be a multiple of 32, the side of hiera_tiny_224's mask units, got 64x80", "80 -> 64 or 96"),
    ),
    (
        "train",
        (*SIZED, "train.recipe=tao", "model.mask_ratio=0.9"),
        ("0.9 leaves 0 of 4 visible", "Use a ratio from 0.25 to 0.75"),
    ),
    (
        "train",
        (*SIZED, "train.recipe=tao", "train.mask_ratio=1e-12"),
        ("must leave some mask units visible and some masked", "4 of 4"),
    ),
    (
        "train",
        (*SIZED, "train.recipe=tao", "dataset.augmentation.input_size=16"),
        ("leaves 0 of 1 visible", "32 or more"),
    ),
    (
        "train",
        (*CLASSES, "dataset.batch_size=3", "dataset.augmentation.mixup=0.8"),
        ("it must be even, got 3", "Use 4, or turn both off", "mixup=0"),
    ),
    ("export", ("export.format=xdl",), ("export.checkpoint", "export.onnx_file", "only onnx can be written, got xdl")),
]

DATA_MISTAKES = [
    (
        "train",
        (*SIZED, "dataset.train_data_sources={photos.root}/plane"),
        ("dataset.train_data_sources: There is no file or folder", "Did you mean plain?"),
    ),
    ("train", (*SIZED, "dataset.train_data_sources={made}/empty"), ("is empty", "Put images into it")),
    (
        "train",
        (*SIZED, "dataset.train_data_sources={made}/texts"),
        ("holds no images (", "but 1 .txt (such as notes.txt)", "name another folder"),
    ),
    (
        "train",
        (*SIZED, "dataset.train_data_sources={made}/empty.zip"),
        ("dataset.train_data_sources: The archive", "holds no files"),
    ),
    (
        "train",
        (*SIZED, "dataset.batch_size=9"),
        (
            "dataset.batch_size: The training set has 8 images, fewer than one batch of 9",
            "Set dataset.batch_size to 8 or less",
        ),
    ),
    (
        "train",
        (*CLASSES, "dataset.val_data_sources={made}/unknown"),
        (
            "dataset.val_data_sources has 1 class that dataset.train_data_sources does not have: mauve",
            "Rename or remove them; the classes of dataset.train_data_sources are: blue, green, red.",
        ),
    ),
    (
        "train",
        (*CLASSES, "dataset.train_data_sources={photos.one_class}"),
        ("needs two classes or more", "has one: red", "add images of another class"),
    ),
    (
        "train",
        (*CLASSES, "dataset.train_data_sources={photos.plain}"),
        ("have no labels: 8 of 8 images are outside of class folders", "labels.csv"),
    ),
    (
        "train",
        (*CLASSES, "model.num_classes=10"),
        ("model.num_classes is 10, but the data has 3 classes: blue, green, red", "set it to 3"),
    ),
    ("train", (*CLASSES, "train.freeze=[stem]"), ("stem", "train.freeze")),
    (
        "evaluate",
        (*EVALUATE, f"evaluate.{FINE}", "dataset.val_data_sources={made}/unknown"),
        ("1 class that the checkpoint does not have: mauve", "classes of the checkpoint are: blue, green, red"),
    ),
    ("inference", (*INFER, f"inference.{FINE}", "dataset.test_data_sources={made}/none"), ("There is no file",)),
]

CHECKPOINT_MISTAKES = [
    *(
        (
            action,
            (*sources, f"{action}.{held}", f"train.stage={asked}"),
            (f"train.stage is {asked}, but {action}.checkpoint", f"holds train.stage={stage}", "Remove train.stage"),
        )
        for action, sources in (("evaluate", EVALUATE), ("inference", INFER))
        for held, stage, asked in ((PRE, "pretrain", "finetune"), (FINE, "finetune", "pretrain"))
    ),
    (
        "evaluate",
        (*EVALUATE, f"evaluate.{PRE}", "model.arch=vit_small_patch16"),
        ("model.arch is vit_small_patch16, but evaluate.checkpoint", "holds model.arch=vit_tiny_patch16"),
    ),
    ("inference", (*INFER, f"inference.{FINE}", "model.num_classes=9"), ("model.num_classes is 9", "num_classes=3")),
    ("inference", (*INFER, f"inference.{PRE}", "model.in_chans=1"), ("model.in_chans is 1", "model.in_chans=3")),
    (
        "inference",
        (*INFER, f"inference.{PRE}", "model.arch=vit_tiny_patch16", "model.patch_size=8"),
        ("model.patch_size is 8", "model.patch_size=16"),
    ),
    (
        "evaluate",
        (*EVALUATE, f"evaluate.{FINE}", "dataset.augmentation.mean=[0.1,0.1,0.1]"),
        ("dataset.augmentation.mean is (0.1, 0.1, 0.1)", "mean=(0.485, 0.456, 0.406)"),
    ),
    (
        "evaluate",
        (*EVALUATE, f"evaluate.{PRE}", "dataset.augmentation.input_size=40"),
        ("input size 40x40 is not a multiple of 16", "vit_tiny_patch16's units", "Use 32x32"),
    ),
    (
        "evaluate",
        (*EVALUATE, f"evaluate.{PRE}", "train.mask_ratio=0.95"),
        ("model.mask_ratio", "0.95 of 4 leaves no unit visible"),
    ),
    *(
        (action, (*sources, f"{action}.checkpoint={{made}}/{name}"), (f"{action}.checkpoint: ", name, text))
        for action, sources in (("evaluate", EVALUATE), ("inference", INFER))
        for name, text in (
            ("none.pth", "No checkpoint at"),
            ("cut.pth", "is truncated or damaged"),
            ("text.pth", "begins with the text 'hello"),
            ("nothing.pth", "is empty (0 bytes)"),
        )
    ),
    (
        "evaluate",
        (*EVALUATE, "evaluate.checkpoint={made}/timm.pth"),
        ("evaluate.checkpoint: ", "holds weights written by another program", "train.pretrained_model_path"),
    ),
    (
        "evaluate",
        (*EVALUATE, "evaluate.checkpoint={made}/model.onnx"),
        ("evaluate.checkpoint: ", "model.onnx is not an ONNX file, or damaged", "Export it again with mae export"),
    ),
    (
        "inference",
        (*INFER, "inference.trt_engine={made}/model.engine"),
        ("inference.trt_engine: ", "model.engine"),
    ),
    (
        "train",
        (*SIZED, "model.arch=vit_small_patch16", "train.pretrained_model_path={vit_pretrain}"),
        ("train.pretrained_model_path: ", "holds vit_tiny_patch16, but model.arch is vit_small_patch16"),
    ),
    *(
        ("train", (*SIZED, f"train.{key}={{made}}/{name}"), (f"{prefix}", name, text))
        for key, prefix, names in (
            (
                "pretrained_model_path",
                "train.pretrained_model_path: ",
                (("none.pth", "No checkpoint at"), ("cut.pth", "is truncated"), ("text.pth", "begins with the text")),
            ),
            (
                "resume_training_checkpoint_path",
                "train.resume_training_checkpoint_path: ",
                (
                    ("none.pth", "No checkpoint at"),
                    ("cut.pth", "is truncated or damaged"),
                    ("text.pth", "begins with the text"),
                    ("timm.pth", "holds no training state"),
                ),
            ),
        )
        for name, text in names
    ),
    (
        "train",
        (*CLASSES, "train.resume_training_checkpoint_path={vit_pretrain}"),
        ("cannot resume from", "train.stage was pretrain and is finetune", "begin a new run: set another results_dir"),
    ),
    (
        "train",
        (*SIZED, "train.resume_training_checkpoint_path={vit_pretrain}", "model.arch=vit_small_patch16"),
        ("cannot resume from", "model.arch was vit_tiny_patch16 and is vit_small_patch16"),
    ),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory, trained, photos) -> Path:
    """Files and folders that cannot be used."""
    made = tmp_path_factory.mktemp("made")
    (made / "empty").mkdir()
    (made / "texts").mkdir()
    (made / "texts" / "notes.txt").write_text("no picture")
    zipfile.ZipFile(made / "empty.zip", "w").close()
    shutil.copytree(photos.val, made / "unknown")
    (made / "unknown" / "red").rename(made / "unknown" / "mauve")
    whole = trained("vit", "pretrain").checkpoint.read_bytes()
    (made / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (made / "text.pth").write_text("hello, I am no checkpoint")
    (made / "nothing.pth").write_bytes(b"")
    (made / "model.onnx").write_bytes(b"onnx")
    (made / "model.engine").write_bytes(b"engine")
    state = torch.load(trained("vit", "pretrain").checkpoint, weights_only=True)["state_dict"]
    inside = "model.encoder.backbone."
    torch.save({k.removeprefix(inside): v for k, v in state.items() if k.startswith(inside)}, made / "timm.pth")
    return made


@pytest.fixture
def fill(photos, trained, made):
    """Put the tests' files into overrides."""

    def fill(overrides: Sequence[str]) -> list[str]:
        names = {f"vit_{stage}": trained("vit", stage).checkpoint for stage in ("pretrain", "finetune")}
        return [override.format(photos=photos, made=made, **names) for override in overrides]

    return fill


@pytest.mark.parametrize(("action", "overrides", "parts"), SPEC_MISTAKES)
def test_a_mistake_in_the_spec(action, overrides, parts, fill, refused: Refused, tmp_path):
    text = refused(action, [*fill(overrides), f"results_dir={tmp_path / 'results'}"])
    for part in parts:
        assert part in text
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("action", "overrides", "parts"), [*DATA_MISTAKES, *CHECKPOINT_MISTAKES])
def test_a_mistake_that_is_found_later(action, overrides, parts, fill, refused: Refused, tmp_path):
    folder = tmp_path / "results" / action
    folder.mkdir(parents=True)
    before = {"experiment.yaml": "earlier", "report.html": "earlier", "corrupt_files.txt": "earlier\n"}
    for name, text in before.items():
        (folder / name).write_text(text)
    error = refused(action, [*fill(overrides), "wandb.enable=false", f"results_dir={tmp_path / 'results'}"])
    for part in parts:
        assert part in error
    assert "\n  Fix: " in error
    assert error.count("Fix: ") == 1
    *_, last = read_status(folder / "status.json")
    assert last["status"] == "FAILURE"
    assert last["message"].partition(": ")[2] in error
    assert {name: (folder / name).read_text() for name in before} == before
    assert {path.name for path in folder.iterdir()} == {*before, "status.json"}


@pytest.mark.parametrize("action", ["train", "evaluate", "inference"])
@pytest.mark.parametrize("place", ["file", "proc"])
def test_a_results_folder_that_cannot_be_written(action, place, fill, refused: Refused, tmp_path):
    (tmp_path / "file").write_text("a file")
    folder = {"file": tmp_path / "file", "proc": Path("/proc/openmae")}[place]
    overrides = {
        "train": SIZED,
        "evaluate": (*EVALUATE, f"evaluate.{PRE}"),
        "inference": (*INFER, f"inference.{PRE}"),
    }[action]
    text = refused(action, [*fill(overrides), f"results_dir={folder}"])
    assert text.startswith(f"results_dir: cannot write to '{folder}/{action}' (")
    assert "Fix: Set results_dir to a folder that you may write to." in text
    assert (tmp_path / "file").read_text() == "a file"


def test_a_full_disk_is_told(monkeypatch, fill, tmp_path, capsys):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "embeddings.parquet")

    monkeypatch.setattr("openmae.actions.inference._write_embeddings", full)
    assert main(["inference", *fill([*INFER, f"inference.{PRE}"]), f"results_dir={tmp_path}"]) == 1
    text = capsys.readouterr().err
    assert "The results could not be written (No space left on device): embeddings.parquet." in text
    assert "Free space, or set results_dir to a folder on another disk." in text
    assert read_status(tmp_path / "inference" / "status.json")[-1]["status"] == "FAILURE"


def test_a_run_goes_on_only_as_what_it_was(trained, photos, fill, refused: Refused, tmp_path):
    folder = tmp_path / "train"
    shutil.copytree(trained("vit", "pretrain").folder, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.name != "status.json"}
    text = refused("train", [*fill(CLASSES), f"results_dir={tmp_path}"])
    assert f"results_dir: training cannot resume from {folder}/model_epoch_001_step_00002.pth: " in text
    assert "train.stage was pretrain and is finetune." in text
    text = refused("train", [*trained("vit", "pretrain").overrides, "model.mask_ratio=.5", f"results_dir={tmp_path}"])
    assert "model.mask_ratio was 0.75 and is 0.5." in text
    assert {path: path.read_bytes() for path in before} == before


def test_a_small_validation_set_is_fine(fill, photos, tmp_path):
    overrides = [*fill(CLASSES), "train.num_epochs=1", "dataset.augmentation.auto_aug=''", "wandb.enable=false"]
    small = tmp_path / "val"
    for name in ("blue", "green", "red"):
        (small / name).mkdir(parents=True)
        shutil.copy(photos.val / name / "0.png", small / name)
    assert main(["train", *overrides, f"dataset.val_data_sources={small}", f"results_dir={tmp_path}"]) == 0
