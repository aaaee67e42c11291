"""``mae info`` describes checkpoints, exported models, shards and results, and lists what it reads for other files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from tests.actions.conftest import Photos
from tests.helpers.checkpoints import classifier_payload

from openmae.actions.describe_file import describe_file
from openmae.checkpoints.format import CheckpointInfo, save_backbone, write_checkpoint
from openmae.data.open import open_index
from openmae.data.shards.packing import PackOptions, pack
from openmae.engines.metadata import ModelCard
from openmae.engines.tensorrt.sidecar import EngineInfo, Profile, TensorInfo, sidecar_path, sidecar_text
from openmae.errors import UserError
from openmae.models.build import ModelConfig, build_classifier, build_encoder
from openmae.results.status import StatusLog
from openmae.storage.encryption import Key
from openmae.storage.listing import Found
from openmae.training.state import Progress

ATTO = ModelConfig("convnextv2_atto", (64, 64))
VIT = ModelConfig("vit_tiny_patch16", (32, 64), patch_size=8, num_classes=2)
CARD = ModelCard("finetune", replace(ATTO, num_classes=2), (0.5,) * 3, (0.25,) * 3, ("cat", "dog"), precision="fp16")
ENGINE = EngineInfo(
    *("tensorrt_rtx", "1.3.0", "fp16", ("SM86", "SM89"), Profile(1, 4, 8)),
    inputs=(TensorInfo("input", (-1, 3, 64, 64), "float32"),),
    outputs=(TensorInfo("logits", (-1, 2), "float32"),),
    onnx_sha256="0",
    engine_sha256=sha256(b"an engine").hexdigest(),
)


def described(path: Path | str, key: str = "") -> dict[str, str]:
    rows = describe_file(str(path), key)
    assert len(dict(rows)) == len(rows), "two rows have one label"
    return dict(rows)


@pytest.fixture
def training_checkpoint(tmp_path: Path) -> Path:
    payload = classifier_payload(VIT)
    spec = {"train": {"num_epochs": 9, "optim": {"monitor_name": "ACC_all"}}}
    payload["openmae"] |= {"class_names": ["cat", "do\x1bg"], "spec": spec, "version": "0.1.0"}
    payload |= {"optimizer": {}, "progress": asdict(Progress(epoch=4, step=1200, best=0.875))}
    write_checkpoint(payload, tmp_path / "model.pth")
    return tmp_path / "model.pth"


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    info = CheckpointInfo("pretrain", ATTO, mean=(0.5,) * 3, std=(0.25,) * 3)
    return save_backbone(tmp_path / "backbone.safetensors", build_encoder(ATTO).backbone.state_dict(), info)


def test_a_training_checkpoint(training_checkpoint: Path) -> None:
    found = described(training_checkpoint)
    assert found.pop("size").endswith(" MB")
    assert found == {
        "path": str(training_checkpoint),
        "kind": "training checkpoint of OpenMAE",
        "stage": "finetune",
        "model.arch": "vit_tiny_patch16",
        "patch size": "8 px",
        "images": "32x64 px, 3 channels",
        "classes": r"2: cat, do\x1bg",
        "mean": "0.5, 0.5, 0.5",
        "std": "0.2, 0.2, 0.2",
        "written by": "OpenMAE 0.1.0",
        "parameters": "5.4 million",
        "epochs finished": "4 of 9",
        "steps": "1,200",
        "monitored metric": "ACC_all, best so far 0.875",
        "can resume": "yes, it holds the state of the optimizer",
    }


def test_a_backbone(backbone: Path) -> None:
    found = described(backbone)
    assert (found["kind"], found["stage"], found["images"]) == (
        "weights of OpenMAE",
        "pretrain",
        "64x64 px, 3 channels",
    )
    assert not {"classes", "decoder", "epochs finished", "can resume", "encrypted"} & found.keys()


def test_damaged_progress_is_an_error(tmp_path: Path) -> None:
    write_checkpoint(classifier_payload(VIT) | {"progress": {"epoch": "many"}}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"model.pth: its progress is damaged: epoch is 'many'."):
        described(tmp_path / "model.pth")


def test_an_encrypted_checkpoint_needs_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(classifier_payload(VIT), tmp_path / "model.pth", Key(b"secret"))
    locked = described(tmp_path / "model.pth")
    assert locked["kind"] == "unknown without the key"
    assert locked["to read it"].startswith("pass --encryption-key")
    monkeypatch.setenv("MODEL_KEY", "secret")
    found = described(tmp_path / "model.pth", "env:MODEL_KEY")
    assert (found["encrypted"], found["model.arch"]) == ("yes, with encryption_key", "vit_tiny_patch16")
    with pytest.raises(UserError, match="cannot be decrypted"):
        described(tmp_path / "model.pth", "other")


def test_weights_of_timm(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "of timm.pth")
    found = described(tmp_path / "of timm.pth")
    assert found["kind"] == "weights of another program"
    assert (found["layout"], found["family"], found["classes"]) == ("timm ViT", "vit", "7")
    assert found["model.arch"] == "vit_tiny_patch16, by the shapes of its blocks"
    assert (found["images"], found["patch size"]) == ("64x64 px, 3 channels", "16 px")
    command = f"mae train model.arch=vit_tiny_patch16 train.pretrained_model_path='{tmp_path}/of timm.pth' ..."
    assert found["to use it"] == command


def test_the_command_has_the_options_that_differ_from_the_defaults(tmp_path: Path) -> None:
    torch.save(build_classifier(replace(VIT, in_chans=1)).state_dict(), tmp_path / "grey.pth")
    found = described(tmp_path / "grey.pth")
    assert found["images"].endswith("px, 1 channel")
    assert " model.arch=vit_tiny_patch16 model.patch_size=8 model.in_chans=1 " in found["to use it"]


def test_weights_of_the_official_convnext(tmp_path: Path) -> None:
    official = {
        "downsample_layers.0.0.weight": "stem.0.weight",
        "stages.0.0.grn.gamma": "stages.0.blocks.0.mlp.grn.weight",
    }
    state = build_encoder(ATTO).backbone.state_dict()
    renamed = {new: state[name] for new, name in official.items()}
    torch.save({"model": renamed}, tmp_path / "fcmae.pth")
    found = described(tmp_path / "fcmae.pth")
    assert (found["layout"], found["family"]) == ("official FCMAE", "convnextv2")
    assert found["model.arch"] == "none of `mae models`: the shapes of the blocks fit none"
    assert "to use it" not in found


def test_weights_with_parts_that_no_architecture_has(tmp_path: Path) -> None:
    state = build_classifier(VIT).state_dict() | {"reg_token": torch.zeros(1, 4, 192)}
    torch.save(state, tmp_path / "dino.pth")
    assert described(tmp_path / "dino.pth")["model.arch"] == "none of `mae models`: they do not have register tokens"


def graph(**metadata: str) -> onnx.ModelProto:
    shapes = {"input": ["N", 3, 64, 64], "logits": ["N", 2]}
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes) for name, axes in shapes.items()]
    node = onnx.helper.make_node("Identity", ["input"], ["logits"])
    proto = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", tensors[:1], tensors[1:]),
        producer_name="pytorch",
        producer_version="2.9",
        opset_imports=[onnx.helper.make_opsetid("", 17)],
    )
    onnx.helper.set_model_props(proto, metadata)
    return proto


def test_an_onnx_file(tmp_path: Path) -> None:
    onnx.save(graph(**replace(CARD, checkpoint_sha256="abc").to_metadata()), tmp_path / "model.onnx")
    found = described(tmp_path / "model.onnx")
    assert (found["kind"], found["precision"], found["operator set"]) == ("ONNX file of OpenMAE", "fp16", "17")
    assert (found["input"], found["output"]) == ("input: float [N, 3, 64, 64]", "logits: float [N, 2]")
    assert (found["classes"], found["model.arch"]) == ("2: cat, dog", "convnextv2_atto")
    assert found["preprocessing"] == "not included: normalized float images"
    assert (found["crop"], found["checkpoint"]) == ("0.875 of the shorter side, bicubic", "SHA-256 abc")


def test_an_onnx_file_of_another_program(tmp_path: Path) -> None:
    proto = graph()
    proto.graph.output[0].type.tensor_type.elem_type = 99
    onnx.save(proto, tmp_path / "model.onnx")
    found = described(tmp_path / "model.onnx")
    assert found["output"] == "logits: type 99 [N, 2]"
    assert found["kind"] == "ONNX file of pytorch 2.9, without OpenMAE's metadata"
    assert found["precision"] == "fp32"
    assert "classes" not in found


def test_an_onnx_file_with_damaged_text(tmp_path: Path) -> None:
    content = graph().SerializeToString().replace(b"pytorch", b"pyt\xffrch")
    (tmp_path / "model.onnx").write_bytes(content)
    assert described(tmp_path / "model.onnx")["kind"] == "ONNX file of pyt\ufffdrch 2.9, without OpenMAE's metadata"


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "model.engine"
    path.write_bytes(b"an engine")
    sidecar_path(path).write_text(sidecar_text(CARD, ENGINE))
    return path


def test_an_engine_is_described_without_tensorrt(engine: Path) -> None:
    found = described(engine)
    assert (found["kind"], found["precision"]) == ("TensorRT engine of OpenMAE", "fp16")
    assert found["runs with"] == "tensorrt_rtx 1.3.0, no other version"
    assert found["runs on"] == "GPUs of compute capability sm_86, sm_89"
    assert (found["batch size"], found["input"]) == ("1 to 8, tuned for 4", "input: float32 [N, 3, 64, 64]")
    assert found["classes"] == "2: cat, dog"


def test_an_engine_of_another_onnx_file_has_no_classes(engine: Path) -> None:
    sidecar_path(engine).write_text(sidecar_text(None, ENGINE))
    found = described(engine)
    assert found["kind"] == "TensorRT engine from an ONNX file of another program"
    assert "classes" not in found


def test_the_sidecar_of_another_engine_is_an_error(engine: Path) -> None:
    engine.write_bytes(b"another engine")
    with pytest.raises(UserError, match=r"model.engine.json belongs to another engine than .*model.engine"):
        described(engine)


def test_shards(photos: Photos, tmp_path: Path) -> None:
    pack(open_index(str(photos.train), None), tmp_path / "shards", PackOptions(None, 10**9, 95))
    (shard,) = (tmp_path / "shards").glob("*.tar")
    one, all_of_them = described(shard), described(tmp_path / "shards")
    assert (one["kind"], all_of_them["kind"]) == ("shard: a tar file of images", "folder of shards")
    assert one["images"] == all_of_them["images"] == str(len(open_index(str(photos.train), None)))
    assert one["classes"] == all_of_them["classes"] == "3: blue, green, red"
    assert all_of_them["to use it"] == f"mae train dataset.train_data_sources={tmp_path}/shards ..."


def test_a_results_folder(tmp_path: Path) -> None:
    status = StatusLog(tmp_path / "train", append=False)
    status.write("RUNNING", "Epoch 1 of 2, step 8", kpi={"train_loss": 0.5})
    status.write("FAILURE", "train was interrupted")
    for name in ("model_best.pth", "report.html"):
        (tmp_path / "train" / name).touch()
    found = described(tmp_path)
    assert (found["kind"], found["train"]) == ("results folder", "FAILURE: train was interrupted")
    assert (found["last metrics"], found["model"]) == ("train_loss 0.5", f"{tmp_path}/train/model_best.pth")
    assert found["report"] == f"{tmp_path}/train/report.html"
    assert described(tmp_path / "train").keys() == found.keys()


def test_damaged_status_lines_are_skipped(tmp_path: Path) -> None:
    lines = [{"kpi": [1]}, {"kpi": {"a": "x", "b": 2}, "status": 5}]
    (tmp_path / "status.json").write_text("no json\n" + "".join(json.dumps(line) + "\n" for line in lines))
    found = described(tmp_path)
    assert (found[tmp_path.name], found["last metrics"]) == ("5", "b 2")


@pytest.mark.parametrize(
    ("name", "content", "problem", "fix"),
    [
        ("notes.txt", b"some text", "notes.txt is of an unknown kind.", r"mae info reads checkpoints \(\.pth, "),
        ("archive.gz", b"\x1f\x8b", "archive.gz is of an unknown kind.", "For images use mae dataset check"),
        ("model.pth", b"<html>login", "model.pth is a web page", "Download the file itself"),
        ("model.engine", b"x", "has no model.engine.json next to it", "Copy both files"),
        ("model.onnx", b"x", "model.onnx is not an ONNX file, or damaged", "Export it again"),
        ("empty.pth", b"", r"empty.pth is empty \(0 bytes\)", "Copy it again"),
    ],
)
def test_other_files_get_an_error_with_a_fix(name: str, content: bytes, problem: str, fix: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem) as raised:
        described(tmp_path / name)
    assert raised.match(fix)


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"model": Attack()}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"holds posix.mkdir in addition to weights; it was not loaded"):
        described(tmp_path / "model.pth")
    assert not (tmp_path / "made").exists()


def test_paths_that_are_no_files(tmp_path: Path, photos: Photos) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UserError, match=r"pipe.pth is a named pipe \(FIFO\), not a file"):
        described(tmp_path / "pipe.pth")
    with pytest.raises(UserError, match=r"No file at .*absent.pth"):
        described(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="is a folder without shards or results of OpenMAE") as raised:
        described(photos.train)
    assert raised.match("mae info reads checkpoints")


def test_a_folder_with_a_checkpoint_names_it(backbone: Path) -> None:
    with pytest.raises(UserError, match=rf"Name one of its files: {backbone}"):
        described(backbone.parent)


def test_a_url_is_downloaded(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://user:secret@example.com/backbone.safetensors?sign=1"
    monkeypatch.setattr("openmae.actions.describe_file.fetch_with", lambda source, make, suffixes: backbone)
    found = described(url)
    assert (found["path"], found["model.arch"]) == ("https://example.com/backbone.safetensors?...", "convnextv2_atto")


def test_the_url_of_a_folder_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Found("s3://bucket/runs", (), folder=True)
    monkeypatch.setattr("openmae.actions.describe_file.fetch_with", lambda source, make, suffixes: make(found))
    with pytest.raises(UserError, match=r"s3://bucket/runs is a folder\.\n  Fix: Name a file in it\."):
        described("s3://bucket/runs")


def test_a_key_that_is_not_set_is_an_error(backbone: Path) -> None:
    with pytest.raises(UserError, match="the environment variable 'ABSENT' is not set"):
        described(backbone, "env:ABSENT")
