"""Tests of reading pickles: nothing in a file is executed, whatever it holds."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.checkpoints import State

from openmae.checkpoints.format import read_checkpoint
from openmae.checkpoints.unpickling import NumpyArray, NumpyDtype, load_plain
from openmae.checkpoints.weights import load_backbone
from openmae.errors import CheckpointError


def submitit_arguments() -> argparse.Namespace:
    """Return ``args`` as the SLURM scripts of the official MAE and ConvNeXt V2 store them."""
    return argparse.Namespace(output_dir=pathlib.PosixPath("/job/1"), job_dir=pathlib.Path("/job"), lr=None)


class Code:
    """An object whose pickle creates a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_code_beside_harmless_objects_is_not_executed(protocol: int, state: State, tmp_path: Path) -> None:
    hostile = {"model": state, "args": submitit_arguments(), "numbers": np.zeros(3), "code": Code(tmp_path / "made")}
    torch.save(hostile, tmp_path / "f.pth", pickle_protocol=protocol)
    with pytest.raises(CheckpointError):
        load_backbone(tmp_path / "f.pth")
    assert not (tmp_path / "made").exists()


def called(name: str, *arguments: Any) -> bytes:
    """Return a pickle that calls a global by name."""
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


def test_numpy_dtype_cannot_hold_objects() -> None:
    """numpy trusts the flags of a dtype in a pickle: bytes would become pointers to objects."""
    stream = io.BytesIO()
    content = {"x": np.zeros(2, np.dtype([("a", "O")])), "y": np.array([None]), "z": np.datetime64("2026"), "n": 1}
    torch.save(content, stream)
    stream.seek(0)
    found = load_plain(stream)
    assert found["x"].array.size == found["y"].array.size == 0
    assert (found["z"], found["n"]) == (None, 1)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_changed_bytes_raise_only_known_errors(data: st.DataObject) -> None:
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


def test_compressed_records_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"x": torch.zeros(1000)}, stream)
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(tmp_path / "f.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    with pytest.raises(CheckpointError, match="its records are compressed or claim more bytes than the file has"):
        read_checkpoint(tmp_path / "f.pth")


def test_array_that_claims_more_than_its_bytes_is_refused() -> None:
    """``bytes(10**9)`` would be a billion zeros."""
    with pytest.raises(ValueError, match="an array without its bytes"):
        NumpyArray().__setstate__((1, (10**9,), NumpyDtype("u1"), False, 10**9))


class Malicious:
    """An object whose pickle creates a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


class Harmless:
    pass


@pytest.mark.parametrize("writer", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2))])
def test_pickle_that_runs_code_is_refused_without_running(writer: Callable[..., Any], tmp_path: Path) -> None:
    writer({"state_dict": {}, "extra": Malicious(tmp_path / "made")}, tmp_path / "f.pth")
    with pytest.raises(
        CheckpointError, match=r"holds \S*mkdir in addition to weights; it was not loaded|is not a PyTorch"
    ):
        read_checkpoint(tmp_path / "f.pth")
    assert not (tmp_path / "made").exists()


def test_pickled_class_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "config": Harmless()}, tmp_path / "f.pth")
    with pytest.raises(
        CheckpointError, match=r"holds \S*Harmless in addition to weights.*\n  Fix: If you trust its source"
    ):
        read_checkpoint(tmp_path / "f.pth")
