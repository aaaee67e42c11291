"""The public API of ``import openmae``."""

from __future__ import annotations

import dataclasses
import doctest
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import openmae
from openmae.errors import SpecError


@pytest.mark.integration
def test_importing_is_free_of_torch() -> None:
    code = (
        "import sys, openmae; assert openmae.train and openmae.__version__;"
        "heavy = {'torch', 'numpy', 'pydantic', 'lightning_fabric', 'timm', 'openmae.spec'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_offered_is_there() -> None:
    for name in openmae.__all__:
        assert getattr(openmae, name)
    assert dir(openmae) == sorted(openmae.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = openmae.trian  # type: ignore[attr-defined]


@pytest.mark.parametrize("action", ["train", "evaluate", "inference"])
def test_a_path_a_dict_and_a_spec_mean_the_same(action: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    received = []
    monkeypatch.setattr(f"openmae.actions.{action}.run", lambda spec, **_: received.append(spec) or {"metric": 1.0})
    part = {"train": "train", "evaluate": "val", "inference": "test"}[action]
    values = {"dataset": {f"{part}_data_sources": "photos"}, action: {"results_dir": "here"}}
    overrides = ["train.seed=3"] + ([] if action == "train" else [f"{action}.checkpoint=a.pth"])
    path = tmp_path / "spec.yaml"
    path.write_text(f"dataset: {{{part}_data_sources: photos}}\n{action}: {{results_dir: here}}\n")
    function = getattr(openmae, action)
    for source in (values, path, str(path), openmae.load_spec(values)):
        assert function(source, overrides) == {"metric": 1.0}
    assert all(spec == received[0] for spec in received)
    assert received[0].train.seed == 3
    assert received[0].results_folder(action) == "here"


def test_a_wrong_spec_is_a_value_error() -> None:
    with pytest.raises(SpecError, match=r"dataset.train_data_sources: `mae train` needs it"):
        openmae.train({})
    with pytest.raises(ValueError, match="there is no such key"):
        openmae.evaluate({"evaluate": {"checkpint": "x"}})
    with pytest.raises(SpecError, match="A spec is a path, a mapping or an ExperimentSpec, got int"):
        openmae.inference(3)  # type: ignore[arg-type]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[openmae.ExperimentSpec]:
    """Replace training; returns the specs that it receives."""
    received: list[openmae.ExperimentSpec] = []
    monkeypatch.setattr("openmae.actions.train.run", lambda spec, **_: received.append(spec) or {"train_loss": 0.5})
    return received


def test_the_result_of_training_is_a_frozen_mapping_with_paths(trained: list[openmae.ExperimentSpec]) -> None:
    result = openmae.train(
        {}, ["dataset.train_data_sources=photos", "results_dir=s3://b/runs", "model.arch=hiera_tiny_224"]
    )
    assert (result["train_loss"], dict(result), len(result)) == (0.5, {"train_loss": 0.5}, 1)
    assert result.folder == "s3://b/runs/train"
    assert result.backbone == "s3://b/runs/train/backbone.safetensors"
    assert result.best_checkpoint == "s3://b/runs/train/model_best.pth"
    assert result.last_checkpoint == "s3://b/runs/train/hiera_tiny_224_latest.pth"
    assert result.report == "s3://b/runs/train/report.html"
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.folder = "x"  # type: ignore[misc]


def test_keywords_become_config_options(trained: list[openmae.ExperimentSpec], tmp_path: Path) -> None:
    openmae.pretrain(
        tmp_path / "my photos, all", "runs/a", arch="vit_tiny_patch16", image_size=(64, 32), num_epochs=7, batch_size=3,
        learning_rate=0.001, val_images="val",
        options={"train.precision": "bf16", "dataset.augmentation.mean": [0.1, 0.2, 0.3]},
    )  # fmt: skip
    openmae.finetune("labelled", "runs/b", weights=Path("a/backbone.safetensors"), batch_size=4)
    first, second = trained
    assert first.dataset.train_data_sources == str(tmp_path / "my photos, all")
    assert (first.train.stage, first.results_dir, first.model.arch) == ("pretrain", "runs/a", "vit_tiny_patch16")
    assert (first.dataset.augmentation.size, first.train.num_epochs, first.dataset.batch_size) == ((64, 32), 7, 3)
    assert (first.train.optim.lr, first.dataset.val_data_sources, first.train.precision) == (0.001, "val", "bf16")
    assert first.dataset.augmentation.mean == (0.1, 0.2, 0.3)
    assert (second.train.stage, second.train.pretrained_model_path) == ("finetune", "a/backbone.safetensors")
    assert second.train.num_epochs == openmae.ExperimentSpec().train.num_epochs
    with pytest.raises(SpecError, match=r"model\.arch"):
        openmae.pretrain("photos", "runs/c", arch="vit_tiny")


def test_architectures_and_models() -> None:
    assert len(openmae.list_architectures()) == 19
    assert openmae.list_architectures("hiera")[0] == "hiera_tiny_224"
    model = openmae.build_autoencoder("convnextv2_atto", (64, 96), in_chans=1)
    assert isinstance(model, openmae.MaskedAutoencoder)
    assert model.num_units == 6
    with pytest.raises(SpecError, match="must be a multiple of 16"):
        openmae.build_autoencoder("vit_tiny_patch16", 50)


@pytest.mark.integration
def test_jobs_and_errors_are_attributes() -> None:
    code = "import openmae; print(openmae.jobs.Client.__name__, openmae.errors.SpecError.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Client SpecError\n"


WITHOUT_DATA = {"TrainResult", "OpenMAEError", "list_architectures", "build_autoencoder"}


def examples() -> dict[str, doctest.DocTest]:
    """Return the examples in the docstrings of the public API by function or class."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [sys.modules[name] for name in ("openmae.api", "openmae.errors")]
    found = [test for module in modules for test in finder.find(module) if test.examples]
    return {test.name.rpartition(".")[2]: test for test in found}


def run_example(test: doctest.DocTest) -> None:
    test.globs = {**test.globs, "openmae": openmae}
    output: list[str] = []
    result = doctest.DocTestRunner().run(test, out=output.append)
    assert result.failed == 0, "".join(output)


@pytest.mark.parametrize("name", sorted(WITHOUT_DATA))
def test_examples_that_need_no_data(name: str) -> None:
    run_example(examples()[name])


def test_every_public_function_has_an_example() -> None:
    """The functions that are imported from other modules have theirs in README and docs."""
    functions = {name for name in openmae.__all__ if getattr(getattr(openmae, name), "__module__", "") == "openmae.api"}
    assert functions | WITHOUT_DATA == examples().keys()


@pytest.mark.integration
def test_the_examples_of_the_actions_run_in_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder in ("photos", "labelled/train/a", "labelled/train/b", "labelled/val/a", "labelled/val/b"):
        Path(folder).mkdir(parents=True)
        for number in range(8):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(f"{folder}/{number}.png")
    Path("spec.yaml").write_text(
        "dataset: {train_data_sources: photos, augmentation: {input_size: 64}}\nmodel: {arch: convnextv2_atto}\n"
    )
    for name in ("pretrain", "finetune", "train", "evaluate", "inference", "export", "gen_trt_engine"):
        if name == "gen_trt_engine" and importlib.util.find_spec("tensorrt_rtx") is None:
            continue
        test = examples()[name]
        for example in test.examples:
            shorter = example.source.replace("train.num_epochs=100", "train.num_epochs=1")
            example.source = shorter.replace(" num_epochs=100", " num_epochs=1, image_size=64")
        run_example(test)
    assert Path("runs/classes/train/report.html").is_file()
    assert Path("results/train/backbone.safetensors").is_file()
