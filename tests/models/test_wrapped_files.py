"""The same weights as other programs store them: each file gives the same function, or the true reason why not."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import io
import json
import os
import pathlib
import pickle
import struct
import types
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from openmae.checkpoints.format import CheckpointInfo, load_backbone, load_into, read_checkpoint
from openmae.checkpoints.unpickling import NumpyArray, NumpyDtype, load_plain
from openmae.errors import CheckpointError
from openmae.models.build import ModelConfig, build_classifier

State = dict[str, Tensor]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(7)
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32).eval()


@pytest.fixture(scope="module")
def state(model: nn.Module) -> State:
    return model.state_dict()


def behind(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def trunk(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith("head")}


def zeroed(state: State) -> State:
    return {name: value * 0 for name, value in state.items()}


def submitit_arguments() -> argparse.Namespace:
    """What the SLURM scripts of the official MAE and ConvNeXt V2 leave in ``args``."""
    return argparse.Namespace(output_dir=pathlib.PosixPath("/job/1"), job_dir=pathlib.Path("/job"), lr=None)


WRAPPED: dict[str, Callable[[State], Any]] = {
    "bare": lambda s: s,
    "DataParallel": lambda s: behind("module.", s),
    "compiled": lambda s: behind("_orig_mod.", s),
    "compiled inside": lambda s: {name.replace("blocks.", "blocks._orig_mod."): v for name, v in s.items()},
    "DataParallel and compiled": lambda s: {"model": behind("module._orig_mod.", s)},
    "Lightning": lambda s: {"state_dict": behind("model.", s), "epoch": 3, "hyper_parameters": {"lr": 1e-3}},
    "Lightning with more": lambda s: {"state_dict": {**behind("model.", s), "criterion.weight": torch.ones(4)}},
    "Lightning net": lambda s: {"state_dict": behind("net.", s)},
    "encoder": lambda s: {"state_dict": behind("encoder.", s)},
    "DeepSpeed": lambda s: {"module": s, "dp_world_size": 1, "ds_config": {"zero": {"stage": 1}}},
    "SWA": lambda s: {**behind("module.", s), "n_averaged": torch.tensor(5)},
    "params": lambda s: {"params": s},
    "nested": lambda s: {"state": {"model": behind("backbone.", s)}, "step": 3},
    "submitit": lambda s: {"model": s, "args": submitit_arguments()},
    "windows path": lambda s: {"model": s, "path": pathlib.PureWindowsPath("C:/runs")},
    "numpy scalar": lambda s: {"state_dict": s, "best": np.float64(71.3), "bool": np.bool_(True)},
    "numpy arrays": lambda s: {name: value.numpy() for name, value in s.items()},
    "numpy state": lambda s: {"model": s, "rng": np.random.RandomState(0).get_state()},
    "defaultdict": lambda s: {"model": s, "stats": collections.defaultdict(list, {"a": [1]})},
    "deque": lambda s: {"model": s, "losses": collections.deque([1.0, 2.0], maxlen=4)},
    "namespace": lambda s: {"model": s, "args": types.SimpleNamespace(lr=1)},
    "dates": lambda s: {"model": s, "at": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)},
    "timm with EMA": lambda s: {"state_dict": s, "state_dict_ema": s, "arch": "x", "args": argparse.Namespace()},
    "EMA of ConvNeXt V2's scripts": lambda s: {"model": zeroed(s), "model_ema": s},
    "DINO": lambda s: {"student": behind("module.backbone.", zeroed(s)), "teacher": behind("backbone.", s)},
    "a copy beside": lambda s: {**s, **behind("momentum_encoder.", zeroed(s))},
    "momentum": lambda s: {"state_dict": behind("momentum_backbone.", zeroed(s)) | behind("backbone.", s)},
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_a_wrapped_file_gives_the_same_function(case: str, model: nn.Module, state: State, tmp_path: Path) -> None:
    torch.save(WRAPPED[case](state), tmp_path / "f.pth")
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path / "f.pth")(IMAGES), model(IMAGES))


@pytest.mark.parametrize("name", ["model.safetensors", "renamed.pth"])
def test_a_safetensors_file_is_told_by_its_content(name: str, model: nn.Module, state: State, tmp_path: Path) -> None:
    save_file(dict(state), tmp_path / name)
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path / name)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("arrange", [lambda s: {"state_dict": behind("backbone.", s)}, lambda s: s])
def test_a_trunk_alone_gives_its_features(
    arrange: Callable[[State], Any], model: Any, state: State, tmp_path: Path
) -> None:
    torch.save(arrange(trunk(state)), tmp_path / "f.pth")
    with torch.no_grad():
        expected = model.forward_features(IMAGES)[:, 1:].mean(dim=1)
        assert torch.allclose(load_backbone(tmp_path / "f.pth")(IMAGES), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "key", "said"),
    [
        (
            lambda s: {"model": s, "model_ema": s},
            "model",
            "the weights under 'model_ema' were taken; the file also has model: train.pretrained_weights_key chooses",
        ),
        (
            lambda s: {"student": behind("backbone.", s), "teacher": behind("backbone.", s)},
            "student",
            "the weights under 'teacher.backbone' were taken; the file also has student",
        ),
        (
            lambda s: {
                "state_dict": {**behind("backbone.", s), **behind("momentum_backbone.", s), "fc.weight": torch.ones(1)}
            },
            "momentum_backbone",
            "the weights under 'state_dict.backbone' were taken; the file also has momentum_backbone: "
            "train.pretrained_weights_key chooses; not used: fc",
        ),
    ],
    ids=["ema", "teacher", "momentum"],
)  # fmt: skip
def test_which_weights_were_taken_is_said_and_can_be_chosen(
    content: Callable[[State], Any], key: str, said: str, state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "f.pth"
    torch.save(content(state), path)
    with caplog.at_level("INFO", "openmae"):
        read_checkpoint(path)
    assert said in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "openmae"):
        chosen = read_checkpoint(path, weights_key=key)
    assert f"the weights under '{key}" in caplog.text or f".{key}' were taken" in caplog.text
    assert chosen.num_classes == 4
    with pytest.raises(CheckpointError, match=r"no weights under 'nothing'.*\n  Fix: It has: "):
        read_checkpoint(path, weights_key="nothing")


def test_plain_weights_of_an_openmae_checkpoint_can_be_chosen(tmp_path: Path) -> None:
    config = ModelConfig("convnextv2_atto", (32, 32), num_classes=2)
    plain, average = build_classifier(config), build_classifier(config)
    info = CheckpointInfo("finetune", config, mean=(0.5,) * 3, std=(0.2,) * 3)
    states = {"state_dict": plain, "ema_state_dict": average}
    content = {"openmae": info.to_dict(), **{key: behind("model.", m.state_dict()) for key, m in states.items()}}
    torch.save(content, tmp_path / "f.pth")
    for key, expected in (("", average), ("state_dict", plain), ("ema_state_dict", average)):
        loaded = load_backbone(tmp_path / "f.pth", weights_key=key)
        assert torch.equal(loaded.get_parameter("stem.0.weight"), expected.get_parameter("stem.0.weight"))
    with pytest.raises(CheckpointError, match="no weights under 'model'"):
        load_backbone(tmp_path / "f.pth", weights_key="model")


# What is refused, and why


class Code:
    """Its pickle would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def scripted(path: Path) -> None:
    module = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    module.save(str(path))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("weights/readme.txt", "hello")


REFUSED: dict[str, tuple[Callable[[Path, nn.Module, State], Any], str]] = {
    "whole model": (lambda p, m, s: torch.save(m, p), r"holds a whole pickled model \(timm\.\S+VisionTransformer\)"),
    "Git LFS": (lambda p, m, s: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "pointer of Git LFS"),
    "web page": (lambda p, m, s: p.write_text("<html><body>Sign in</body></html>"), "is a web page, not a checkpoint"),
    "TorchScript": (lambda p, m, s: scripted(p), "is a TorchScript archive"),
    "ZIP": (lambda p, m, s: zipped(p), "is a ZIP archive, but not one that torch.save wrote"),
    "TAO encrypted": (
        lambda p, m, s: torch.save({"state_dict": b"..", "state_dict_encrypted": True}, p),
        "TAO has encrypted the weights",
    ),
    "ZeRO-3": (
        lambda p, m, s: torch.save({"module": {n: torch.empty(0) for n in s}}, p),
        r"one process's part of a partitioned model",
    ),
    "quantized": (
        lambda p, m, s: torch.save(
            {**s, "patch_embed.proj.weight": torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)}, p
        ),
        r"is no dense tensor \(quantized\)",
    ),
    "optimizer only": (lambda p, m, s: torch.save({"optimizer": {"state": {}}}, p), "holds no weights; its first keys"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_named(case: str, model: nn.Module, state: State, tmp_path: Path) -> None:
    make, said = REFUSED[case]
    make(tmp_path / "f.pth", model, state)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_backbone(tmp_path / "f.pth")
    assert caught.value.fix


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float, state: State, tmp_path: Path) -> None:
    broken = state["blocks.3.mlp.fc1.weight"].clone()
    broken[0, 0] = bad
    torch.save({**state, "blocks.3.mlp.fc1.weight": broken}, tmp_path / "f.pth")
    text = r"1 of \d+ tensors hold NaN or infinite numbers, the first is blocks.3.mlp.fc1.weight"
    with pytest.raises(CheckpointError, match=text):
        load_backbone(tmp_path / "f.pth")


# Nothing is executed, whatever stands where a harmless object is expected


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_code_beside_harmless_objects_is_not_run(protocol: int, state: State, tmp_path: Path) -> None:
    hostile = {"model": state, "args": submitit_arguments(), "numbers": np.zeros(3), "code": Code(tmp_path / "made")}
    torch.save(hostile, tmp_path / "f.pth", pickle_protocol=protocol)
    with pytest.raises(CheckpointError):
        load_backbone(tmp_path / "f.pth")
    assert not (tmp_path / "made").exists()


def called(name: str, *arguments: Any) -> bytes:
    """A pickle that calls a global by name."""
    module, _, function = name.rpartition(".")
    argument = pickle.dumps(arguments, protocol=2)[2:-1]
    return b"\x80\x02c" + f"{module}\n{function}\n".encode() + argument + b"R."


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.open",
        "subprocess.check_call", "numpy.load", "numpy.core.memmap", "numpy.testing._private.utils.runstring",
        "pathlib.Path.touch", "pathlib.os.mkdir", "argparse.FileType", "collections.namedtuple", "types.FunctionType",
        "torch.load", "torch.hub.load", "timm.create_model", "shutil.rmtree", "importlib.import_module", "pip.main",
    ],
)  # fmt: skip
def test_no_other_global_can_be_called(name: str, tmp_path: Path) -> None:
    (tmp_path / "f.pth").write_bytes(called(name, str(tmp_path / "made")))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "f.pth")
    assert not (tmp_path / "made").exists()


def test_a_numpy_dtype_cannot_smuggle_objects_in() -> None:
    """numpy believes the flags of a dtype in a pickle: bytes would become pointers to objects."""
    stream = io.BytesIO()
    content = {"x": np.zeros(2, np.dtype([("a", "O")])), "y": np.array([None]), "z": np.datetime64("2026"), "n": 1}
    torch.save(content, stream)
    stream.seek(0)
    found = load_plain(stream)
    assert found["x"].array.size == found["y"].array.size == 0
    assert (found["z"], found["n"]) == (None, 1)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_changed_bytes_of_harmless_objects_end_in_an_answer(data: st.DataObject) -> None:
    stream = io.BytesIO()
    torch.save(
        {"args": submitit_arguments(), "n": np.arange(3.0), "s": np.float32(2), "d": collections.defaultdict(list)},
        stream,
        _use_new_zipfile_serialization=False,
    )
    content = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(
        pickle.UnpicklingError, ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError,
        OSError, RuntimeError, TypeError, ValueError, struct.error,
    ):  # fmt: skip
        load_plain(io.BytesIO(bytes(content)))


# Nothing is allocated that the file does not hold


def own(config: ModelConfig, **header: Any) -> dict[str, Any]:
    info = CheckpointInfo("finetune", config, mean=(0.5,) * 3, std=(0.2,) * 3)
    values = info.to_dict()
    values["model"] |= header
    return {"openmae": values, "state_dict": behind("model.", build_classifier(config).state_dict())}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"num_classes": 8_000_000}, "num_classes is 8000000, but the classifier has 2 outputs"),
        ({"input_size": [4096, 4096]}, r"input_size is \[4096, 4096\], but the position embedding has 5 tokens"),
        ({"patch_size": 1}, "patch_size is 1, but the patch embedding has 16"),
        ({"in_chans": 4096}, "in_chans is 4096, but the first convolution takes 3"),
        ({"arch": "vit_huge_patch14"}, "arch is vit_huge_patch14, but the blocks are of vit_tiny_patch16"),
        ({"arch": "convnextv2_huge"}, "arch is convnextv2_huge, but the tensors are of the vit family"),
        ({"num_classes": 10**30}, "damaged or of another version.*num_classes is 10{30}"),
        ({"input_size": [-32, 32]}, r"damaged or of another version.*input_size is \[-32, 32\]"),
        ({"input_size": "ab"}, "damaged or of another version"),
        ({"arch": ["vit_tiny_patch16"]}, "damaged or of another version"),
        ({"decoder_depth": 1.5}, "damaged or of another version.*decoder_depth is 1.5"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_header_is_compared_with_the_tensors_before_anything_is_built(
    header: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(own(ModelConfig("vit_tiny_patch16", (32, 32), num_classes=2), **header), tmp_path / "f.pth")
    for build in ("build_classifier", "build_feature_extractor"):
        monkeypatch.setattr(f"openmae.checkpoints.format.{build}", lambda config: pytest.fail(f"built {config}"))
    with pytest.raises(CheckpointError, match=said):
        load_backbone(tmp_path / "f.pth")


def test_a_classifier_of_another_width_is_refused_before_it_is_built(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight million classes of two features are 66 MB in a file, and 6 GB in the model."""
    for build in ("build_classifier", "build_feature_extractor"):
        monkeypatch.setattr(f"openmae.checkpoints.format.{build}", lambda config: pytest.fail(f"built {config}"))
    config = ModelConfig("vit_tiny_patch16", (32, 32), num_classes=2)
    content = own(config, num_classes=300)
    content["state_dict"] |= {"model.head.weight": torch.zeros(300, 2), "model.head.bias": torch.zeros(300)}
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(
        CheckpointError, match=r"classifier's width is 192, but the file has a classifier of \[300, 2\]"
    ):
        load_backbone(tmp_path / "f.pth")
    torch.save({**state, "head.weight": torch.zeros(300, 2)}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=r"has 192 features, but the file has a classifier of \[300, 2\]"):
        load_backbone(tmp_path / "f.pth")


def test_a_decoder_in_the_header_is_compared_too(tmp_path: Path) -> None:
    from openmae.models.build import build_autoencoder

    config = ModelConfig("vit_tiny_patch16", (32, 32), decoder_depth=1, decoder_embed_dim=32)
    state = behind("model.", build_autoencoder(config).state_dict())
    info = CheckpointInfo("pretrain", replace(config, decoder_depth=4000, decoder_embed_dim=65536))
    torch.save({"openmae": info.to_dict(), "state_dict": state}, tmp_path / "f.pth")
    text = "decoder_depth is 4000, but the decoder has 1 blocks; decoder_embed_dim is 65536"
    with pytest.raises(CheckpointError, match=text):
        read_checkpoint(tmp_path / "f.pth")


def test_a_tensor_of_few_values_cannot_claim_many(state: State, tmp_path: Path) -> None:
    torch.save({**state, "head.weight": torch.zeros(1, 192).expand(8_000_000, 192)}, tmp_path / "f.pth")
    with pytest.raises(
        CheckpointError, match=r"head.weight claims the shape \[8000000, 192\], but the file holds fewer"
    ):
        load_backbone(tmp_path / "f.pth")
    torch.save({**state, "head.weight": torch.zeros(8_000_000, 0)}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError):
        load_backbone(tmp_path / "f.pth")
    with torch.device("meta"):
        meta = timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict()
    torch.save(meta, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match="cls_token has a shape, but no values"):
        load_backbone(tmp_path / "f.pth")


def test_compressed_records_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"x": torch.zeros(1000)}, stream)
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(tmp_path / "f.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    with pytest.raises(CheckpointError, match="its records are compressed or claim more bytes than the file has"):
        read_checkpoint(tmp_path / "f.pth")


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "[1", '"x"', json.dumps({"format": 1})])
def test_a_header_of_a_safetensors_file_that_is_not_one_is_explained(text: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "f.safetensors", {"openmae": text})
    with pytest.raises(CheckpointError, match=r"damaged|is no safetensors file|of another version"):
        read_checkpoint(tmp_path / "f.safetensors")


def test_a_safetensors_header_that_claims_too_much_is_explained(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    (tmp_path / "f.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match="is no safetensors file, or damaged"):
        read_checkpoint(tmp_path / "f.safetensors")
    (tmp_path / "g.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{")
    with pytest.raises(CheckpointError, match="is no safetensors file, or damaged"):
        read_checkpoint(tmp_path / "g.safetensors")


@pytest.mark.parametrize("spec", [nested(60), {"a": nested(300)}, {"a": [0] * 200_000}], ids=["60", "300", "wide"])
def test_a_spec_in_a_header_that_is_no_spec_is_explained(spec: Any, tmp_path: Path) -> None:
    content = own(ModelConfig("convnextv2_atto", (32, 32), num_classes=2))
    content["openmae"]["spec"] = spec
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match="damaged or of another version"):
        read_checkpoint(tmp_path / "f.pth")


def test_an_array_that_claims_more_than_its_bytes_is_refused() -> None:
    """``bytes(10**9)`` would be a billion zeros."""
    with pytest.raises(ValueError, match="an array without its bytes"):
        NumpyArray().__setstate__((1, (10**9,), NumpyDtype("u1"), False, 10**9))


def test_a_linear_probe_of_the_official_code_starts_a_training(tmp_path: Path) -> None:
    """Its head is a sequence with a batch norm, and no part of the backbone."""
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32)
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("head")}
    state |= {"head.0.running_mean": torch.zeros(192), "head.1.weight": torch.ones(3, 192)}
    torch.save({"model": state}, tmp_path / "probe.pth")
    model = build_classifier(ModelConfig("vit_tiny_patch16", (32, 32), num_classes=3))
    report = load_into(model, read_checkpoint(tmp_path / "probe.pth"), part="backbone", allow_partial=True)
    assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    assert "head" in str(report)
