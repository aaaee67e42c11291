"""Files that somebody else made: whatever is in them is a mistake of theirs, never a crash of ours.

OPENMAE_FUZZ=50 looks fifty times as long. What it finds becomes an ``@example``.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from openmae.data.images import CorruptImage, Picture, decode
from openmae.data.opening import index_shards
from openmae.data.sources import resolve_source
from openmae.errors import UserError
from openmae.models.weights import read_checkpoint
from openmae.spec.load import load_spec
from openmae.storage.encryption import Key, created, unlocked
from openmae.training.checkpoints import read_training_state, write_checkpoint

LONGER = int(os.environ.get("OPENMAE_FUZZ", "1"))
KEY = Key(b"k")


def fuzz(examples: int) -> settings:
    """So many examples, each within seconds; the same ones in every run, unless it looks longer."""
    return settings(
        max_examples=examples * LONGER,
        deadline=20_000,
        derandomize=LONGER == 1,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder; nothing may be written beside it."""
    outside = Path(tempfile.mkdtemp())
    folder = outside / "inside"
    folder.mkdir()
    try:
        yield folder
        assert os.listdir(outside) == ["inside"], "something was written outside the folder"
    finally:
        shutil.rmtree(outside)


def changed(content: bytes) -> st.SearchStrategy[bytes]:
    """The same with a few bytes changed, cut off, or put in between."""
    places = st.integers(0, len(content))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        result = bytearray(content)
        for place, removed, added in edits:
            result[place : place + removed] = added
        return bytes(result)

    lengths = st.sampled_from([0, 1, 2, 4, len(content)])
    return st.lists(st.tuples(places, lengths, st.binary(max_size=8)), max_size=4).map(apply)


# --- specs

_KEYS = st.sampled_from(
    [
        "train",
        "model",
        "dataset",
        "num_epochs",
        "optim",
        "lr",
        "arch",
        "augmentation",
        "mean",
        "results_dir",
        "",
        "a.b",
        "<<",
    ]
)
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["${train.num_epochs}", "${a", "${oc.env:HOME}", "1e400", "nan", "0x1f", "~", "${..}", "${${a}}"]),
)
_TREES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4), max_leaves=12
)


@fuzz(80)
@given(_TREES)
def test_specs_of_any_tree(tree: object) -> None:
    with scratch() as folder:
        (folder / "spec.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        with contextlib.suppress(UserError):
            load_spec(folder / "spec.yaml", [], action="train")


@fuzz(80)
@given(
    st.one_of(
        st.text(max_size=60).map(str.encode),
        st.binary(max_size=60),
        changed(b"train: {num_epochs: 3, optim: &a {lr: 1e-3}}\nmodel: {<<: *a, arch: vit_tiny_patch16}\n"),
    )
)
@example(b"a: &a [*a]")
@example(b"&a {b: *a}")
@example(b"!!python/object/apply:os.system [exit]")
@example(b"[" * 5000)
@example(b"a: " + b"{b: " * 3000)
@example(
    b"a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    + b"".join(b"%c: &%c [%s]\n" % (n + 1, n + 1, b", ".join([b"*%c" % n] * 9)) for n in range(97, 109))
)
@example(b"a: &a [1]\n" + b"".join(b"a%d: &a%d [*a%s]\n" % (n, n, b"%d" % (n - 1) if n else b"") for n in range(500)))
@example(b"? [1, 2]\n: 3")
@example(b"train: 2001-01-01")
@example(b"\xff\xfe")
def test_specs_of_any_bytes(content: bytes) -> None:
    with scratch() as folder:
        (folder / "spec.yaml").write_bytes(content)
        with contextlib.suppress(UserError):
            load_spec(folder / "spec.yaml", [], action="train")


@fuzz(60)
@given(
    st.lists(
        st.tuples(_KEYS, _KEYS, st.text(max_size=12)).map(lambda p: f"{p[0]}.{p[1]}={p[2]}") | st.text(max_size=20)
    )
)
@example(["train.num_epochs=" + "9" * 5000])
@example(["model.arch=[" + "[" * 3000])
@example(["train.num_epochs=${train.num_epochs}"])
@example([".".join("a" * 3000) + "=1"])
@example(["train.gpu_ids=" + "[" * 40 + "]" * 40])
def test_overrides(overrides: list[str]) -> None:
    with contextlib.suppress(UserError):
        load_spec(None, overrides, action="train")


# --- archives


def _png(size: int = 9) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(size * size * 3, dtype=np.uint8).reshape(size, size, 3)).save(stream, "PNG")
    return stream.getvalue()


def _tar(kind: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{kind}", format=tarfile.PAX_FORMAT) as bundle:
        for name in ("cat/1.png", "dog/2.png"):
            member = tarfile.TarInfo(name)
            member.size = len(_png())
            bundle.addfile(member, io.BytesIO(_png()))
    return stream.getvalue()


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name in ("cat/1.png", "dog/2.png"):
            bundle.writestr(name, _png())
    return stream.getvalue()


def _extract(content: bytes, name: str) -> None:
    with scratch() as folder:
        (folder / name).write_bytes(content)
        with contextlib.suppress(UserError):
            resolve_source(folder / name, folder / "cache")
        assert set(os.listdir(folder)) <= {name, "cache"}


@pytest.mark.parametrize(("name", "content"), [("a.zip", _zip()), ("a.tar", _tar("")), ("a.tgz", _tar("gz"))])
def test_archives_of_changed_bytes(name: str, content: bytes) -> None:
    @fuzz(60)
    @given(changed(content))
    def check(data: bytes) -> None:
        _extract(data, name)

    check()


@fuzz(60)
@given(
    st.text(min_size=1, max_size=12, alphabet="./\\a:\0~é \n")
    | st.sampled_from(["../x", "/x", "C:\\x", "a/../../x", "x" * 300])
)
@example("é" * 200)
@example(".")
@example("a//b")
@example("a/" * 3000 + "b")
def test_members_of_any_name(name: str) -> None:
    for kind in ("zip", "tar"):
        stream = io.BytesIO()
        try:
            if kind == "zip":
                with zipfile.ZipFile(stream, "w") as bundle:
                    bundle.writestr(name, b"x")
            else:
                with tarfile.open(fileobj=stream, mode="w") as tar:
                    tar.addfile(tarfile.TarInfo(name))
        except (ValueError, IndexError):  # Python does not write such a name
            continue
        _extract(stream.getvalue(), f"a.{kind}")


@fuzz(60)
@given(changed(_tar("")))
def test_shards_of_changed_bytes(content: bytes) -> None:
    with scratch() as folder:
        (folder / "a.tar").write_bytes(content)
        with contextlib.suppress(UserError):
            index_shards([str(folder / "a.tar")], None, "a.tar")


# --- images


def _encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_images_of_changed_bytes(kind: str) -> None:
    @fuzz(50)
    @given(changed(_encoded(kind)))
    def check(data: bytes) -> None:
        with scratch() as folder:
            (folder / "a.png").write_bytes(data)
            with contextlib.suppress(CorruptImage):
                assert decode(folder / "a.png").shape[2] == 3
            with contextlib.suppress(CorruptImage), Picture(Path("upload"), io.BytesIO(data)) as picture:
                picture.pixels(3)

    check()


# --- checkpoints and encrypted files

_PAYLOAD = {"openmae": {"format": 1}, "progress": {"epoch": 1}, "optimizer": {}, "state_dict": {"w": torch.ones(3)}}


def _written(write: Callable[[Path], object]) -> bytes:
    with scratch() as folder:
        write(folder / "f")
        return (folder / "f").read_bytes()


def _sealed(path: Path) -> None:
    with created(path, KEY) as file:
        file.write(b"secret" * 20)


_CHECKPOINT = _written(lambda path: write_checkpoint(_PAYLOAD, path))
_ENCRYPTED = _written(_sealed)


def _pickle_that_runs() -> bytes:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(Path(tempfile.gettempdir()) / "openmae-was-run"),)

    stream = io.BytesIO()
    torch.save(Evil(), stream)
    return stream.getvalue()


@fuzz(80)
@given(changed(_CHECKPOINT))
@example(_pickle_that_runs())
@example(b"")
def test_checkpoints_of_changed_bytes(content: bytes) -> None:
    with scratch() as folder:
        for name in ("a.pth", "a.safetensors"):
            (folder / name).write_bytes(content)
            with contextlib.suppress(UserError):
                read_checkpoint(folder / name)
        with contextlib.suppress(UserError):
            read_training_state(folder / "a.pth", lazily=True)
    assert not (Path(tempfile.gettempdir()) / "openmae-was-run").exists(), "a checkpoint's code was executed"


@fuzz(40)
@given(changed(_ENCRYPTED))
def test_encrypted_files_of_changed_bytes(content: bytes) -> None:
    with scratch() as folder:
        (folder / "a.pth").write_bytes(content)
        with contextlib.suppress(UserError):
            file = unlocked(folder / "a.pth", KEY)
            assert file is None or file.read() == b"secret" * 20, "another content was taken for the written one"
            if file is not None:
                file.close()
