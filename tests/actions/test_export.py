"""``mae export``: the file is what was asked for, evaluate and inference take it, and nothing is lost on the way."""

from __future__ import annotations

import csv
import io
import json
import shutil
from contextlib import redirect_stdout

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
import timm
from PIL import Image

import openmae
from openmae.actions import export
from openmae.actions.sections import running_example
from openmae.cli.main import main
from openmae.engines.metadata import file_sha256
from openmae.engines.onnx import opset_of, read_card, read_onnx
from openmae.errors import RunError
from openmae.results.status import read_status

pytestmark = pytest.mark.xdist_group("actions")


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory):
    """Export a small ViT of a stage, once in a session."""
    made = {}

    def make(stage: str, *overrides: str):
        if (stage, overrides) not in made:
            root = tmp_path_factory.mktemp("exported")
            request = [f"export.checkpoint={trained('vit', stage).checkpoint}", f"export.onnx_file={root}/model.onnx"]
            assert main(["export", *request, f"results_dir={root}", *overrides]) == 0
            made[stage, overrides] = root
        return made[stage, overrides]

    return make


def run(action, model, source, results, *overrides, key="checkpoint"):
    data = {"evaluate": "val", "inference": "test"}[action]
    request = [f"{action}.{key}={model}", f"dataset.{data}_data_sources={source}", f"results_dir={results}"]
    assert main([action, *request, "dataset.num_workers_per_gpu=0", "dataset.batch_size=4", *overrides]) == 0
    return results / action


def metrics_of(folder):
    return [line["kpi"] for line in read_status(folder / "status.json") if "kpi" in line][-1]


def test_results_of_export(exported, trained):
    root = exported("finetune")
    assert {path.name for path in root.iterdir()} == {"model.onnx", "export"}
    names = {"backbone.safetensors", "experiment.yaml", "report.html", "status.json"}
    assert {path.name for path in (root / "export").iterdir()} == names
    kpi = metrics_of(root / "export")
    assert 0 <= kpi["max_difference"] < 1e-5
    assert kpi["opset"] == 17
    card = read_card(read_onnx(root / "model.onnx"))
    assert card.class_names == ("blue", "green", "red")
    assert card.model.input_size == (32, 32)
    assert (card.batch_size, card.preprocessing, card.precision) == (-1, False, "fp32")
    assert card.checkpoint_sha256 == file_sha256(trained("vit", "finetune").checkpoint)


def test_a_classifier_evaluates_the_same_from_onnx(exported, trained, photos, tmp_path):
    reference = metrics_of(run("evaluate", trained("vit", "finetune").checkpoint, photos.val, tmp_path / "a"))
    model = exported("finetune") / "model.onnx"
    for key in ("checkpoint", "trt_engine"):  # a .onnx file is accepted in either place
        found = metrics_of(run("evaluate", model, photos.val, tmp_path / "b", key=key))
        assert found == pytest.approx(reference, abs=1e-5)


def test_a_classifier_infers_the_same_from_onnx(exported, trained, photos, tmp_path):
    rows = {}
    for name, model in (("a", trained("vit", "finetune").checkpoint), ("b", exported("finetune") / "model.onnx")):
        with (run("inference", model, photos.val, tmp_path / name) / "results.csv").open(newline="") as stream:
            rows[name] = list(csv.DictReader(stream))
    assert len(rows["a"]) == 9
    for ours, theirs in zip(rows["a"], rows["b"], strict=True):
        assert (ours["path"], ours["class"]) == (theirs["path"], theirs["class"])
        assert float(ours["probability"]) == pytest.approx(float(theirs["probability"]), abs=1e-5)


def test_a_pretrained_backbone_embeds_the_same_from_onnx(exported, trained, photos, tmp_path):
    checkpoint, model = trained("vit", "pretrain").checkpoint, exported("pretrain") / "model.onnx"
    tables = [
        pq.read_table(run("inference", path, photos.plain, tmp_path / name) / "embeddings.parquet")
        for name, path in (("a", checkpoint), ("b", model))
    ]
    assert tables[0]["path"].to_pylist() == tables[1]["path"].to_pylist()
    vectors = [np.stack(table["vector"].to_numpy()) for table in tables]
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-5)
    assert not (tmp_path / "b" / "inference" / "reconstructions").exists(), "it has no decoder"
    reference = metrics_of(run("evaluate", checkpoint, photos.val, tmp_path / "a"))
    del reference["val_loss"]
    assert metrics_of(run("evaluate", model, photos.val, tmp_path / "b")) == pytest.approx(reference)


def test_a_pretrained_backbone_is_evaluated_by_classes_only(exported, photos, refused, tmp_path):
    model = exported("pretrain") / "model.onnx"
    text = refused(
        "evaluate",
        [f"evaluate.checkpoint={model}", f"dataset.val_data_sources={photos.plain}", f"results_dir={tmp_path}"],
    )
    assert "dataset.val_data_sources: " in text
    assert "class folders" in text


def test_the_backbone_loads_into_timm(exported):
    from safetensors.torch import load_file

    root = exported("pretrain")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    model.load_state_dict(load_file(root / "export" / "backbone.safetensors"))


@pytest.mark.parametrize("alpha", [255, 100])
def test_the_script_of_the_report_agrees_with_evaluation(exported, alpha, tmp_path, monkeypatch):
    """On a picture whose sides tell what was cut off: wide, its ends of another colour than its centre."""
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, :45] = (210, 40, 40)
    pixels[:, 45:75] = (40, 60, 200)
    pixels[:, 75:] = (40, 180, 60)
    image = Image.fromarray(pixels)
    image.putalpha(alpha)
    image.save(tmp_path / "image.png")
    (tmp_path / "image.jpg").write_bytes((tmp_path / "image.png").read_bytes())
    root = exported("pretrain")
    shutil.copy(root / "model.onnx", tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    predictor = openmae.open_predictor(root / "model.onnx")
    names: dict = {}
    with redirect_stdout(io.StringIO()):
        exec(compile(running_example(predictor.card, "model.onnx"), "report", "exec"), names)
    expected = predictor(openmae.read_images([tmp_path / "image.jpg"], predictor.card))["features"]
    np.testing.assert_allclose(names["outputs"]["features"], expected.numpy(), atol=0.02)


def test_the_resolved_spec_exports_again(exported, tmp_path):
    record = exported("finetune") / "export" / "experiment.yaml"
    target = tmp_path / "again.onnx"
    assert main(["export", "-e", str(record), f"export.onnx_file={target}", f"results_dir={tmp_path}"]) == 0
    assert target.is_file()


def test_options_without_effect_are_reported(exported, trained, tmp_path, capsys):
    request = [f"export.checkpoint={trained('vit', 'pretrain').checkpoint}", f"export.onnx_file={tmp_path}/m.onnx"]
    settings = ["dataset.augmentation.input_size=64", "dataset.augmentation.interpolation=bilinear", "export.gpu_id=3"]
    size = ["export.input_height=48", "export.input_width=32"]
    assert main(["export", *request, *settings, *size, f"results_dir={tmp_path}"]) == 0
    text = capsys.readouterr().err
    assert "trained at 32x32 and is exported for 48x32: measure its accuracy with mae evaluate" in text
    assert "dataset.augmentation.input_size has no effect on `mae export`, and the file takes 48x32" in text
    assert "dataset.augmentation.interpolation has no effect on `mae export`" in text
    assert "export.gpu_id has no effect: the export runs on the CPU." in text


def test_the_script_of_the_report_runs(exported, photos, tmp_path, monkeypatch):
    for stage, expected in (("finetune", {"blue", "green", "red"}), ("pretrain", {"(1, 192) (1, 192, 2, 2)"})):
        root = exported(stage)
        shutil.copy(root / "model.onnx", tmp_path / "model.onnx")
        shutil.copy(photos.plain / "0.png", tmp_path / "image.jpg")
        script = running_example(read_card(read_onnx(root / "model.onnx")), "model.onnx")
        page = (root / "export" / "report.html").read_text()
        assert "session.get_modelmeta().custom_metadata_map" in page
        monkeypatch.chdir(tmp_path)
        with redirect_stdout(io.StringIO()) as out:
            exec(compile(script, "report", "exec"), {})
        assert out.getvalue().strip() in expected


def test_size_batch_and_preprocessing(exported, photos, tmp_path):
    settings = ("export.input_height=48", "export.input_width=80", "export.batch_size=2")
    root = exported("finetune", *settings, "export.include_preprocessing=true", "export.opset_version=18")
    session = onnxruntime.InferenceSession(root / "model.onnx")
    (tensor,) = session.get_inputs()
    assert (tensor.shape, tensor.type) == ([2, 48, 80, 3], "tensor(uint8)")
    assert opset_of(read_onnx(root / "model.onnx")) == 18
    found = metrics_of(run("evaluate", root / "model.onnx", photos.val, tmp_path))
    assert found["ACC_all"] >= 0, "nine images in batches of two, the last one filled up"


def test_a_name_without_a_suffix(exported, photos, tmp_path):
    """NVIDIA's SDK sets export.onnx_file to a path that ends in export_onnx_file, and uploads that file."""
    record = exported("finetune") / "export" / "experiment.yaml"
    target = tmp_path / "export_onnx_file"
    assert main(["export", "-e", str(record), f"export.onnx_file={target}", f"results_dir={tmp_path}"]) == 0
    assert "ACC_all" in metrics_of(run("evaluate", target, photos.val, tmp_path, key="trt_engine"))


def test_an_exported_size_is_fixed(exported, photos, refused, tmp_path):
    request = [f"evaluate.checkpoint={exported('finetune')}/model.onnx", f"dataset.val_data_sources={photos.val}"]
    text = refused("evaluate", [*request, "dataset.augmentation.input_size=64", f"results_dir={tmp_path}"])
    assert "dataset.augmentation.input_size is 64x64, but" in text
    assert "takes images of 32x32" in text
    assert "export.input_height=64 export.input_width=64" in text


def test_lower_precision_is_measured(exported, photos, capsys):
    data = f"dataset.val_data_sources={photos.val}"
    calibration = (f"export.calibration.images={photos.train}", "export.calibration.batch=4")
    for precision, extra in (("fp16", ()), ("int8", calibration)):
        capsys.readouterr()
        root = exported("finetune", f"export.quantize={precision}", data, "dataset.num_workers_per_gpu=0", *extra)
        shown = capsys.readouterr().err
        assert "same class as fp32" in shown
        kpi = metrics_of(root / "export")
        assert {"ACC_all", "ACC_all_fp32", "agreement"} <= kpi.keys()
        proto = read_onnx(root / "model.onnx")
        assert read_card(proto).precision == precision
        assert proto.opset_import[0].version == 17
        kinds = {node.op_type for node in proto.graph.node}
        assert ("QuantizeLinear" in kinds) == (precision == "int8")
        halves = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
        assert bool(halves) == (precision == "fp16")


CHECKPOINT = "export.checkpoint={checkpoint}"


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        ((CHECKPOINT, "export.onnx_file={there}"), ("already exists.", "export.overwrite=true")),
        (
            (CHECKPOINT, "export.onnx_file={root}/model.pb"),
            ("must be a file name that ends in .onnx", "model.onnx"),
        ),
        ((CHECKPOINT, "export.onnx_file={root}"), ("must be a file name", "{root}/model.onnx")),
        ((CHECKPOINT, "export.onnx_file={new}", "export.format=xdl"), ("only onnx can be written, got xdl",)),
        (
            (CHECKPOINT, "export.onnx_file={new}", "export.quantize=int8"),
            ("export.calibration.images", "Give a folder"),
        ),
        (
            (CHECKPOINT, "export.onnx_file={there}/x.onnx"),
            ("export.onnx_file: cannot write to",),
        ),
        ((CHECKPOINT, "export.onnx_file={beside}"), ("beside.onnx.data already exists",)),
        (("export.checkpoint={there}", "export.onnx_file={new}"), ("there.onnx is an ONNX file, not a checkpoint",)),
        (
            (CHECKPOINT, "export.onnx_file={new}", "export.input_channel=1"),
            ("export.input_channel is 1, but", "takes 3"),
        ),
        (
            (CHECKPOINT, "export.onnx_file={new}", "export.input_height=40"),
            ("export.input_height, input_width: ", "input size 40x32 is not a multiple of 16"),
        ),
        ((CHECKPOINT, "export.onnx_file={new}", "export.opset_version=99"), ("export.opset_version", "got 99")),
        (
            (CHECKPOINT, "export.onnx_file={new}", "model.arch=hiera_tiny_224"),
            ("model.arch is hiera_tiny_224, but", "Remove"),
        ),
        ((CHECKPOINT, "export.onnx_file={new}", "train.stage=finetune"), ("train.stage is finetune, but",)),
        (("export.checkpoint={root}/none.pth", "export.onnx_file={new}"), ("export.checkpoint: No checkpoint at",)),
    ],
)
def test_invalid_input_writes_nothing(trained, refused, tmp_path, overrides, texts):
    there = tmp_path / "there.onnx"
    there.write_bytes(b"an earlier file")
    names = {"checkpoint": trained("vit", "pretrain").checkpoint, "root": tmp_path, "there": there}
    names["new"] = tmp_path / "new.onnx"
    names["beside"] = tmp_path / "beside.onnx"
    (tmp_path / "beside.onnx.data").write_bytes(b"precious")
    text = refused("export", [item.format(**names) for item in overrides] + [f"results_dir={tmp_path / 'results'}"])
    for part in texts:
        assert part.format(**names) in text
    assert there.read_bytes() == b"an earlier file"
    assert (tmp_path / "beside.onnx.data").read_bytes() == b"precious"
    assert not names["new"].exists()


def test_a_file_that_differs_is_a_failed_run(trained, tmp_path, monkeypatch, capsys):
    def differs(*arguments):
        raise RunError("ONNX Runtime's logits differs from torch's by 0.1")

    monkeypatch.setattr(export, "compare", differs)
    request = [f"export.checkpoint={trained('vit', 'finetune').checkpoint}", f"export.onnx_file={tmp_path}/model.onnx"]
    assert main(["export", *request, f"results_dir={tmp_path / 'results'}"]) == 1
    assert "differs from torch's by 0.1" in capsys.readouterr().err
    assert not (tmp_path / "model.onnx").exists()
    assert read_status(tmp_path / "results" / "export" / "status.json")[-1]["status"] == "FAILURE"


def test_overwrite(exported, trained, tmp_path):
    target = tmp_path / "model.onnx"
    target.write_bytes(b"an earlier file")
    spec = {
        "export": {
            "checkpoint": str(trained("vit", "pretrain").checkpoint),
            "onnx_file": str(target),
            "overwrite": True,
            "on_cpu": True,
        },
        "results_dir": str(tmp_path),
    }
    assert openmae.export(spec) == target
    assert json.loads(onnxruntime.InferenceSession(target).get_modelmeta().custom_metadata_map["stage"]) == "pretrain"
